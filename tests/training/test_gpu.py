"""A run on a GPU, where there is one; without, see `tests.training.test_elsewhere`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bootcli.teachers.registry import load
from tests.training.short import ADVERSARIES, EVERYTHING, build, config_of, every_objective, run

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


def everything(objective: str) -> dict[str, object]:
    """Critic, judge, refiner and replay; they are heard after an update."""
    return {**EVERYTHING, "objective": objective, ADVERSARIES[objective]: 0.5, "correction.warmup": 1, "steps": 3}


@every_objective
@pytest.mark.parametrize(("precision", "rel"), [("no", 5e-3), ("bf16", 5e-2), ("fp16", 5e-2)])
def test_a_run_gives_on_a_gpu_what_it_gives_here(tiny_ddpm: Path, objective: str, precision: str, rel: float) -> None:
    """Convolutions of a GPU multiply in TF32 even where no half precision is asked for."""
    settings = everything(objective)
    _, here = run(load(str(tiny_ddpm)).teacher, config_of(**settings))
    config = config_of(**settings, device=DEVICE, mixed_precision=precision)
    trainer, there = run(load(str(tiny_ddpm)).teacher, config)
    assert next(trainer.work.student.parameters()).device.type == DEVICE
    assert [report.loss for report in there] == pytest.approx([report.loss for report in here], rel=rel)


@pytest.mark.slow
@every_objective
def test_a_compiled_run_gives_what_another_does(tiny_ddpm: Path, objective: str) -> None:
    settings = everything(objective) | {"device": DEVICE}
    _, plain = run(load(str(tiny_ddpm)).teacher, config_of(**settings))
    _, compiled = run(load(str(tiny_ddpm)).teacher, config_of(**settings, **{"optimizer.compile": True}))
    assert [report.loss for report in compiled] == pytest.approx([report.loss for report in plain], rel=5e-3)


def test_a_batch_that_does_not_fit_is_split() -> None:
    settings = {"batch_size": 1024, "objective": "kd", "kd.adversary": 0.5, "steps": 1, "device": DEVICE}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run(load("fashion").teacher, config_of(**settings, **{"optimizer.accumulation": 1}))
    whole, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * whole / total)
    try:
        _, trainer = build(load("fashion").teacher, config_of(**settings))
        found = trainer.config.optimizer.accumulation
        (report,) = trainer.run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert found is not None
    assert found > 1
    assert report.images == 1024
