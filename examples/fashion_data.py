"""Fashion-MNIST at 16x16: the data behind the `fashion` teacher and its feature network.

The files are the four original idx archives (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747), as the Debian package
`dataset-fashion-mnist` installs them.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_DATA = Path("/usr/share/datasets/fashion-mnist")
RESOLUTION = 16
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

Split = Literal["train", "t10k"]


def read_idx(path: Path) -> Tensor:
    """Read a gzipped idx file of unsigned bytes into a uint8 tensor of the shape its header declares."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    ndim = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy())


def downsample(images: Tensor) -> Tensor:
    """Resample uint8 (n, 28, 28) images to uint8 (n, 1, 16, 16), antialiased, rounded to the nearest level."""
    resized = F.interpolate(
        images[:, None].float(), size=(RESOLUTION, RESOLUTION), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.round().clamp(0, 255).to(torch.uint8)


def load_fashion(folder: Path = DEFAULT_DATA, split: Split = "train") -> tuple[Tensor, Tensor]:
    """Load one split: uint8 images (n, 1, 16, 16) in 0..255 and int64 labels (n,); n is 60,000 or 10,000."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return downsample(images), labels.long()


def to_unit(images: Tensor) -> Tensor:
    """Map uint8 levels 0..255 to float32 in [-1, 1], the range the diffusion model works in."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to the nearest uint8 level; values outside the range are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
