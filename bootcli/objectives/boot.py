"""BOOT: bootstrap along the Signal-ODE from pure noise (Gu et al. 2023, arXiv 2306.05544).

| code | paper | meaning |
|---|---|---|
| y_t, y_s | g_theta(eps, t), g_theta(eps, s) | the student at the noisier and the cleaner time, s = t - delta |
| target | | y_t moved one teacher step along the Signal-ODE; no gradient |
| R | | residual ``(target - y_s) / (1 - r)``: 0 exactly on the teacher's paths |

The gradient is at s and the known value at the noisier t: information flows from noise to data (upwind).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from bootcli.config import BootConfig
from bootcli.maths.broadcast import like
from bootcli.maths.signal_ode import solve_step, step_ratio
from bootcli.objectives.base import Terms, stratified
from bootcli.student import Student
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView


@dataclass(frozen=True)
class BootDraw:
    """One batch; on the CPU until `Boot.take`.

    Args:
        eps: noise (b, c, h, w), float32.
        t, s: times t > s, (b,), float64.
        anchor: weight of each sample in the boundary term, (b,), of mean 1 over the global batch; most are 0.
    """

    eps: Tensor
    t: Tensor
    s: Tensor
    anchor: Tensor


class Boot:
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

    def draw(self, generator: torch.Generator, batch_size: int) -> BootDraw:
        """t uniform in [t_min, t_max), stratified over the batch, and s = t - delta, or t_min where that is below it.

        Where t_min still has noise, a step shorter than delta would have 1 - r near 0 in the weight's denominator: t
        then starts at t_min + delta.
        """
        delta = self.config.delta * (self.t_max - self.t_min)
        clean = float(self.teacher.schedule(torch.tensor([self.t_min], dtype=torch.float64)).sigma) == 0
        eps = torch.randn(batch_size, *self.teacher.teacher.spec.sample_shape, generator=generator)
        t = stratified(generator, batch_size, self.t_min if clean else self.t_min + delta, self.t_max)
        t = t.clamp(min=self.t_min + 1e-6)  # a step needs some length
        anchor = (torch.arange(batch_size) % self.config.boundary_every == 0).float()
        return BootDraw(eps, t, (t - delta).clamp(min=self.t_min), anchor / anchor.mean())

    def take(self, draw: BootDraw, rows: slice, device: torch.device) -> BootDraw:
        """The rows of a draw, with the noise on a device."""
        return BootDraw(draw.eps[rows].to(device), draw.t[rows], draw.s[rows], draw.anchor[rows])

    def loss(self, student: Student, draw: BootDraw, cond: Cond) -> Terms:
        """Bootstrap term plus beta times the boundary term.

        Args:
            student: y(eps, t, c), gradient at s and at t_max.
            draw: from `draw`, b samples; ``eps`` on the device of the networks.
            cond: conditions of the b samples.
        """
        eps, t, s, schedule = draw.eps, draw.t, draw.s, self.teacher.schedule
        with torch.no_grad():
            target = solve_step(
                lambda x, at: self.teacher.x0(x, at, cond), schedule, student(eps, t, cond), eps, t, s,
                self.config.solver,
            )  # fmt: skip
            anchors = draw.anchor.nonzero().flatten()
            start = eps[anchors]
            t_max = torch.full((len(anchors),), self.t_max, dtype=torch.float64)
            f_start = start  # a small share of the batch may have no anchor
            if len(anchors):
                f_start = self.teacher.x0(like(schedule(t_max).sigma, start) * start, t_max, cond.rows(anchors))
        # One call of the student for both terms.
        y = student(torch.cat([eps, start]), torch.cat([s, t_max]), cond.then(cond.rows(anchors)))
        y_s, y_start = y.split([len(eps), len(anchors)])

        one_minus_r = 1 - step_ratio(schedule(t), schedule(s))
        square = (y_s - target).square().flatten(1).mean(1)
        residual = square / like(one_minus_r, square) ** 2
        bootstrap = (like(self._weight(t, one_minus_r), residual) * residual).mean()
        start_error = (y_start - f_start).square().flatten(1).mean(1)
        boundary = self.config.beta * (like(draw.anchor[anchors], start_error) * start_error).sum() / len(eps)
        parts = {"bootstrap": bootstrap.detach(), "boundary": boundary.detach()}
        return Terms(bootstrap + boundary, parts, residual.detach(), t)

    def _weight(self, t: Tensor, one_minus_r: Tensor) -> Tensor:
        """w_t, shape (b,), float64."""
        match self.config.weight:
            case "uniform" | "auto":  # auto is resolved where the teacher is known
                return torch.ones_like(t)
            case "velocity":
                delta = self.config.delta * (self.t_max - self.t_min)
                # Held where steps are cut short at t_min: 1 / tau^2 is 1e12 at the smallest t.
                alpha, sigma = self.teacher.schedule(t.clamp(min=self.t_min + delta))
                return ((alpha + sigma) / sigma) ** 2
            case "target":
                return one_minus_r**2
            case _:
                assert_never(self.config.weight)
