"""Atomic writing, and reading that turns a broken file into a clear error. Light: imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bootcli.errors import BootError, UsageError

_MASK = os.umask(0)  # which can be asked for in no other way
os.umask(_MASK)


TEMPORARY = ".bootcli-"
"""What the names of unfinished files and folders begin with; one that stays was left by a crash."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_MASK)  # mkstemp's 0600 would hide the file from the group
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block succeeds; an old one is replaced."""
    path = path.resolve()  # what a link leads to, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=TEMPORARY))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_MASK)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=TEMPORARY))
            try:
                path.replace(old / path.name)  # not onto it: Windows replaces no folder, not even an empty one
                try:
                    temporary.replace(path)
                except BaseException:
                    (old / path.name).replace(path)
                    raise
            finally:
                shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """A copy of a file, there whole or not at all."""
    with atomic_file(target) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, readable by people, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object. Raises `BootError` for a missing or broken file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BootError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BootError(f"{path} is not valid JSON: {error}.", "The file is damaged; use a fresh copy.") from error
    if not isinstance(value, dict):
        raise BootError(f"{path} is not a JSON object.", "The file is damaged; start from a fresh copy.")
    return value


def check_writable(path: Path) -> None:
    """Raise `OSError` where no file can be made at ``path``, before what goes into it is worked out."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_free(folder: Path, *, overwrite: bool, mark: str | None = None, ours: Sequence[str] = ()) -> None:
    """Raise `UsageError` unless files may be written into ``folder``: a new or empty one, or one to ``overwrite``.

    Args:
        folder: where the files will go.
        overwrite: whether the user agrees to lose what is there.
        mark: the file by which bootcli knows a folder of its own; without it nothing is ever overwritten.
        ours: names of files that count for nothing.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file.", "Name a folder with --output.")
    if not folder.exists() or all(path.name in ours for path in folder.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"The output folder {folder} is not empty.", "Choose another --output, or use --overwrite.")
    if mark is not None and not (folder / mark).is_file():
        raise UsageError(f"{folder} has no {mark}, so it is not overwritten.", "Choose another --output.")
