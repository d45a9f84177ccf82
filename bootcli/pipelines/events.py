"""What a running distillation tells whoever iterates it. Light: imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bootcli.trainer import StepReport


@dataclass(frozen=True)
class Started:
    """The run folder exists and holds its configuration; step ``first_step`` comes next.

    Args:
        run: the run folder.
        facts: what to tell the user, label to value ("teacher", "objective", "device", "parameters", ...).
        first_step: updates already done (0, or where a resumed run stood).
        steps: updates in all.
    """

    run: Path
    facts: Mapping[str, str]
    first_step: int
    steps: int


@dataclass(frozen=True)
class Stepped:
    """One update is done."""

    report: StepReport


@dataclass(frozen=True)
class Previewed:
    """A picture was written: the teacher above the student, same noise."""

    step: int
    path: Path
    paired_error: float
    """Mean squared error of the student's sample to the teacher's, in [-1, 1] units."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The run is done; the student can be sampled."""

    run: Path
    student: Path
    steps: int
    seconds: float


Event = Started | Stepped | Previewed | Saved | Finished
