"""The files that hold a network: NVlabs' pickles, consistency_models' archives, and bootcli's own safetensors form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bootcli.plugin import BootError
from bootcli_edm.archive import names_a_unet
from bootcli_edm.refusal import Refused, shown

if TYPE_CHECKING:
    from torch import Tensor

    from bootcli_edm.architecture import Architecture

T = TypeVar("T")
HEADER = "bootcli_edm"
"""Key of the JSON in the metadata of a .safetensors file."""
_MARK = b"torch_utils.persistence"
_FIRST = 2**16
_STUDENTS = ("cd_", "ct_")
"""What the names of consistency models begin with, whose networks look like those of their teachers."""
NON_COMMERCIAL = "cc-by-nc-sa-4.0"


@dataclass(frozen=True)
class Checkpoint:
    """A file, read.

    Args:
        architecture: what it describes.
        tensors: its weights.
        facts: what else is known of it, for people and for students: ``licence``, ``came as``, ``also in the file``.
    """

    architecture: Architecture
    tensors: dict[str, Tensor]
    facts: dict[str, str]


def network_file(path: Path) -> Path | None:
    """The one file of a network at ``path``, itself or in it; None where there is none. Cheap, and never raises."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [file for file in files if file.is_file() and _is_network(file)]
    except OSError:
        return None
    return found[0] if len(found) == 1 else None


def _is_network(file: Path) -> bool:
    try:
        match file.suffix:
            case ".pkl":
                with file.open("rb") as stream:
                    return _MARK in stream.read(_FIRST)
            case ".pt" | ".pth":
                return file.name.startswith("edm") and names_a_unet(file)
            case ".safetensors":
                return HEADER in _metadata(file)
    except (OSError, ValueError, RecursionError):
        pass
    return False


def _metadata(file: Path) -> dict[str, str]:
    """The metadata of a .safetensors file, without torch. Raises `ValueError` for another file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= 2**24:
            raise ValueError("no header")
        header = json.loads(stream.read(length))
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return metadata if isinstance(metadata, dict) else {}


def read_network(file: Path, make: Callable[[Checkpoint], T]) -> T:
    """What ``make`` makes of the network in a file.

    Raises `BootError` for one that is broken, holds something else or would run code, whoever finds it.
    """
    read = {".safetensors": _read_own, ".pt": _read_archive, ".pth": _read_archive}.get(file.suffix, _read_pickle)
    try:
        return make(read(file))
    except Refused as error:
        raise BootError(
            f"{file} was refused: {error}. Nothing in it was executed.",
            "It is damaged, no EDM checkpoint, or made to run code: get it again from where it was published.",
        ) from None
    except OSError as error:
        raise BootError(f"{file} cannot be read: {error.strerror or error}.") from None


def _read_pickle(file: Path) -> Checkpoint:
    from bootcli_edm.architecture import Architecture
    from bootcli_edm.persistence import read_checkpoint

    stored = read_checkpoint(file)
    facts = {"came as": "EDM pickle, read without running it"}
    if "NonCommercial" in stored.module_src:
        facts["licence"] = NON_COMMERCIAL
    if stored.dropped:
        facts["also in the file"] = f"{', '.join(stored.dropped)} (left out)"
    return Checkpoint(Architecture(stored.class_name, stored.arguments, stored.positional), stored.tensors, facts)


def _read_archive(file: Path) -> Checkpoint:
    from bootcli_edm.architecture import Architecture
    from bootcli_edm.consistency import read

    if file.name.startswith(_STUDENTS):
        raise BootError(
            f"{file} is a consistency model, by its name: a student already.", "Distil the edm_ file it was made from."
        )
    stored = read(file)
    facts = {"came as": "archive of consistency_models"}
    return Checkpoint(Architecture(stored.class_name, stored.arguments), stored.tensors, facts)


def _read_own(file: Path) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from bootcli_edm.architecture import Architecture

    try:
        header = json.loads(_metadata(file)[HEADER])
        facts = {shown(name): shown(value, 200) for name, value in header["facts"].items()}
        return Checkpoint(Architecture(str(header["class_name"]), dict(header["arguments"])), load_file(file), facts)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"it is damaged ({type(error).__name__}: {shown(error)})") from None
