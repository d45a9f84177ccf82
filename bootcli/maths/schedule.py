"""Noise schedules: t in [0, 1] to the coefficients of ``x_t = alpha_t * x_0 + sigma_t * eps``, in float64 on the CPU.

| code | paper | meaning |
|---|---|---|
| t | t | 1 is noise, 0 is data |
| alpha, sigma | alpha_t, sigma_t | signal and noise scale |
| rho | sigma_t / alpha_t | noise-to-signal ratio, ``lambda = log rho`` (BOOT's negative half log-SNR) |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """alpha_t and sigma_t, each of the shape of t, float64, on the CPU."""

    alpha: Tensor
    sigma: Tensor


class Schedule(ABC):
    """A forward process. Stateless; equality by value."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at times ``t`` (any shape, values in [0, 1])."""

    def grid(self, steps: int) -> Tensor:
        """Times of the reference sampler, noise first: shape (steps + 1,), from 1 down to 0, uniform in t.

        For a discrete table this is diffusers' ``timestep_spacing="trailing"``.
        """
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    @property
    def prior_scale(self) -> float:
        """Standard deviation of the noise a sampler starts from: 1, or sigma_max where the variance explodes."""
        return 1.0

    def terminal_snr(self) -> float:
        """(alpha / sigma)^2 at t = 1; 0.0 for a schedule that ends in pure noise."""
        alpha, sigma = self(torch.ones(1, dtype=torch.float64))
        return float((alpha / sigma) ** 2)

    def time_of(self, ratio: float) -> float:
        """The largest t with ``sigma_t / alpha_t <= ratio`` (1.0 if that holds everywhere): that of a noise level.

        By bisection, as the ratio rises with t. An eps prediction is turned into x_0 with this factor, so it is also
        how much the conversion amplifies the network's error.
        """
        low, high = 0.0, 1.0
        if self._within(high, ratio):
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._within(middle, ratio) else (low, middle)
        return low

    def _within(self, t: float, ratio: float) -> bool:
        alpha, sigma = self(torch.tensor(t, dtype=torch.float64))
        return bool(sigma <= ratio * alpha)


@dataclass(frozen=True)
class LinearPath(Schedule):
    """The straight path of flow matching: alpha = 1 - t, sigma = t (Lipman et al. 2023, arXiv 2210.02747)."""

    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at times ``t``; see `Schedule`."""
        t = t.double().cpu()
        return Coefficients(1 - t, t)


@dataclass(frozen=True)
class CosineVP(Schedule):
    """Variance preserving with alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol and Dhariwal 2021, offset 0)."""

    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at times ``t``; see `Schedule`."""
        return _on_circle(t.double().cpu() * (math.pi / 2))


@dataclass(frozen=True)
class DiscreteVP(Schedule):
    """A table of N cumulative products, made continuous by interpolating the angle ``atan2(sigma, alpha)``.

    Table entry i stands at t = (i + 1) / N; t = 0 is clean data (angle 0). The angle is finite and monotone even
    where alpha = 0, where log-SNR is not. At the table's own times the coefficients are the table's, exactly.

    Args:
        alphas_cumprod: alpha_t^2 for timestep 0 to N - 1, falling.
    """

    alphas_cumprod: tuple[float, ...]

    @property
    def num_timesteps(self) -> int:
        """N, the length of the table."""
        return len(self.alphas_cumprod)

    @cached_property
    def _angles(self) -> Tensor:
        squared = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        angles = torch.atan2((1 - squared).clamp(min=0).sqrt(), squared.sqrt())
        return torch.cat([torch.zeros(1, dtype=torch.float64), angles])

    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at times ``t``; see `Schedule`."""
        position = (t.double().cpu() * self.num_timesteps).clamp(0, self.num_timesteps)
        left = position.floor().clamp(max=self.num_timesteps - 1)
        index = left.long()
        return _on_circle(torch.lerp(self._angles[index], self._angles[index + 1], position - left))

    def timestep(self, t: Tensor) -> Tensor:
        """The native timestep of each t as a float tensor in [0, N - 1]: ``t * N - 1``."""
        return (t.double().cpu() * self.num_timesteps - 1).clamp(min=0)

    def grid(self, steps: int) -> Tensor:
        """Trailing spacing on table entries: ``round(arange(N, 0, -N / steps)) / N``, then 0 (Lin et al. 2024)."""
        n = self.num_timesteps
        stride = (n - n / steps) - n  # rounded as numpy's arange rounds it, so that ties fall as in diffusers
        entries = n + torch.arange(steps, dtype=torch.float64) * stride
        return torch.cat([entries.round() / n, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class VarianceExploding(Schedule):
    """EDM's noise levels: alpha = 1, sigma from sigma_max to sigma_min along rho-spaced powers, then 0 at t = 0.

    Karras et al. 2022 (arXiv 2206.00364), equation 5, with continuous t in place of the index. The grid of the
    reference sampler is always that; times between may be spaced otherwise.

    Args:
        sigma_min, sigma_max: the levels at the ends.
        rho: of equation 5.
        log: t is uniform in log sigma instead.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    log: bool = False

    @property
    def prior_scale(self) -> float:
        """sigma_max."""
        return self.sigma_max

    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at times ``t``; see `Schedule`."""
        t = t.double().cpu()
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** t if self.log else self._power(t)
        sigma = torch.where(t > 0, sigma, torch.zeros_like(t))
        return Coefficients(torch.ones_like(sigma), sigma)

    def _power(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma: Tensor = (low + t * (high - low)) ** self.rho
        return sigma

    def grid(self, steps: int) -> Tensor:
        """sigma_max to sigma_min in ``steps`` levels, then clean data: t = 1, ..., 1e-12, 0 where rho spaces t."""
        levels = torch.linspace(1, 0, steps, dtype=torch.float64)
        if self.log:
            levels = (self._power(levels) / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)
        return torch.cat([levels.clamp(1e-12, 1), torch.zeros(1, dtype=torch.float64)])


def _on_circle(angle: Tensor) -> Coefficients:
    """Cosine and sine; at a right angle alpha is 0, which a rounded pi / 2 would leave at 6e-17."""
    return Coefficients(torch.cos(angle).masked_fill(angle >= math.pi / 2, 0.0), torch.sin(angle))


def vp_table(betas: Tensor) -> DiscreteVP:
    """The table of a DDPM from its betas, shape (N,): alphas_cumprod = cumprod(1 - beta) (Ho et al. 2020)."""
    return DiscreteVP(tuple(torch.cumprod(1 - betas.double(), 0).tolist()))
