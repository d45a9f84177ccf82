"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), and its rescaling (Lin et al. 2024, arXiv
2305.08891, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from bootcli.maths.broadcast import like


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """``g = unconditional + w * (conditional - unconditional)``; w = 1 is no guidance.

    Args:
        conditional, unconditional: predictions, shape (b, ...).
        guidance_scale: w, the same for all or (b,).
        rescale: phi of ``phi * g * std(conditional) / std(g) + (1 - phi) * g``, standard deviations within each
            sample: a large w otherwise makes samples too bright.

    Returns:
        Shape (b, ...), in single precision or better.
    """
    full = torch.promote_types(conditional.dtype, torch.float32)  # whatever the network computes in
    conditional, unconditional = conditional.to(full), unconditional.to(full)
    if isinstance(guidance_scale, Tensor):
        guidance_scale = like(guidance_scale, conditional)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    spread, own = (prediction.flatten(1).std(1) for prediction in (conditional, guided))
    return guided * like(rescale * spread / own + (1 - rescale), guided)
