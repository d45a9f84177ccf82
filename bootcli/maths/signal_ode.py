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
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from bootcli.maths.broadcast import like
from bootcli.maths.schedule import Coefficients, Schedule

Solver = Literal["euler", "midpoint", "heun", "multistep"]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""f(x_t, t): x_t of shape (b, ...), t of shape (b,), returns x_0 of shape (b, ...)."""
NODES, WEIGHTS = ((torch.from_numpy(each) + shift) / 2 for each, shift in zip(leggauss(16), (1, 0), strict=True))
"""Gauss-Legendre on [0, 1], float64."""


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


def mean_time(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """The time at which an f that is linear in t has its mean over the step from t to s, shape (b,), float64.

    With the inverse noise level ``u = alpha / sigma`` the Signal-ODE is ``d(u y) = f du``, so a step is exact with the
    mean of f under du, and that time is ``(integral of tau du) / (u_s - u_t)``: half-way only for a small step. It is
    taken by parts with 16 Gauss-Legendre nodes, so that the end of a path needs no care (sigma_s = 0: it is s).

    Args:
        t, s: times, shape (b,), s < t.
    """
    at_s = schedule(s)
    r, inner = step_ratio(schedule(t), at_s), schedule(torch.lerp(t, s, NODES[:, None]))
    mean_r = WEIGHTS @ step_ratio(inner, at_s)
    return s + (s - t) * (r - mean_r) / (1 - r)


def solve_step(
    denoiser: Denoiser, schedule: Schedule, y_t: Tensor, eps: Tensor, t: Tensor, s: Tensor, solver: Solver
) -> Tensor:
    """One step of the Signal-ODE from t to s with the teacher's denoiser.

    ``euler`` (order 1, one evaluation) is DDIM. ``midpoint`` and ``heun`` (order 2, two evaluations) integrate exactly
    the f that is linear in t through its values at t and half-way, or at t and s (`mean_time`); heun falls back to
    euler where sigma_s = 0, as EDM's sampler does (Karras et al. 2022, algorithm 1).

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
            f = _mean(schedule, f, _half_way(denoiser, schedule, y_t, eps, f, t, s), t, (t + s) / 2, s)
        case "heun":
            f_s = denoiser(from_signal(exact_step(y_t, f, r), eps, at_s), s)
            has_noise = like(at_s.sigma, y_t) > 0  # a selection: f_s may be NaN where it does not hold
            f = torch.where(has_noise, _mean(schedule, f, f_s, t, s, s), f)
        case _:
            assert_never(solver)
    return exact_step(y_t, f, r)


def _half_way(
    denoiser: Denoiser, schedule: Schedule, y_t: Tensor, eps: Tensor, f: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """f half-way from t to s, after an euler step with f at t."""
    middle = (t + s) / 2
    at_middle = schedule(middle)
    y_middle = exact_step(y_t, f, step_ratio(schedule(t), at_middle))
    return denoiser(from_signal(y_middle, eps, at_middle), middle)


def _mean(schedule: Schedule, f: Tensor, f_other: Tensor, t: Tensor, other: Tensor, s: Tensor) -> Tensor:
    """The mean over the step from t to s of f, linear in time through its values at t and at another time."""
    share = (mean_time(schedule, t, s) - t) / (other - t)
    return f + like(share, f) * (f_other - f)


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

    ``multistep`` (order 2, one evaluation a step and one more) takes f to be linear through the starts of this step and
    of the one before; its first step is midpoint's.
    """
    starts = [torch.lerp(t, s, i / steps) for i in range(steps + 1)]
    if solver == "multistep":
        return _multistep(denoiser, schedule, y_t, eps, starts)
    for left, right in pairwise(starts):
        y_t = solve_step(denoiser, schedule, y_t, eps, left, right, solver)
    return y_t


def _multistep(denoiser: Denoiser, schedule: Schedule, y: Tensor, eps: Tensor, times: Sequence[Tensor]) -> Tensor:
    """Steps along ``times``; see `solve`."""
    before: tuple[Tensor, Tensor] | None = None
    for t, s in pairwise(times):
        at_t = schedule(t)
        f = denoiser(from_signal(y, eps, at_t), t)
        other, f_other = before or ((t + s) / 2, _half_way(denoiser, schedule, y, eps, f, t, s))
        y = exact_step(y, _mean(schedule, f, f_other, t, other, s), step_ratio(at_t, schedule(s)))
        before = t, f
    return y
