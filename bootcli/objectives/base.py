"""What the trainer asks of an objective, and what the objectives along the path share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from bootcli.deck import Deck, Pool
from bootcli.engine import Engine
from bootcli.maths.broadcast import like
from bootcli.student import Student
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView


class Draw(Protocol):
    """The randomness of one batch. Every kind of draw has at least these."""

    @property
    def eps(self) -> Tensor:
        """Prior noise, (b, c, h, w)."""

    @property
    def rows(self) -> Tensor:
        """Index of each sample's condition in the pool, (b,), int64."""


D = TypeVar("D", bound=Draw)


@dataclass(frozen=True)
class Ends:
    """The ends of paths in a batch: what an adversary tells apart.

    Args:
        rows: which samples of the batch are ends, (k,), int64.
        samples: the student's, (k, c, h, w), with gradient.
        points: the teacher's from the same start, (k, c, h, w).
        count: k on average, for a batch of this size.
    """

    rows: Tensor
    samples: Tensor
    points: Tensor
    count: float


@dataclass(frozen=True)
class Terms:
    """The value of an objective on one batch.

    Args:
        loss: scalar, with gradient.
        parts: named detached scalars worth watching: the terms of the loss, unweighted beside the first two.
        residual: mean square of the residual per sample, shape (b,), detached; 0 on the teacher's own paths.
        t: the time of each residual, shape (b,).
        pull: root mean square of the gradient of each sample's loss at the student's output (times its number of
            values), shape (b,), detached: what a corrector and an adversary are balanced against.
        ends: of an objective that knows where the teacher's paths end.
    """

    loss: Tensor
    parts: Mapping[str, Tensor]
    residual: Tensor
    t: Tensor
    pull: Tensor
    ends: Ends | None = None


class Objective(ABC, Generic[D]):
    """A training objective: what makes the student predict the teacher's paths.

    ``draw`` makes all the randomness of one update, for the whole global batch, on the CPU; ``take`` gives a
    process and a micro-batch its rows, so the update does not depend on how the batch is split.
    """

    @abstractmethod
    def draw(self, generator: torch.Generator, batch_size: int, pool: Pool, progress: float) -> D:
        """Noise, conditions, times and whatever else one update needs.

        Args:
            generator: of this update.
            batch_size: number of samples.
            pool: what conditions are drawn from.
            progress: share of the training that is done, in [0, 1].
        """

    @abstractmethod
    def take(self, draw: D, rows: slice, device: torch.device) -> D:
        """The rows of a draw, with its samples on a device."""

    @abstractmethod
    def loss(self, student: Student, draw: D, cond: Cond) -> Terms:
        """The loss of those samples; pure: the same arguments give the same value."""

    def renew(
        self,
        generator: torch.Generator,
        batch_size: int,
        pool: Pool,
        step: int,
        engine: Engine,
        at_once: int | None = None,
    ) -> None:
        """Make what several updates share, before ``draw`` of update ``step`` (from 1); most share nothing.

        Args:
            generator: of this update.
            batch_size: samples that this part of the batch has.
            pool: the conditions to draw from.
            step: the update.
            engine: device, processes.
            at_once: samples that the teacher is asked for together; None: as many as that.
        """

    def take_back(self) -> None:
        """Be as before the last `renew`: the update that it was for came to nothing."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of that; the next `renew` may write to it."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state` gave. Raises `KeyError` where it does not fit."""

    def stand_in(self) -> dict[str, Tensor]:
        """A state that costs nothing to make, for a trial that nothing is learned from."""
        return {}


@dataclass(frozen=True)
class PathDraw:
    """One batch of an objective along the path; on the CPU until `take_path`.

    Args:
        eps: noise (b, c, h, w), float32.
        rows: conditions, (b,), int64.
        t, s: times t > s, (b,), float64.
        anchor: weight of each sample in the boundary term, (b,), of mean 1 over the global batch; most are 0.
    """

    eps: Tensor
    rows: Tensor
    t: Tensor
    s: Tensor
    anchor: Tensor


