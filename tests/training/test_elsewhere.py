"""Everything a run computes, on a device of its own: see `tests.elsewhere`."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from bootcli.critic import Critic
from bootcli.engine import Engine
from bootcli.plugin import Cond, Teacher
from bootcli.sampler import paired_errors, path_ends, student_images, teacher_images
from bootcli.teachers.registry import load
from tests.elsewhere import elsewhere
from tests.training.short import ADVERSARIES, EVERYTHING, build, config_of, every_objective, run


def test_what_would_fail_on_a_gpu_fails_elsewhere() -> None:
    with elsewhere() as device:
        there = torch.ones(3, device=device)
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="float64"):
            there.double()
        assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]
        assert there[torch.tensor([0, 2])].cpu().double().sum() == 2


@every_objective
def test_a_run_gives_elsewhere_what_it_gives_here(tiny_ddpm: Path, objective: str) -> None:
    """With critic, judge, refiner and replay; one update is warm-up, the other listens."""
    settings = {**EVERYTHING, "objective": objective, ADVERSARIES[objective]: 0.5, "optimizer.accumulation": 2}
    config = config_of(**settings | {"correction.warmup": 1}, steps=2, max_minutes=60.0)
    _, here = run(load(str(tiny_ddpm)).teacher, config)
    teacher = load(str(tiny_ddpm)).teacher
    mean, asked = Engine.mean, set()

    def watched(engine: Engine, value: torch.Tensor) -> torch.Tensor:
        asked.add(value.device)
        return mean(engine, value)

    with elsewhere() as device, mock.patch.object(Engine, "mean", watched):
        _, there = run(teacher, config)
    assert asked == {device}, "several GPUs can average nothing that is on the CPU"
    assert [report.loss for report in there] == pytest.approx([report.loss for report in here], rel=1e-5)


def test_a_guided_run_with_classes_works_elsewhere() -> None:
    settings = {**EVERYTHING, "objective": "kd", "kd.adversary": 0.5, "guidance_scale": 2.0}
    settings |= {"guidance.interval": (0.1, 0.9), "guidance.rescale": 0.5, "memory.offload_ema": True}
    teacher = load("fashion-edm").teacher
    with elsewhere():
        _, reports = run(teacher, config_of(**settings, classes=(1, 3), steps=2))
    assert len(reports) == 2


def test_images_are_drawn_elsewhere(tiny_teacher: Teacher) -> None:
    with elsewhere():
        work, _ = build(tiny_teacher, config_of())
        engine, student = Engine("cpu", "no"), work.student
        of = work.shown
        (drawn,) = student_images(student, of, range(2), 2, engine, starts=(0.5,))
        (reference,) = teacher_images(work.view, 2, of, range(2), 2, engine)
        ends = path_ends(work.view, work.t_max, 2, of, range(2), 2, engine)
        (errors,) = paired_errors(student, ends, of, range(2), engine)
    assert drawn.shape == reference.shape == (2, 1, 8, 8)
    assert errors.shape == (2,)


def test_networks_take_times_that_several_processes_moved(tiny_teacher: Teacher) -> None:
    """DistributedDataParallel brings what a call is given to the GPU, times too."""
    critic = Critic(tiny_teacher, config_of().correction)
    work, _ = build(tiny_teacher, config_of())
    eps, t = torch.randn(2, *tiny_teacher.spec.sample_shape), torch.full((2,), 0.5, dtype=torch.float64)
    expected = work.student(eps, t, Cond(), t).detach(), critic(eps, t, Cond()).detach()
    predict, told = tiny_teacher.predict, set()

    def watched(net: nn.Module, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        told.add(t.device)
        return predict(net, x_t, t, cond)

    with elsewhere(float64=True) as device, mock.patch.object(tiny_teacher, "predict", watched):
        for network in (work.student, critic):
            network.to(device)
        moved = t.to(device)
        found = work.student(eps.to(device), moved, Cond(), moved), critic(eps.to(device), moved, Cond())
        for each, one in zip(found, expected, strict=True):
            torch.testing.assert_close(each.detach().cpu(), one)
    assert told == {torch.device("cpu")}, "as the contract of teachers has it"
