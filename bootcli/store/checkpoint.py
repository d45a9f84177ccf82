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
    """Write ``folder/step-<step>.safetensors`` and delete others, the oldest first, until ``keep`` are left."""
    path = folder / f"step-{step:08d}.safetensors"
    write_tensors(path, tensors, facts)
    others = [each for each in checkpoints(folder) if each != path]
    for old in others[: max(0, len(others) + 1 - keep)]:
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
    try:
        return read_tensors(found[-1])
    except BootError as error:
        if len(found) == 1:
            raise
        raise BootError(error.message, f"Delete it, and the run goes on from {found[-2].name}.") from error
