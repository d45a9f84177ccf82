"""Tensors to pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bootcli.images import enlarge, grid, save_png, to_uint8


def test_rounding_is_that_of_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    x = torch.linspace(-1.2, 1.2, 3 * 64 * 64).reshape(1, 3, 64, 64)
    theirs = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(x)))
    assert np.array_equal(np.asarray(theirs[0]), to_uint8(x)[0].permute(1, 2, 0).numpy())


def test_uint8_covers_the_range_and_clamps() -> None:
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.tensor([1.0], dtype=torch.bfloat16)).tolist() == [255]


def test_every_level_survives_the_round_trip() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1).long(), levels)


def test_grid_goes_row_by_row_on_white() -> None:
    images = torch.stack([torch.full((1, 2, 3), i, dtype=torch.uint8) for i in range(3)])
    tiled = grid(images, columns=2)
    assert tiled.shape == (1, 2 * 3 + 1, 2 * 4 + 1)
    assert (tiled[0, 1:3, 1:4] == 0).all()
    assert (tiled[0, 1:3, 5:8] == 1).all()
    assert (tiled[0, 4:6, 1:4] == 2).all()
    assert (tiled[0, 4:6, 5:8] == 255).all(), "the free place"
    assert (tiled[0, 3] == 255).all(), "the gap"
    assert grid(images[:1]).shape == (1, 4, 5)


def test_enlarge_repeats_pixels() -> None:
    assert enlarge(torch.tensor([[[1, 2]]]), 2).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2]]]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_round_trip_with_text(tmp_path: Path, channels: int, mode: str) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    path = tmp_path / "new" / "a.png"
    save_png(image, path, {"seed": "7"})
    with Image.open(path) as opened:
        assert opened.mode == mode
        assert opened.info["seed"] == "7"
        pixels = torch.from_numpy(np.array(opened)).reshape(5, 7, channels).permute(2, 0, 1)
    assert torch.equal(pixels, image)
    assert list(path.parent.iterdir()) == [path]
