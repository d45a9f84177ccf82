"""The data, drawn by formula: 8x8 grey glyphs of random place, size and angle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLASSES = ("dot", "ring", "bar", "cross")


def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """One glyph per label.

    Args:
        labels: shape (b,), indices of `CLASSES`.
        generator: of place, size and angle.

    Returns:
        Shape (b, 1, 8, 8) in [-1, 1]: light strokes on black.
    """
    place_x, place_y, size, angle = (v.reshape(-1, 1, 1) for v in torch.rand(4, len(labels), generator=generator))
    axis = torch.arange(8) - 3.5
    x, y = axis - (2 * place_x - 1), axis[:, None] - (2 * place_y - 1)  # centre within one pixel of the middle
    angle = angle * math.pi
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    radius, reach = (x**2 + y**2).sqrt(), 2 + size
    bar = torch.maximum(across.abs(), along.abs() - reach)
    bar_across = torch.maximum(along.abs(), across.abs() - reach)
    distance = torch.stack([(radius - size - 0.5).clamp(min=0), (radius - reach).abs(), bar, bar.minimum(bar_across)])
    picked = distance[labels, torch.arange(len(labels))]
    return torch.tanh(3 * (0.8 - picked))[:, None]