def take_path(draw: PathDraw, rows: slice, device: torch.device) -> PathDraw:
    """The rows of a draw, with the noise on a device."""
    return PathDraw(draw.eps[rows].to(device), draw.rows[rows], draw.t[rows], draw.s[rows], draw.anchor[rows])


def every(batch_size: int, n: int) -> Tensor:
    """Weights (b,) of mean 1 that are 0 but for every n-th sample."""
    chosen = (torch.arange(batch_size) % n == 0).float()
    return chosen / chosen.mean()


def at_boundary(
    student: Student, teacher: TeacherView, draw: PathDraw, cond: Cond, times: Tensor, t_max: float, power: float
) -> tuple[Tensor, Tensor]:
    """The student at ``times`` and at the start of the path, in one call.

    Args:
        student: called with gradient.
        teacher: the denoiser f.
        draw: b samples.
        cond: their conditions.
        times: (b,).
        t_max: where the path starts; see `TeacherView.start_of_path`.
        power: of the `adaptive` weight of each error.

    Returns:
        y at ``times``, (b, ...), and the boundary error ``||y(eps, t_max) - f||^2``: a scalar that averages, by the
        weights in ``draw.anchor``, over all samples.
    """
    anchors = draw.anchor.nonzero().flatten()
    start = draw.eps[anchors]
    t_start = torch.full((len(anchors),), t_max, dtype=torch.float64)
    f_start = start  # a small share of the batch may have no anchor
    if len(anchors):
        f_start = teacher.start_of_path(start, cond.rows(anchors), t_max)
    y = student(torch.cat([draw.eps, start]), torch.cat([times, t_start]), cond.then(cond.rows(anchors)))
    y_times, y_start = y.split([len(draw.eps), len(anchors)])
    square = (y_start - f_start).square().flatten(1).mean(1)
    error = adaptive(square, power) * square
    return y_times, (like(draw.anchor[anchors], error) * error).sum() / len(draw.eps)


def adaptive(square: Tensor, power: float) -> Tensor:
    """The weight ``1 / (square + c)^power`` of each sample, (b,), without gradient.

    power 0 is the plain squared error; 0.5 has the gradient of the pseudo-Huber loss with c^2 = 1e-4, with which every
    larger error pulls alike; 1 (FreeFlow, Tong et al. 2025, arXiv 2511.19428) gives every sample the same share of the
    loss, and those with small errors the greater pull. They are at little noise, where a student that draws y itself,
    and not the paper's average velocity, feels them 1 / tau times as much.

    Args:
        square: mean square of each sample's residual, (b,).
        power: k.
    """
    return (square.detach() + 1e-4) ** -power


def regression(
    samples: Tensor, points: Tensor, power: float, t: Tensor, name: str, rows: Tensor, count: float
) -> Terms:
    """The weighted squared error of samples to points of the teacher's paths.

    Args:
        samples, points: (b, c, h, w); samples with gradient.
        power: of the `adaptive` weight of each error.
        t: times of the terms, (b,).
        name: of the loss among the parts.
        rows, count: those that are ends, as in `Ends`.
    """
    square = (samples - points).square().flatten(1).mean(1)
    weight = adaptive(square, power)
    loss, square = (weight * square).mean(), square.detach()
    ends = Ends(rows, samples[rows], points[rows], count)
    return Terms(loss, {name: loss.detach()}, square, t, 2 * weight * square.sqrt(), ends)


def stratified(generator: torch.Generator, n: int, low: float, high: float, power: float = 1.0) -> Tensor:
    """n times in [low, high), one in each of n strata, in random order; float64 (n,).

    With power 1 they are uniform; above 1 they crowd towards ``low``.
    """
    strata = torch.randperm(n, generator=generator).double()
    jitter = torch.rand(n, generator=generator, dtype=torch.float64)
    return low + ((strata + jitter) / n) ** power * (high - low)


def conditions(generator: torch.Generator, n: int, pool: Pool, levels: int = 1) -> Tensor:
    """n indices into a pool of conditions, (n,), int64; above 1 level each carries one, as those of a `GuidedPool`."""
    rows = pool.take(n) if isinstance(pool, Deck) else torch.randint(pool, (n,), generator=generator)
    return rows if levels == 1 else rows * levels + torch.randint(levels, (n,), generator=generator)
