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

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, assert_never

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from bootcli.maths.broadcast import like
from bootcli.maths.schedule import Coefficients, Schedule

Solver = Literal["euler", "midpoint", "heun", "multistep", "unipc"]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""f(x_t, t): x_t of shape (b, ...), t of shape (b,), returns x_0 of shape (b, ...)."""
Known = tuple[Tensor, Tensor]
"""A time (b,), and f there, (b, ...)."""
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


def mean_weights(schedule: Schedule, t: Tensor, s: Tensor, nodes: Sequence[Tensor]) -> Tensor:
    """What the values of f at some times count in its mean over the step from t to s.

    With the inverse noise level ``u = alpha / sigma`` the Signal-ODE is ``d(u y) = f du``, so a step is exact with the
    mean of f under du; here that of the polynomial in t through the values. (DEIS, Zhang and Chen 2023, arXiv
    2204.13902, takes polynomials in t of the predicted noise.) The moments of t are taken by parts with 16
    Gauss-Legendre nodes, so that the end of a path needs no care: where sigma_s = 0 the mean is the value at s.

    Args:
        t, s: times, shape (b,), s < t.
        nodes: k different times, each (b,), in or before the step.

    Returns:
        weights, shape (k, b), float64; their sum over k is 1.
    """
    at_s = schedule(s)
    r, inner = step_ratio(schedule(t), at_s), schedule(torch.lerp(t, s, NODES[:, None]))
    ratio = step_ratio(inner, at_s)
    moments = [(1 - (j * WEIGHTS * NODES ** (j - 1)) @ ratio) / (1 - r) for j in range(1, len(nodes))]
    places = (torch.stack([*nodes]) - t) / (s - t)
    powers = torch.stack([places**j for j in range(len(nodes))])  # (power, node, b)
    weights: Tensor = torch.linalg.solve(powers.permute(2, 0, 1), torch.stack([torch.ones_like(r), *moments], 1))
    return weights.T


def solve_step(
    denoiser: Denoiser, schedule: Schedule, y_t: Tensor, eps: Tensor, t: Tensor, s: Tensor, solver: Solver
) -> Tensor:
    """One step of the Signal-ODE from t to s with the teacher's denoiser.

    ``euler`` (order 1, one evaluation) is DDIM. ``midpoint`` and ``heun`` (order 2, two evaluations) integrate exactly
    the f that is linear in t through its values at t and half-way, or at t and s (`mean_weights`); heun falls back to
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
        case "midpoint" | "multistep" | "unipc":  # one step has no earlier ones to learn from
            half_way = _half_way(denoiser, schedule, y_t, eps, f, t, s)
            f = _mean(schedule, t, s, [(t, f), half_way])
        case "heun":
            f_s = denoiser(from_signal(exact_step(y_t, f, r), eps, at_s), s)
            has_noise = like(at_s.sigma, y_t) > 0  # a selection: f_s may be NaN where it does not hold
            f = torch.where(has_noise, _mean(schedule, t, s, [(t, f), (s, f_s)]), f)
        case _:
            assert_never(solver)
    return exact_step(y_t, f, r)


def _half_way(
    denoiser: Denoiser, schedule: Schedule, y_t: Tensor, eps: Tensor, f: Tensor, t: Tensor, s: Tensor
) -> Known:
    """f half-way from t to s, after an euler step with f at t."""
    middle = (t + s) / 2
    at_middle = schedule(middle)
    y_middle = exact_step(y_t, f, step_ratio(schedule(t), at_middle))
    return middle, denoiser(from_signal(y_middle, eps, at_middle), middle)


def _mean(schedule: Schedule, t: Tensor, s: Tensor, known: Sequence[Known]) -> Tensor:
    """The mean over the step from t to s of the f that is polynomial in time through what is known of it."""
    times, (f, *others) = zip(*known, strict=True)
    mean: Tensor = f
    for weight, other in zip(mean_weights(schedule, t, s, times)[1:], others, strict=True):
        mean = mean + like(weight, f) * (other - f)  # differences: a constant f stays exactly that
    return mean


def follow(
    denoiser: Denoiser, schedule: Schedule, y: Tensor, eps: Tensor, times: Sequence[Tensor], solver: Solver
) -> Iterator[Tensor]:
    """The signal at each of the ``times`` but the first, where it is ``y``.

    ``multistep`` (order 2, one evaluation a step and one more) takes f to be linear through the starts of a step and of
    the one before; its first step is midpoint's. ``unipc`` (order 3) is UniPC of order 2 (Zhao et al. 2023, arXiv
    2302.04867) for this f, at the same cost: the evaluation at the end of a step, which the next one needs anyway,
    makes that line a parabola, and the step is taken again; all but the last one, whose end is not evaluated. Guidance
    makes f less smooth than a parabola needs.

    Args:
        denoiser: f(x_t, t).
        y: the signal at ``times[0]``, shape (b, ...).
        eps: the path's own noise, shape (b, ...).
        times: falling, each of shape (b,).
    """
    if solver in ("multistep", "unipc"):
        yield from _multistep(denoiser, schedule, y, eps, times, corrects=solver == "unipc")
        return
    for t, s in pairwise(times):
        y = solve_step(denoiser, schedule, y, eps, t, s, solver)
        yield y


def _multistep(
    denoiser: Denoiser, schedule: Schedule, y: Tensor, eps: Tensor, times: Sequence[Tensor], *, corrects: bool
) -> Iterator[Tensor]:
    """See `follow`."""

    def step(y: Tensor, t: Tensor, s: Tensor, known: Sequence[Known]) -> Tensor:
        return exact_step(y, _mean(schedule, t, s, known), step_ratio(schedule(t), schedule(s)))

    known: list[Known] = []
    before, y_before = times[0], y
    for t, s in pairwise(times):
        f = denoiser(from_signal(y, eps, schedule(t)), t)
        if known:
            if corrects:
                y = step(y_before, before, t, [(t, f), *known])
            yield y
            known = [(t, f), known[0]]
        else:
            known = [(t, f), _half_way(denoiser, schedule, y, eps, f, t, s)]
        before, y_before = t, y
        y = step(y, t, s, known)
    yield y


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
    """The end of `follow` after ``steps`` steps of equal length in t from t to s. Shapes as in `solve_step`."""
    times = [torch.lerp(t, s, i / steps) for i in range(steps + 1)]
    *_, y_s = follow(denoiser, schedule, y_t, eps, times, solver)
    return y_s
