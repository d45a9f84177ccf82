"""A feature space of five pixels, a teacher that has it, and a folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bootcli.evaluate import Statistics
from bootcli.images import save_png
from bootcli.plugin import FeatureSpace, Teacher

CPU = torch.device("cpu")
DIM = 5


class Corners(nn.Module):
    """A feature network: five pixels of the image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :DIM]


def gaussian(seed: int, d: int = 6, images: int = 100, scale: float = 1.0) -> Statistics:
    """Statistics of correlated features; fewer images than d + 1 make the covariance singular."""
    rng = np.random.default_rng(seed)
    features = (rng.normal(size=(images, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)) * scale
    return Statistics(features.mean(0), np.cov(features, rowvar=False), images)


@pytest.fixture
def own_space() -> FeatureSpace:
    features = 127 + 30 * torch.randn(40, DIM, generator=torch.Generator().manual_seed(5))
    return FeatureSpace(
        "corners-5", Corners(), torch.full((DIM,), 127.0), 900 * torch.eye(DIM), 1000, "made up", {10: 0.5}, features
    )


@pytest.fixture
def teacher(tiny_teacher: Teacher, own_space: FeatureSpace, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """The tiny teacher with a feature space of its own."""
    monkeypatch.setattr(tiny_teacher, "feature_space", lambda: own_space)
    return tiny_teacher


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Tensor]:
    """A folder of 12 grey 8x8 PNG files, two of them a level deeper, and their pixels in the order of their paths."""
    pixels = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    for i, image in enumerate(pixels):
        save_png(image, tmp_path / "pictures" / ("more" if i >= 10 else "") / f"{'z' if i >= 10 else 'a'}{i:02d}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("not an image")
    return tmp_path / "pictures", pixels
