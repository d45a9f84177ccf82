"""BOOT's Signal-ODE (Gu et al. 2023, arXiv 2306.05544, section 3.1): the path with its own noise removed.

| code | paper | meaning |
|---|---|---|
| y_t | y_t | (x_t - sigma_t * eps) / alpha_t, shape (b, ...); y_0 = x_0 |
| f | f(x_t, t) | the teacher's prediction of x_0, shape (b, ...) |
| r | | (sigma_s * alpha_t) / (alpha_s * sigma_t) = rho_s / rho_t in [0, 1], shape (b,) |

In continuous form ``dy / dlambda = y - f``. For a constant f the step from t to s < t is exactly
``y_s = f + r * (y_t - f)``, and this is the DDIM step (Song et al. 2021, equation 12 with eta = 0). Written with r
nothing blows up where alpha_t = 0 or sigma_s = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, assert_never

import torch
from torch import Tensor

from bootcli.maths.broadcast import like
from bootcli.maths.schedule import Coefficients, Schedule

Solver = Literal["euler", "midpoint", "heun", "multistep"]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""f(x_t, t): x_t of shape (b, ...), t of shape (b,), returns x_0 of shape (b, ...)."""


def to_signal(x_t: Tensor, eps: Tensor, at: Coefficients) -> Tensor:
    """y_t = (x_t - sigma_t * eps) / alpha_t; needs alpha_t > 0."""
    return (x_t - like(at.sigma, x_t) * eps) / like(at.alpha, x_t)


def from_signal(y_t: Tensor, eps: Tensor, at: Coefficients) -> Tensor:
    """x_t = alpha_t * y_t + sigma_t * eps."""
    return like(at.alpha, y_t) * y_t + like(at.sigma, y_t) * eps


def step_ratio(at_t: Coefficients, at_s: Coefficients) -> Tensor:
    """r = (sigma_s * alpha_t) / (alpha_s * sigma_t), shape (b,), float64. Needs sigma_t > 0 and alpha_s > 0."""
    return (at_s.sigma * at_t.alpha) / (at_s.alpha * at_t.sigma)


def exact_step(y_t: Tensor, f: Tensor, r: Tensor) -> Tensor:
    """y_s for a constant f: ``f + r * (y_t - f)``."""
    return f + like(r, y_t) * (y_t - f)


def solve_step(
    denoiser: Denoiser, schedule: Schedule, y_t: Tensor, eps: Tensor, t: Tensor, s: Tensor, solver: Solver
) -> Tensor:
    """One step of the Signal-ODE from t to s with the teacher's denoiser.

    ``euler`` (order 1, one evaluation) is DDIM. ``midpoint`` and ``heun`` (order 2, two evaluations) replace f by its
    value half-way in t, and by the mean of its values at both ends; heun falls back to euler where sigma_s = 0, as
    EDM's sampler does (Karras et al. 2022, algorithm 1).

    Args:
        denoiser: f(x_t, t).
        y_t: the signal at t, shape (b, ...).
        eps: the path's own noise, shape (b, ...).
        t, s: times, shape (b,), s < t.

    Returns:
        y_s, shape (b, ...).
    """
    at_t, at_s = schedule(t), schedule(s)
    r = step_ratio(at_t, at_s)
    f = denoiser(from_signal(y_t, eps, at_t), t)
    match solver:
        case "euler":
            pass
        case "midpoint" | "multistep":  # one step has no earlier ones to learn from
            middle = (t + s) / 2
            at_middle = schedule(middle)
            y_middle = exact_step(y_t, f, step_ratio(at_t, at_middle))
            f = denoiser(from_signal(y_middle, eps, at_middle), middle)
        case "heun":
            f_s = denoiser(from_signal(exact_step(y_t, f, r), eps, at_s), s)
            has_noise = like(at_s.sigma, y_t) > 0  # a selection: f_s may be NaN where it does not hold
            f = torch.where(has_noise, (f + f_s) / 2, f)
        case _:
            assert_never(solver)
    return exact_step(y_t, f, r)


def solve(
    denoiser: Denoiser,
    schedule: Schedule,
    y_t: Tensor,
    eps: Tensor,
    t: Tensor,
    s: Tensor,
    solver: Solver,
    steps: int,
) -> Tensor:
    """`solve_step` repeated: ``steps`` steps of equal length in t from t to s. Shapes as there.

    ``multistep`` (order 2, one evaluation a step and one more) has f half-way by extrapolation from the starts of this
    step and the one before, ``(3 f - f_before) / 2``; its first step is midpoint's.
    """
    starts = [torch.lerp(t, s, i / steps) for i in range(steps + 1)]
    if solver == "multistep":
        return _multistep(denoiser, schedule, y_t, eps, starts)
    for left, right in pairwise(starts):
        y_t = solve_step(denoiser, schedule, y_t, eps, left, right, solver)
    return y_t


def _multistep(denoiser: Denoiser, schedule: Schedule, y: Tensor, eps: Tensor, times: Sequence[Tensor]) -> Tensor:
    """Steps of equal length along ``times``; see `solve`."""
    before: Tensor | None = None
    for t, s in pairwise(times):
        at_t = schedule(t)
        f = denoiser(from_signal(y, eps, at_t), t)
        if before is None:
            middle = (t + s) / 2
            at_middle = schedule(middle)
            y_middle = exact_step(y, f, step_ratio(at_t, at_middle))
            half_way = denoiser(from_signal(y_middle, eps, at_middle), middle)
        else:
            half_way = (3 * f - before) / 2
        y = exact_step(y, half_way, step_ratio(at_t, schedule(s)))
        before = f
    return y
