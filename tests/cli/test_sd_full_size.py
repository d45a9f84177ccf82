"""Stable Diffusion 1.5 at its full size, 860 million parameters of the network alone, here random ones."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_sd.single_file import CONFIGS, tokenizer
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests import original_names

from .conftest import Cli

SD1 = CONFIGS / "sd1"


def random_weights(make: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Of a network that is never built, in half precision: small ones, and ones for scales of norms."""
    with torch.device("meta"):
        network: nn.Module = make()
    weights = {}
    for name, tensor in network.state_dict().items():
        scale = name.endswith("weight") and tensor.ndim == 1
        value = torch.ones(tensor.shape) if scale else 0.02 * torch.randn(tensor.shape, generator=generator)
        weights[name] = value.half() if tensor.is_floating_point() else torch.arange(tensor.numel()).view(tensor.shape)
    return weights


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder in diffusers' layout, and a single file of the same weights."""
    folder = tmp_path_factory.mktemp("full") / "sd15"
    shutil.copytree(SD1, folder)
    generator = torch.Generator().manual_seed(0)
    text = json.loads((SD1 / "text_encoder" / "config.json").read_text())
    parts = {
        "unet": (lambda: UNet2DConditionModel.from_config(str(SD1 / "unet")), "diffusion_pytorch_model"),
        "vae": (lambda: AutoencoderKL.from_config(str(SD1 / "vae")), "diffusion_pytorch_model"),
        "text_encoder": (lambda: CLIPTextModel(CLIPTextConfig(**text)), "model"),
    }
    weights = {name: random_weights(make, generator) for name, (make, _) in parts.items()}
    for name, (_, stem) in parts.items():
        save_file(weights[name], folder / name / f"{stem}.safetensors", {"format": "pt"})
    tokenizer("<|endoftext|>").save_pretrained(folder / "tokenizer")
    file = folder.with_suffix(".safetensors")
    save_file(original_names.single_file(*weights.values()), file)
    return folder, file


@pytest.mark.slow
def test_two_lora_steps_in_20_gb(cli: Cli, full_size: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = full_size
    for teacher in (folder, file):
        facts = json.loads(cli("teachers", str(teacher), "--json").stdout)
        assert 859e6 < facts["parameters"] < 860e6
    (tmp_path / "prompts.txt").write_text("a red fox in snow\na blue house\n")
    small = ["--prompts", "prompts.txt", "--resolution", "64", "--lora-rank", "8", "--batch-size", "2"]
    one = ["--set", "kd.teacher_steps=2", "--set", "preview_teacher_steps=1", "--set", "watch.every=0"]
    told = cli("distill", "--teacher", str(folder), *small, *one, "--dry-run", "--json", timeout=1800)
    assert told.returncode == 0, told.stderr
    done = cli("distill", "--teacher", str(folder), *small, *one, "--steps", "2", "--output", "run", timeout=1800)
    assert done.returncode == 0, done.stderr
    student = tmp_path / "run" / "student" / "student.safetensors"
    assert student.stat().st_size < 100e6
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 20e6  # kilobytes
