"""Keeping a predicted x_0 inside the data's range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoThreshold:
    """Leave x_0 alone: latents have no range."""

    def __call__(self, x_0: Tensor) -> Tensor:
        """x_0 in range, shape (b, ...)."""
        return x_0


@dataclass(frozen=True)
class Clip:
    """Clamp x_0 to [-bound, bound], as diffusers' ``clip_sample``."""

    bound: float = 1.0

    def __call__(self, x_0: Tensor) -> Tensor:
        """x_0 in range, shape (b, ...)."""
        return x_0.clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class Dynamic:
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3).

    Per sample, s is the ``quantile`` of |x_0|, held between 1 and ``max_bound``; x_0 is clamped to [-s, s] and divided
    by s.
    """

    quantile: float = 0.995
    max_bound: float = 1.0

    def __call__(self, x_0: Tensor) -> Tensor:
        """x_0 in range, shape (b, ...)."""
        s = torch.quantile(x_0.flatten(1).abs().float(), self.quantile, dim=1)
        s = s.clamp(1.0, max(1.0, self.max_bound)).to(x_0.dtype).reshape(-1, *[1] * (x_0.ndim - 1))
        return torch.minimum(torch.maximum(x_0, -s), s) / s


Threshold = NoThreshold | Clip | Dynamic
