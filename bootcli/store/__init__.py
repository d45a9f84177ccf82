"""Files: run folders, checkpoints, student artifacts. Everything is safetensors and JSON, written atomically."""
