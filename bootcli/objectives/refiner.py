"""Few-step refinement: the student also learns to go on from its own sample, noised again.

With it one student samples in 1, 2 or more calls: draw, noise to a lower level, draw again from there (the multistep
sampling of consistency models, Song et al. 2023, arXiv 2303.01469, algorithm 1). Data-free: the samples that are noised
are the student's own, as in DMD2 (Yin et al. 2024, arXiv 2405.14867, section 4.5). Where the run has an adversary, it
judges the refined samples too: regression alone takes some variety away with each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bootcli.config import RefinerConfig
from bootcli.deck import Pool
from bootcli.maths.signal_ode import from_signal, solve
from bootcli.objectives.base import Terms, conditions, regression
from bootcli.student import Student
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView


@dataclass(frozen=True)
class RefinerDraw:
    """One batch; the noise is on the CPU until `Refiner.take`.

    Args:
        eps: prior noise, (b, c, h, w).
        rows: conditions, (b,), int64.
        start: times that the samples are noised to, (b,), float64.
        noise: what they are noised with, (b, c, h, w).
    """

    eps: Tensor
    rows: Tensor
    start: Tensor
    noise: Tensor


class Refiner:
    """Regression on the teacher's paths from the student's noised samples.

    Args:
        config: teacher steps.
        power: of the `adaptive` weight of each error.
        teacher: the denoiser f.
        t_min: target time of a sample.
        times: that samples are noised to.
    """

    def __init__(
        self, config: RefinerConfig, power: float, teacher: TeacherView, t_min: float, times: Sequence[float]
    ) -> None:
        self.config = config
        self.power = power
        self.teacher = teacher
        self.t_min = t_min
        self.times = torch.tensor(times, dtype=torch.float64)

    def draw(self, generator: torch.Generator, batch_size: int, pool: Pool) -> RefinerDraw:
        """Start times in turn."""
        shape = self.teacher.teacher.spec.sample_shape
        eps, noise = (torch.randn(batch_size, *shape, generator=generator) for _ in range(2))
        first = torch.randint(len(self.times), (1,), generator=generator)
        start = self.times[(first + torch.arange(batch_size)) % len(self.times)]
        rows = conditions(generator, batch_size, pool, self.teacher.levels)
        return RefinerDraw(eps, rows, start, noise)

    def take(self, draw: RefinerDraw, rows: slice, device: torch.device) -> RefinerDraw:
        """The rows of a draw, with the noise on a device."""
        return RefinerDraw(draw.eps[rows].to(device), draw.rows[rows], draw.start[rows], draw.noise[rows].to(device))

    def loss(self, student: Student, draw: RefinerDraw, cond: Cond) -> Terms:
        """The weighted squared error of the student, from its own noised sample, to the end of the teacher's path."""
        t_min = torch.full_like(draw.start, self.t_min)

        def denoiser(x: Tensor, at: Tensor) -> Tensor:
            return self.teacher.x0(x, at, cond)

        schedule, config = self.teacher.schedule, self.config
        with torch.no_grad():
            sample = student(draw.eps, t_min, cond)
            x = from_signal(sample, draw.noise, schedule(draw.start))
            # The Signal-ODE holds for any noise that is kept along the path: with this one it starts at the sample.
            end = solve(denoiser, schedule, sample, draw.noise, draw.start, t_min, config.solver, config.teacher_steps)
        y: Tensor = student(x, t_min, cond, draw.start)
        return regression(y, end, self.power, draw.start, "refinement", torch.arange(len(y)), len(y))
