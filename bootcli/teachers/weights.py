"""Weights from other people's files, for the families: what does not fit a network, and archives of tensors alone."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bootcli.errors import BootError


def misfit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """How ``tensors`` differ from a state dict in names and shapes, for people; empty where they do not.

    "1 missing (conv.weight); 2 of another shape (a (3,), not (4,), ...)", with at most three names of each kind.
    """
    wrong = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    return "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in wrong.items() if names)


def read_archive(file: Path) -> dict[str, Tensor]:
    """A table of tensors that ``torch.save`` wrote, without unpickling an object.

    Raises `BootError` for a damaged file, and for one that holds anything but tensors.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:  # torch compresses nothing
                if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
                    raise ValueError("it unpacks to more than it holds")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may fail in any way; the restricted loader runs none of it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BootError(
            f"{file} was refused: it is damaged, or holds more than tensors. Nothing in it was executed. "
            f"({reason:.200})",
            "It may be cut short or a git-lfs pointer: download it again. Where the source is trusted, save it as "
            ".safetensors.",
        ) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise BootError(f"{file} is not a table of tensors.", "Save the network's state_dict as .safetensors.")
    return {str(name): tensor for name, tensor in content.items()}
