"""BOOT: bootstrap along the Signal-ODE from pure noise (Gu et al. 2023, arXiv 2306.05544).

| code | paper | meaning |
|---|---|---|
| y_t, y_s | g_theta(eps, t), g_theta(eps, s) | the student at the noisier and the cleaner time, s = t - delta |
| target | | y_t moved along the Signal-ODE by the teacher; no gradient |
| R | | residual ``(target - y_s) / (1 - r)``: 0 exactly on the teacher's paths |

The gradient is at s and the known value at the noisier t: information flows from noise to data (upwind).
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from bootcli.config import BootConfig
from bootcli.deck import Pool
from bootcli.maths.broadcast import like
from bootcli.maths.signal_ode import solve, step_ratio
from bootcli.objectives.base import (
    Objective,
    PathDraw,
    Terms,
    adaptive,
    at_boundary,
    conditions,
    every,
    stratified,
    take_path,
)
from bootcli.student import Student
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView


class Boot(Objective[PathDraw]):
    """The BOOT objective.

    Args:
        config: delta, solver, weights.
        teacher: the denoiser f.
        t_min: target time of a sample.
        t_max: where the path starts; x at t_max is ``sigma * eps``.
    """

    def __init__(self, config: BootConfig, teacher: TeacherView, t_min: float, t_max: float) -> None:
        self.config = config
        self.teacher = teacher
        self.t_min = t_min
        self.t_max = t_max

    def draw(self, generator: torch.Generator, batch_size: int, pool: Pool, progress: float) -> PathDraw:
        """t in [t_min, t_max), stratified over the batch, and s = t - delta, or t_min where that is below it.

        Where t_min still has noise, a step shorter than delta would have 1 - r near 0 in the weight's denominator: t
        then starts at t_min + delta.
        """
        delta = self._delta(progress)
        clean = float(self.teacher.schedule(torch.tensor([self.t_min], dtype=torch.float64)).sigma) == 0
        eps = torch.randn(batch_size, *self.teacher.teacher.spec.sample_shape, generator=generator)
        low = self.t_min if clean else self.t_min + delta
        t = stratified(generator, batch_size, low, self.t_max, self.config.time_power)
        t = t.clamp(min=self.t_min + 1e-6)  # a step needs some length
        rows = conditions(generator, batch_size, pool, self.teacher.levels)
        return PathDraw(
            eps, rows, t, (t - delta).clamp(min=self.t_min), every(batch_size, self.config.boundary_every)
        )  # fmt: skip

    def take(self, draw: PathDraw, rows: slice, device: torch.device) -> PathDraw:
        """The rows of a draw, with the noise on a device."""
        return take_path(draw, rows, device)

    def loss(self, student: Student, draw: PathDraw, cond: Cond) -> Terms:
        """Bootstrap term plus beta times the boundary term.

        Args:
            student: y(eps, t, c), gradient at s and at t_max.
            draw: from `draw`, b samples; ``eps`` on the device of the networks.
            cond: conditions of the b samples.
        """
        eps, t, s, schedule = draw.eps, draw.t, draw.s, self.teacher.schedule
        with torch.no_grad():
            target = solve(
                lambda x, at: self.teacher.x0(x, at, cond), schedule, student(eps, t, cond), eps, t, s,
                self.config.solver, self.config.teacher_steps,
            )  # fmt: skip
        y_s, start_error = at_boundary(student, self.teacher, draw, cond, s, self.t_max, self.config.power)

        one_minus_r = 1 - step_ratio(schedule(t), schedule(s))
        square = (y_s - target).square().flatten(1).mean(1)
        gain = like(one_minus_r, square) ** -2
        residual = gain * square
        clock = like(self._weight(t, one_minus_r), residual)
        weight = clock * adaptive(clock * residual, self.config.power)
        bootstrap = (weight * residual).mean()
        boundary = self.config.beta * start_error
        parts = {"bootstrap": bootstrap.detach(), "boundary": boundary.detach()}
        pull = 2 * weight * gain * square.detach().sqrt()
        return Terms(bootstrap + boundary, parts, residual.detach(), t, pull)

    def _delta(self, progress: float) -> float:
        """The step at a moment of the training, in t: from ``delta`` to ``delta_end`` by equal factors."""
        first, last = self.config.delta, self.config.delta_end or self.config.delta
        return float(first * (last / first) ** min(1.0, progress) * (self.t_max - self.t_min))

    def _weight(self, t: Tensor, one_minus_r: Tensor) -> Tensor:
        """w_t, shape (b,), float64."""
        match self.config.weight:
            case "uniform" | "auto":  # auto is resolved where the teacher is known
                return torch.ones_like(t)
            case "velocity":
                delta = self._delta(1.0)
                # Held where steps are cut short at t_min: 1 / tau^2 is 1e12 at the smallest t.
                alpha, sigma = self.teacher.schedule(t.clamp(min=self.t_min + delta))
                return ((alpha + sigma) / sigma) ** 2
            case "target":
                return one_minus_r**2
            case _:
                assert_never(self.config.weight)
