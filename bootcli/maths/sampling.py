"""Reference samplers of teachers as generators of states: DDIM with eta = 0, and EDM's Heun."""

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
    return like(at_s.alpha, x_t) * f + like(at_s.sigma, x_t) * _noise(at_t, x_t, f)


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


def heun(denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor) -> Iterator[Tensor]:
    """States of EDM's second-order sampler without churn (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    ``x / alpha`` moves along the noise ``eps_hat = (x - alpha f) / sigma`` in proportion to sigma / alpha; a step takes
    the mean of its noises at both ends, and one that ends in clean data that of its start. Two evaluations a step but
    one in the last. Arguments and states as `ddim`; needs alpha > 0 at every time.
    """
    for step in times.unfold(0, 2, 1):
        t, s = step.unsqueeze(1).expand(2, len(x))
        at_t, at_s = schedule(t), schedule(s)
        f = denoiser(x, t)
        there = ddim_step(x, f, at_t, at_s)
        if float(at_s.sigma[0]) > 0:
            f_there = denoiser(there, s)
            eps, eps_there = (_noise(at, state, end) for at, state, end in ((at_t, x, f), (at_s, there, f_there)))
            stretch = like(at_s.alpha / at_t.alpha, x)
            there = stretch * x + (like(at_s.sigma, x) - stretch * like(at_t.sigma, x)) * (eps + eps_there) / 2
        x = there
        yield x


def _noise(at: Coefficients, x: Tensor, f: Tensor) -> Tensor:
    return (x - like(at.alpha, x) * f) / like(at.sigma, x)
