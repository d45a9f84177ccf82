"""What a running distillation tells whoever iterates it. Light: imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bootcli.watch import Score

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
class Encoded:
    """Text embeddings that the next updates need were made: ``done`` of ``total``."""

    done: int
    total: int


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
    """Mean squared error of the student's sample to the teacher's, in latents where it draws those."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class Comparing:
    """The teacher begins to draw images that students are compared with from then on."""

    num_images: int


@dataclass(frozen=True)
class Scored:
    """The student was measured.

    Args:
        score: what was found.
        is_kept: whether it is the best now (`bootcli.watch.Watch.best`).
    """

    score: Score
    is_kept: bool


@dataclass(frozen=True)
class Warned:
    """Something goes wrong; the run goes on."""

    step: int
    message: str


@dataclass(frozen=True)
class Finished:
    """The run is done; the student can be sampled.

    Args:
        run: the run folder.
        student: the artifact.
        steps: updates done.
        seconds: this call took.
        ended_by: "steps", "max_minutes" or "patience".
        best: the score of the student that was kept, where a distance was measured.
    """

    run: Path
    student: Path
    steps: int
    seconds: float
    ended_by: str
    best: Score | None


Event = Started | Encoded | Stepped | Previewed | Saved | Comparing | Scored | Warned | Finished
