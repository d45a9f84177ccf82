"""Safetensors files with a JSON header, written atomically and read with clear errors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bootcli.errors import BootError
from bootcli.store.files import atomic_file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> None:
    """Write tensors and a JSON-able header to one file, atomically; a power cut leaves the old file or the new one."""
    held, seen = {}, set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        place = whole.untyped_storage().data_ptr()
        held[name] = whole.clone() if place in seen else whole  # safetensors refuses tensors that share memory
        seen.add(place)
    with atomic_file(path) as temporary:
        save_file(held, temporary, metadata={"bootcli": json.dumps(header)})
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and header. Raises `BootError` for a missing, damaged or foreign file; executes nothing."""
    if not path.is_file():
        raise BootError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {})["bootcli"])
            if not isinstance(header, dict):
                raise ValueError("its header is not an object")
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a mapping)
    except KeyError as error:
        raise BootError(f"{path} was not written by bootcli.") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise BootError(f"{path} is damaged: {error}.", "Restore it from a copy, or make it again.") from error
