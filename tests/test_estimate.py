"""The dry run: where the memory goes, what would make it smaller, and what is left to say where it runs out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_diffusers.scheduler import read_process
from bootcli_sd.single_file import CONFIGS
from bootcli_sd.teacher import SDTeacher
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from bootcli.cli import app
from bootcli.cli.common import _explain
from bootcli.cli.distill import _costs
from bootcli.config import DistillConfig, resolve
from bootcli.memory import Need, need_of
from bootcli.pipelines import estimate as pipeline
from bootcli.pipelines.estimate import dry_run
from bootcli.pipelines.settings import resolve_config
from bootcli.trainer import Trainer

GIB = 2**30


@pytest.fixture
def config(tiny_ddpm: Path) -> DistillConfig:
    settings = {"teacher": str(tiny_ddpm), "batch_size": 8, "device": "cpu", "mixed_precision": "no"}
    return resolve_config({**settings, "corrector": True}, {}, {})


def test_parts_are_told_and_add_up(config: DistillConfig) -> None:
    estimate = dry_run(dataclasses.replace(config, objective="boot"))
    assert estimate.ran
    assert estimate.config["optimizer"]["accumulation"] == 1  # type: ignore[index]
    needs = {name: value or 0 for name, value in estimate.needs.items()}
    assert needs["teacher"] == needs["companions"] > 0
    assert needs["student"] == needs["average"] == 4 * estimate.parameters > needs["teacher"]
    assert needs["gradients"] == needs["student"] + needs["companions"]
    assert needs["optimizer"] > needs["gradients"]
    assert sum(needs.values()) == pytest.approx(estimate.memory_bytes, rel=0.05)
    assert estimate.switches == ()
    told = _costs(estimate)["of that"]
    assert all(f"{name} " in told for name in ("teacher", "student", "gradients", "optimizer", "average", "other"))


def test_stored_paths_are_told_as_the_run_will_have_them(config: DistillConfig) -> None:
    """The dry run itself stores a batch."""
    estimate = dry_run(dataclasses.replace(config, objective="kd"))
    assert estimate.main_memory == {"stored paths": 16_384 * (2 * 8 * 8 * 4 + 8)}
    assert _costs(estimate)["on the CPU"].startswith("stored paths ")
    assert "on the CPU" not in _costs(dry_run(dataclasses.replace(config, objective="boot")))


def test_where_it_only_just_fits_switches_are_named(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    held = pipeline._held()
    monkeypatch.setattr(pipeline, "_capacity", lambda device: int(1.05 * held))
    estimate = dry_run(config)
    assert estimate.ran
    named = {each.setting: each.saves for each in estimate.switches}
    assert named["--set optimizer.gradient_checkpointing=true"] is None
    assert named["--set optimizer.accumulation=2"] == (estimate.needs["activations"] or 0) // 2
    assert "--set memory.offload_ema=true" not in named  # it is on the CPU already


@pytest.mark.parametrize("early", [False, True], ids=["in an update", "before"])
def test_where_memory_runs_out_the_computed_part_is_told(
    tiny_ddpm: Path, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Iterator[Any]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pipeline, "set_up", fails) if early else monkeypatch.setattr(Trainer, "run", fails)
    words = ["distill", "--teacher", str(tiny_ddpm), "--device", "cpu", "--batch-size", "4", "--dry-run", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exception is not None
    assert "ran out" in str(done.exception)
    told = json.loads(done.stdout)
    assert not told["ran"]
    assert told["needs"]["activations"] is told["seconds_per_step"] is None
    assert told["needs"]["student"] > 0
    assert told["memory_bytes"] == sum(value or 0 for value in told["needs"].values())
    assert {"setting": "--set optimizer.accumulation=2", "saves": None, "what": "half of the activations"} in told[
        "switches"
    ]


def test_a_run_that_runs_out_of_memory_says_where_to_look() -> None:
    told = _explain(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."))
    assert told.message.endswith("Tried to allocate 2.00 GiB.")
    assert "--dry-run" in told.hint


def test_other_failures_are_not_taken_for_memory(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Iterator[Any]:
        raise RuntimeError("broken")

    monkeypatch.setattr(Trainer, "run", fails)
    with pytest.raises(RuntimeError, match="broken"):
        dry_run(config)


def needs_of_sd15(**settings: object) -> Need:
    def part(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(next((CONFIGS / "sd1" / name).glob("*config.json")).read_text())
        return {key: value for key, value in found.items() if key != "_diffusers_version"}

    with torch.device("meta"):
        net = UNet2DConditionModel(**part("unet"))
    teacher = SDTeacher(net, read_process(part("scheduler")), part("vae"), Path(), {})
    config = resolve({"mixed_precision": "bf16", "corrector": False, "student.head": "native", **settings})
    return need_of(teacher, config, torch.device("cuda"))


def test_stable_diffusion_fits_where_it_is_meant_to() -> None:
    """Without activations, of the whole UNet's shapes: a LoRA leaves 12 GB of 16, a full run on 24 GB more than 11."""
    lora = needs_of_sd15(**{"student.lora_rank": 64, "memory.half_teacher": True})
    assert lora.teacher == pytest.approx(2 * 859.5e6, rel=1e-3)
    assert lora.student == pytest.approx(4 * 71.5e6, rel=0.05)
    assert lora.total < 4e9
    full = needs_of_sd15(**{"optimizer.name": "adamw8bit", "memory.half_teacher": True, "memory.offload_ema": True})
    assert full.optimizer == pytest.approx(2.03 * 862.9e6, rel=0.01)
    assert full.total < 13e9
    away = needs_of_sd15(**{"optimizer.name": "adamw8bit", "memory.offload_teacher": True, "memory.offload_ema": True})
    assert away.teacher == away.average == 0
    assert full.total - away.total == full.teacher
    plain = needs_of_sd15(**{"optimizer.name": "adamw"})
    assert plain.total > 18e9
