"""Shared fixtures: tiny DDPM folders, the teacher in one, and runs distilled from them."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch: the tests run in parallel, and so many small networks are fastest on one thread each.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from bootcli.plugin import Teacher


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("BOOTCLI_DEBUG", raising=False)


@pytest.fixture(scope="session")
def tiny_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: UNet2DModel on 8x8 grey images, linear betas, eps; random weights."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("teachers") / "tiny-ddpm"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_teacher(tiny_ddpm: Path) -> Teacher:
    """The teacher of `tiny_ddpm`, loaded anew, since a run moves and freezes it."""
    from bootcli.teachers.registry import load

    return load(str(tiny_ddpm)).teacher


@pytest.fixture(scope="session")
def tiny_run(tiny_ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three updates on `tiny_ddpm`."""
    from bootcli.pipelines.distill import distill
    from bootcli.pipelines.settings import resolve_config

    settings = {"teacher": str(tiny_ddpm), "steps": 3, "batch_size": 8, "device": "cpu", "preview_teacher_steps": 4}
    run = tmp_path_factory.mktemp("runs") / "tiny"
    for _ in distill(resolve_config(settings, {}, {}), run):
        pass
    return run


@pytest.fixture(scope="session")
def class_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates on a tiny class-conditional teacher with classes 0 to 3, of which it has 1 and 3."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from bootcli.pipelines.distill import distill
    from bootcli.pipelines.settings import resolve_config

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=4, **blocks
    )
    root = tmp_path_factory.mktemp("classes")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(root / "teacher")
    settings = {"teacher": str(root / "teacher"), "steps": 2, "batch_size": 4, "device": "cpu", "classes": (1, 3)}
    list(distill(resolve_config({**settings, "preview_teacher_steps": 2}, {}, {}), root / "run"))
    return root / "run"


@pytest.fixture
def class_teacher(class_run: Path) -> Teacher:
    """The teacher of `class_run`, loaded anew."""
    from bootcli.teachers.registry import load

    return load(str(class_run.parent / "teacher")).teacher
