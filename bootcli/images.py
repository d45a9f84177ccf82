"""Tensors in [-1, 1] to uint8 to PNG: the only place this happens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from bootcli.store.files import atomic_file

GRID = "grid.png"
"""The file that shows the others of a folder."""
GAP = 1
"""Pixels between its images."""


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], any shape, to uint8 by rounding (not truncation), as diffusers does."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """One uint8 image (1 or 3, h, w) as a picture."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def grid(images: Tensor, columns: int | None = None, gap: int = GAP) -> Tensor:
    """Tile uint8 images (n, c, h, w) row by row on white: (c, H, W)."""
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    return canvas


def enlarge(image: Tensor, factor: int) -> Tensor:
    """Repeat each pixel of (c, h, w), so that small images can be seen."""
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def is_grid(path: Path) -> bool:
    """Whether a file is a grid of images that `bootcli sample` drew, and no image itself."""
    if path.name != GRID:
        return False
    try:
        with Image.open(path) as image:
            facts = dict(image.info)
    except (OSError, ValueError):  # broken, which whoever reads it will say
        return False
    return str(facts.get("Software")).startswith("bootcli ") and "seed" not in facts


def save_png(image: Tensor, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write one uint8 image (c, h, w), atomically, with ``text`` as its metadata."""
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    with atomic_file(path) as temporary:
        to_pil(image).save(temporary, format="PNG", pnginfo=chunks)
