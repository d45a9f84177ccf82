"""What the families that read folders of diffusers share; no family of its own."""
