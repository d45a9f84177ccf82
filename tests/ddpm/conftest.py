"""Tiny diffusers folders, made by diffusers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """``make_folder(unet={...}, scheduler={...}, flat=False, kind=DDPMScheduler, weights="safetensors")``."""

    def make(
        unet: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        *,
        flat: bool = False,
        kind: type = DDPMScheduler,
        weights: str = "safetensors",
    ) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / "teacher"
        net = UNet2DModel(**(TINY | (unet or {})))
        net.save_pretrained(folder if flat else folder / "unet", safe_serialization=weights == "safetensors")
        kind(**(scheduler or {})).save_pretrained(folder if flat else folder / "scheduler")
        if not flat:
            (folder / "model_index.json").write_text(
                '{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"],'
                f' "scheduler": ["diffusers", "{kind.__name__}"]}}'
            )
        return folder

    return make
