"""What the commands share: reading options, finding the run, JSON, and the one place where errors become exit codes."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import typer

from bootcli.errors import BootError, Interrupted, UsageError

DEBUG = "BOOTCLI_DEBUG"
DISK_FULL = ("No space left on device", "Disk quota exceeded")


def integers(text: str | None, flag: str) -> tuple[int, ...] | None:
    """``"4,10,50"`` -> (4, 10, 50). Raises `UsageError`."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{flag} {text}: expected whole numbers with commas between.", f"Like: {flag} 1,3,5"
        ) from error


def pixels(text: str | None) -> tuple[int, int] | None:
    """``"768x512"`` -> (768, 512), width and height; ``"512"`` -> (512, 512). Raises `UsageError`."""
    if text is None:
        return None
    sides = text.split("x") if "x" in text else [text, text]
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"--resolution {text}: expected pixels.", "Like: --resolution 512, or width x height: 768x512")
    return int(sides[0]), int(sides[1])


def limits(text: str, flag: str) -> tuple[float, float]:
    """``"2,8"`` -> (2.0, 8.0). Raises `UsageError`."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{flag} {text}: expected two numbers with a comma between.", f"Like: {flag} 2,8") from error
    return low, high


def find_run(run: Path | None, *, with_student: bool = True) -> Path:
    """The run a command works on; the newest one (with a student, where it takes one), named on stderr, where it was
    left out. Raises `UsageError`."""
    from bootcli.store.rundir import newest_run

    if run is None:
        run = newest_run(with_student=with_student)
        typer.echo(f"Using run {run}", err=True)
    if not run.exists():
        raise UsageError(f"There is no run {run}.", "Name a run folder, or leave it out for the newest in runs/.")
    return run


def print_json(data: object) -> None:
    """One JSON document on stdout."""
    import json

    typer.echo(json.dumps(_plain(data), indent=2, allow_nan=False))


def _plain(data: object) -> object:
    """What JSON can say: dataclasses are objects, paths are strings, NaN and infinity are null."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return {field.name: _plain(getattr(data, field.name)) for field in dataclasses.fields(data)}
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return str(data) if isinstance(data, Path) else data


def to_toml(settings: Mapping[str, object], comments: Mapping[str, str]) -> str:
    """Settings as a config file that `bootcli distill --config` reads; what is None is a comment."""
    lines = [f"# {label}: {text}" for label, text in comments.items()]
    groups = {name: group for name, group in settings.items() if isinstance(group, Mapping)}
    lines += [_setting(name, value) for name, value in settings.items() if name not in groups]
    for name, group in groups.items():
        lines += ["", f"[{name}]", *(_setting(key, value) for key, value in group.items())]
    return "\n".join(lines)


def _setting(name: str, value: object) -> str:
    import json

    if value is None:
        return f"# {name} ="
    return f"{name} = {json.dumps(value, ensure_ascii=False)}"  # TOML writes these types as JSON does


def debugging() -> bool:
    """Whether errors show where in the code they come from."""
    return os.environ.get(DEBUG, "0") != "0"


def fail(error: Exception) -> NoReturn:
    """Say what went wrong on stderr and leave with its exit code."""
    report = _explain(error)
    with suppress(OSError):  # where nobody reads stderr any more, the exit code says it
        if debugging():
            import traceback

            traceback.print_exception(error)
        if not isinstance(error, Interrupted):
            typer.secho("Error: ", fg=typer.colors.RED, bold=True, nl=False, err=True, color=_color())
        typer.echo(report.message, err=True)
        if report.hint:
            typer.echo(report.hint, err=True)
    sys.exit(report.exit_code)


def _explain(error: Exception) -> BootError:
    if isinstance(error, BootError):
        return error
    if full := next((words for words in DISK_FULL if words in str(error)), None):  # also in what is no OSError
        name = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return BootError(f"{full}{name}.", "Free some space; a run with a checkpoint goes on with --resume.")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return BootError(f"{error.filename}: {error.strerror}.", "Choose a place that can be read and written.")
    if _is_out_of_memory(error):
        first, *_ = str(error).splitlines() or ["out of memory"]
        return BootError(
            f"The device has not enough memory: {first:.200}",
            "Take a smaller --batch-size; what a training takes, and what would make it smaller, says: "
            "bootcli distill --dry-run",
        )
    hint = "" if debugging() else "This should not happen. Please report it with the traceback of: bootcli --debug ..."
    return BootError(f"unexpected {type(error).__name__}: {error}", hint)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the machine; torch, which says so in words, is not imported for this."""
    words = ("out of memory", "DefaultCPUAllocator")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def _color() -> bool | None:
    """False where NO_COLOR asks for it; None leaves it to the terminal."""
    return False if os.environ.get("NO_COLOR") else None
