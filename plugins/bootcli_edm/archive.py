"""Recognises the archives of openai/consistency_models without loading them. Imports no torch."""

from __future__ import annotations

import zipfile
from pathlib import Path

_MARKS = (b"time_embed.0.weight", b"input_blocks.0.0.weight", b"out.2.weight")
_LARGEST = 2**24


def names_a_unet(file: Path) -> bool:
    """Whether a file is a torch archive whose tensors have guided-diffusion's names. Never raises."""
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _LARGEST:
                return False
            content = archive.read(pickles[0])
    except Exception:  # of junk, zipfile and the decompressors raise whatever they like
        return False
    return all(mark in content for mark in _MARKS)
