"""Complete training states: one safetensors file each, in a folder named by the step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bootcli.errors import BootError
from bootcli.store.tensors import read_tensors, write_tensors


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, object], keep: int
) -> Path:
    """Write ``folder/step-<step>.safetensors`` and delete all but the newest ``keep``."""
    path = folder / f"step-{step:08d}.safetensors"
    write_tensors(path, tensors, facts)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def load_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The newest state. Raises `BootError` where there is none or it is damaged."""
    found = checkpoints(folder)
    if not found:
        raise BootError(f"No checkpoint in {folder}.", "Start again with --overwrite.")
    return read_tensors(found[-1])
