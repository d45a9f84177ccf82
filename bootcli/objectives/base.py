"""What the trainer asks of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from bootcli.student import Student
from bootcli.teachers.protocol import Cond

D = TypeVar("D")


@dataclass(frozen=True)
class Terms:
    """The value of an objective on one batch.

    Args:
        loss: scalar, with gradient.
        parts: named detached scalars that add up to the loss.
        residual: mean square of the residual R per sample, shape (b,), detached; 0 on the teacher's own paths.
        t: the time of each residual, shape (b,).
    """

    loss: Tensor
    parts: Mapping[str, Tensor]
    residual: Tensor
    t: Tensor


class Objective(Protocol, Generic[D]):
    """A training objective.

    ``draw`` makes all the randomness of one update, for the whole global batch, on the CPU; ``take`` gives a
    process and a micro-batch its rows, so the update does not depend on how the batch is split.
    """

    def draw(self, generator: torch.Generator, batch_size: int) -> D:
        """Noise, times and whatever else one update needs, for ``batch_size`` samples."""

    def take(self, draw: D, rows: slice, device: torch.device) -> D:
        """The rows of a draw, with the noise on a device."""

    def loss(self, student: Student, draw: D, cond: Cond) -> Terms:
        """The loss of those samples; pure: the same arguments give the same value."""


def stratified(generator: torch.Generator, n: int, low: float, high: float) -> Tensor:
    """n times, each uniform in [low, high), one in each of n equal strata, in random order; float64 (n,)."""
    strata = torch.randperm(n, generator=generator).double()
    jitter = torch.rand(n, generator=generator, dtype=torch.float64)
    return low + (strata + jitter) / n * (high - low)
