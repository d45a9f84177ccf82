"""The reference sampler of a teacher: DDIM with eta = 0, as a generator of states."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from bootcli.maths.broadcast import like
from bootcli.maths.schedule import Coefficients, Schedule
from bootcli.maths.signal_ode import Denoiser


def ddim_step(x_t: Tensor, f: Tensor, at_t: Coefficients, at_s: Coefficients) -> Tensor:
    """x_s = alpha_s * f + sigma_s * eps_hat with eps_hat = (x_t - alpha_t * f) / sigma_t (Song et al. 2021, eq. 12).

    The noise is the one that f implies *after* clipping, and alpha_t may be 0. Shapes (b, ...).
    """
    eps_hat = (x_t - like(at_t.alpha, x_t) * f) / like(at_t.sigma, x_t)
    return like(at_s.alpha, x_t) * f + like(at_s.sigma, x_t) * eps_hat


def ddim(denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor) -> Iterator[Tensor]:
    """States of DDIM along ``times``, one after each step.

    Args:
        denoiser: f(x_t, t) with its clipping inside.
        x: the state at ``times[0]``, shape (b, ...).
        times: falling times, shape (n + 1,), float64.

    Yields:
        n states of shape (b, ...); the last is the sample where ``times[-1]`` is 0.
    """
    for step in times.unfold(0, 2, 1):
        t, s = step.unsqueeze(1).expand(2, len(x))
        x = ddim_step(x, denoiser(x, t), schedule(t), schedule(s))
        yield x
