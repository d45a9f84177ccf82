"""FreeFlow's prediction half: the Signal-ODE as a continuous residual (Tong et al. 2025, arXiv 2511.19428).

| code | paper | meaning |
|---|---|---|
| y | eps - F_theta(eps, delta) | the student at s, where the gradient is |
| f | | the teacher at the student's own point of the path, at s |
| drift | | dy / dlambda, from a finite difference towards the noisier t, or exact by forward-mode differentiation |
| R | | ``f - y + dy / dlambda``: 0 exactly on the teacher's paths |
| V | F's residual | R / tau with tau = sigma / (alpha + sigma): the residual of the average velocity |

A difference taken towards the cleaner side would be a downwind scheme, which diverges.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bootcli.config import FreeFlowConfig
from bootcli.deck import Pool
from bootcli.maths.broadcast import like
from bootcli.maths.schedule import Schedule
from bootcli.maths.signal_ode import from_signal, step_ratio
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

FIRST = 1e-3
"""Smallest time, as a share of the range: at sigma = 0 the teacher says nothing, and V is 0 / 0."""


class FreeFlow(Objective[PathDraw]):
    """FreeFlow's prediction objective.

    Args:
        config: step of the difference, kind of derivative, weights.
        teacher: the denoiser f.
        t_min: target time of a sample.
        t_max: where the path starts.
    """

    def __init__(self, config: FreeFlowConfig, teacher: TeacherView, t_min: float, t_max: float) -> None:
        self.config = config
        self.teacher = teacher
        self.t_min = t_min
        self.t_max = t_max

    def draw(self, generator: torch.Generator, batch_size: int, pool: Pool, progress: float) -> PathDraw:
        """s, stratified, and its noisier neighbour t = s + delta, or t_max where that is above.

        s ends half a delta below t_max, where the boundary term is: the difference is divided by the gap, and in half
        precision that of a smaller one is nothing but rounding.
        """
        span = self.t_max - self.t_min
        eps = torch.randn(batch_size, *self.teacher.teacher.spec.sample_shape, generator=generator)
        s = stratified(generator, batch_size, self.t_min, self.t_max)
        s = s.clamp(self.t_min + FIRST * span, self.t_max - self.config.delta / 2 * span)
        t = (s + self.config.delta * span).clamp(max=self.t_max)
        rows = conditions(generator, batch_size, pool, self.teacher.levels)
        return PathDraw(eps, rows, t, s, every(batch_size, self.config.boundary_every))

    def take(self, draw: PathDraw, rows: slice, device: torch.device) -> PathDraw:
        """The rows of a draw, with the noise on a device."""
        return take_path(draw, rows, device)

    def loss(self, student: Student, draw: PathDraw, cond: Cond) -> Terms:
        """Prediction term plus beta times the boundary term.

        Args:
            student: y(eps, t, c), gradient at s and at t_max.
            draw: from `draw`, b samples; ``eps`` on the device of the networks.
            cond: conditions of the b samples.
        """
        eps, s, schedule = draw.eps, draw.s, self.teacher.schedule
        y, start_error = at_boundary(student, self.teacher, draw, cond, s, self.t_max, self.config.power)
        known = y.detach()
        with torch.no_grad():
            drift = self._drift(student, draw, cond, known)
        f = self.teacher.x0(from_signal(known, eps, schedule(s)), s, cond)
        target = f + drift  # y + R

        square = (y - target).square().flatten(1).mean(1)
        clock = like(self._clock(s), square)
        weight = clock * adaptive(clock * square, self.config.power)
        prediction = (weight * square).mean()
        boundary = self.config.beta * start_error
        parts = {"prediction": prediction.detach(), "boundary": boundary.detach()}
        pull = 2 * weight * square.detach().sqrt()
        return Terms(prediction + boundary, parts, square.detach(), s, pull)

    def _clock(self, s: Tensor) -> Tensor:
        """(V / R)^2, or 1 where errors of y itself count, (b,), float64."""
        match self.config.weight:
            case "velocity":
                return tau_of(self.teacher.schedule, s) ** -2
            case "uniform":
                return torch.ones_like(s)
            case _:
                assert_never(self.config.weight)

    def _drift(self, student: Student, draw: PathDraw, cond: Cond, y: Tensor) -> Tensor:
        """dy / dlambda at s, where the student is y, shape (b, c, h, w)."""
        eps, t, s, schedule = draw.eps, draw.t, draw.s, self.teacher.schedule
        match self.config.derivative:
            case "difference":
                # One implicit step has y_s = f_s + r (y_t - f_s), hence y_s - f_s = r / (1 - r) * (y_t - y_s).
                r = step_ratio(schedule(t), schedule(s))
                drift: Tensor = like(r / (1 - r), eps) * (student(eps, t, cond) - y)
                return drift
            case "jvp":
                # The fused attention kernels have no forward mode, and autocast leaves tangents in another format.
                with sdpa_kernel(SDPBackend.MATH), torch.autocast(eps.device.type, enabled=False):
                    slope: Tensor = torch.func.jvp(lambda at: student(eps, at, cond), (s,), (torch.ones_like(s),))[1]
                return slope / like(lambda_slope(schedule, s), slope)
            case _:
                assert_never(self.config.derivative)


def tau_of(schedule: Schedule, t: Tensor) -> Tensor:
    """sigma / (alpha + sigma): the time of the straight path with the same noise-to-signal ratio, (b,), float64."""
    alpha, sigma = schedule(t)
    return sigma / (alpha + sigma)


def lambda_slope(schedule: Schedule, t: Tensor, h: float = 1e-5) -> Tensor:
    """d lambda / dt with lambda = log(sigma / alpha), (b,), float64, by a central difference; needs 0 < t < 1."""
    low, high = (t - h).clamp(min=t / 2), (t + h).clamp(max=1.0)
    at_low, at_high = schedule(low), schedule(high)
    return (torch.log(at_high.sigma / at_high.alpha) - torch.log(at_low.sigma / at_low.alpha)) / (high - low)
