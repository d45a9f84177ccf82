"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """``unconditional + w * (conditional - unconditional)``; w = 1 is no guidance. Shapes (b, ...)."""
    return unconditional + guidance_scale * (conditional - unconditional)
