"""A LoRA student on the command line: trained, resumed, sampled and exported; one message where its base is another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import Cli
from .test_sd import FEW, tiny_sd

__all__ = ["tiny_sd"]


@pytest.mark.slow
def test_a_lora_from_its_training_to_its_export(cli: Cli, tiny_sd: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(tiny_sd, tmp_path / "teacher"))
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "prompts.txt").write_text("a red shoe\na green coat\n")
    flags = ["--teacher", "teacher", "--prompts", "prompts.txt", "--guidance-scale", "3", "--lora-rank", "4"]
    done = cli("distill", *flags, *FEW, "--learning-rate", "0.01", "--output", "run")
    assert done.returncode == 0, done.stderr
    assert "LoRA of rank 4" in done.stderr
    done = cli("distill", "--resume", "--output", "run", "--steps", "4")
    assert done.returncode == 0, done.stderr
    done = cli("sample", "run", "-n", "2")
    assert done.returncode == 0, done.stderr
    done = cli("export", "run", "--format", "lora", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["max_abs_difference"] < 1e-4
    assert weights.read_bytes() == before

    student = load_file(tmp_path / "run" / "student" / "student.safetensors")
    assert all(name.startswith(("lora.", "time_branch.")) for name in student)
    assert any(bool(tensor.any()) for name, tensor in student.items() if "lora_B" in name)
    another = load_file(weights)
    save_file(another | {"conv_in.bias": another["conv_in.bias"] + torch.full((1,), 1e-3)}, weights, {"format": "pt"})
    done = cli("sample", "run", "-n", "2")
    assert done.returncode == 1
    assert "LoRA on other weights" in " ".join(done.stderr.split())
