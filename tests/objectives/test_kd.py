"""Direct distillation: where its targets come from, and what its buffer holds."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher
from bootcli.config import PathsConfig
from bootcli.engine import Engine
from bootcli.maths.schedule import CosineVP, DiscreteVP, vp_table
from bootcli.objectives.kd import FIRST_BATCHES, KD, KDDraw
from bootcli.sampler import teacher_endpoint
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView
from tests.objectives.closed import DDPM, MEAN, Exact


def objective(
    teacher: GaussianMixtureTeacher | None = None, pool: Cond | None = None, power: float = 0.0, **config: Any
) -> KD:
    teacher = teacher or GaussianTeacher(MEAN, 0.5, DDPM)
    paths = PathsConfig(**{"solver": "unipc", "buffer": 1024} | config)
    return KD(paths, power, TeacherView(teacher), 0.0, 0.8, pool or Cond())


def renewed(kd: KD, steps: int, batch_size: int = 8, first: int = 1) -> KD:
    for step in range(first, first + steps):
        kd.renew(torch.Generator().manual_seed(step), batch_size, len(kd.pool), step, Engine("cpu", "no"))
    return kd


def draw(kd: KD, n: int = 64) -> KDDraw:
    return kd.draw(torch.Generator().manual_seed(0), n, 1, 0.0)


@pytest.mark.parametrize("points", [1, 4])
def test_targets_are_points_of_the_exact_paths(points: int) -> None:
    """The error falls with the square of the number of steps, or faster; times and points belong together."""
    errors = []
    for steps in (32, 64, 128):
        kd = renewed(objective(teacher_steps=steps, points=points), 1)
        batch = draw(kd)
        assert sorted(set(batch.t.tolist())) == pytest.approx([0.8 * (k / points) ** 1.5 for k in range(points)])
        errors.append(kd.loss(Exact(GaussianTeacher(MEAN, 0.5, DDPM), 0.8), batch, Cond()).residual.mean().sqrt())  # type: ignore[arg-type]
    assert errors[0] < 0.02
    assert errors[0] / errors[1] > 2.5
    assert errors[1] / errors[2] > 2.5


@pytest.mark.parametrize(("power", "times"), [(1.0, [0.8, 0.6, 0.4, 0.2]), (2.0, [0.8, 0.45, 0.2, 0.05])])
def test_steps_are_shorter_towards_the_data(power: float, times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps ask four times, and at the start and half-way through the first step; points cost nothing more."""
    view, asked = TeacherView(GaussianTeacher(MEAN, 0.5, DDPM)), []
    denoise = view.denoise

    def listening(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        asked.append(float(t[0]))
        return denoise(x, t, cond)

    monkeypatch.setattr(view, "denoise", listening)
    paths = PathsConfig(teacher_steps=4, solver="unipc", points=2, step_power=power, reuse=1, buffer=8)
    kd = KD(paths, 0.0, view, 0.0, 0.8, Cond())
    kd.renew(torch.Generator(), 1, 1, 1, Engine("cpu", "no"), at_once=100)
    assert asked == pytest.approx([0.8, times[0], (times[0] + times[1]) / 2, *times[1:]])


def test_a_path_from_noise_alone_ends_where_the_flow_leads() -> None:
    """A schedule that keeps some signal at t = 1, as Stable Diffusion's: samplers begin with x = eps all the same."""
    schedule, mean, std = vp_table(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()), 2.0, 0.5
    teacher = GaussianTeacher(torch.full((1, 2, 2), mean), std, schedule)
    alpha, sigma = (float(each) for each in schedule(torch.ones(1, dtype=torch.float64)))
    ends = {}
    for start in ("noise", "estimate"):
        view = TeacherView(teacher, path_start=start)
        kd = renewed(KD(PathsConfig(teacher_steps=200, solver="multistep", buffer=128), 0.0, view, 0.0, 1.0, Cond()), 1)
        batch = draw(kd)
        ends[start] = batch.points
        begun = {"noise": batch.eps, "estimate": sigma * batch.eps + alpha * view.start_of_path(batch.eps, Cond(), 1.0)}
        expected = mean + std * (begun[start] - alpha * mean) / (alpha**2 * std**2 + sigma**2) ** 0.5
        torch.testing.assert_close(batch.points, expected, rtol=0, atol=2e-3)
        again = teacher_endpoint(view, batch.eps, Cond(), 1.0, 1000)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-2)
    assert float((ends["estimate"] - ends["noise"]).mean()) == pytest.approx(alpha * mean * std, rel=0.1)


def test_where_no_signal_is_left_both_ways_to_begin_are_one() -> None:
    """A table of zero terminal SNR, whose last angle is pi / 2 as computers have it."""
    zero = DiscreteVP((0.9, 0.5, 0.1, 0.0))
    teacher = GaussianTeacher(torch.full((1, 2, 2), 2.0), 0.5, zero, "v")
    eps = torch.randn(3, 1, 2, 2)
    for start in ("noise", "estimate"):
        y = TeacherView(teacher, path_start=start).start_of_path(eps, Cond(), 1.0)
        torch.testing.assert_close(y, torch.full_like(y, 2.0))


@pytest.mark.parametrize(("power", "expected"), [(0.0, 0.25), (0.5, 0.5), (1.0, 1.0)])
def test_loss_is_the_weighted_error_and_pull_its_gradient(power: float, expected: float) -> None:
    teacher = GaussianTeacher(MEAN, 0.0, DDPM)
    kd = renewed(objective(teacher, power=power), 1)
    student = Exact(teacher, 0.8, shift=0.5)
    terms = kd.loss(student, draw(kd), Cond())  # type: ignore[arg-type]
    assert terms.loss.item() == pytest.approx(expected, rel=1e-3)
    (gradient,) = torch.autograd.grad(terms.loss, student.shift)
    assert float(gradient) == pytest.approx(float(terms.pull.mean()), rel=1e-4)


def test_each_path_is_drawn_as_often_as_stated() -> None:
    """In the long run a buffer of n paths gets batch_size new ones in ``reuse`` updates, which draw reuse batches."""
    kd = renewed(objective(buffer=64, reuse=4, teacher_steps=1), 1)
    seen: dict[bytes, int] = {}
    for step in range(2, 402):
        renewed(kd, 1, first=step)
        for eps in kd.draw(torch.Generator().manual_seed(step), 8, 1, 0.0).eps:
            key = eps.numpy().tobytes()
            seen[key] = seen.get(key, 0) + 1
    settled = list(seen.values())[100:-100]
    assert sum(settled) / len(settled) == pytest.approx(4.0, rel=0.1)  # a path that is never drawn is not counted


def test_buffer_grows_fast_at_first_and_is_bounded() -> None:
    kd = objective(buffer=200, reuse=2, teacher_steps=1)
    sizes = []
    for step in range(1, 60):
        sizes.append(len(renewed(kd, 1, first=step).state()["eps"]))
    fast = [8 * step for step in range(1, FIRST_BATCHES + 1)]
    assert sizes[: len(fast)] == fast
    assert sizes[len(fast) : len(fast) + 4] == [128, 136, 136, 144]
    assert {len(kd.state()[name]) for name in ("eps", "rows", "points")} == {200}
    small = renewed(objective(buffer=5, teacher_steps=1, reuse=1), 3)
    assert len(small.state()["eps"]) == 5


@pytest.mark.parametrize(("batch_size", "processes"), [(8, 2), (3, 2), (1, 2), (7, 3)])
def test_processes_share_the_paths_that_one_would_follow(batch_size: int, processes: int) -> None:
    alone = renewed(objective(), 1, batch_size).state()["points"]
    parts: list[torch.Tensor] = []
    for rank in range(processes):
        engine = SimpleNamespace(
            rank=rank, num_processes=processes, device="cpu", autocast=nullcontext,
            gather=lambda part: parts.append(part) or torch.cat([part] * processes),
        )  # fmt: skip
        kd = objective()
        kd.renew(torch.Generator().manual_seed(1), batch_size, len(kd.pool), 1, engine)  # type: ignore[arg-type]
    assert {len(part) for part in parts} == {math.ceil(batch_size / processes)}, "equal, as gathering needs"
    torch.testing.assert_close(torch.cat(parts)[:batch_size], alone)


def test_newest_paths_stay() -> None:
    kd = renewed(objective(buffer=16, reuse=1, teacher_steps=1), 3)
    old = kd.state()["eps"].clone()
    renewed(kd, 1, first=4)
    kept = [any(torch.equal(a, b) for b in kd.state()["eps"]) for a in old]
    assert sum(kept) == 8
    renewed(kd, 1, first=5)
    assert not any(any(torch.equal(a, b) for b in kd.state()["eps"]) for a in old)


@pytest.mark.parametrize("points", [1, 4])
def test_ends_are_what_an_adversary_may_see(points: int) -> None:
    """Every batch has its share of them, with the samples that were regressed."""
    kd = renewed(objective(teacher_steps=4, points=points), 1)
    batch = draw(kd, 16)
    student = Exact(GaussianTeacher(MEAN, 0.5, DDPM), 0.8)
    ends = kd.loss(student, batch, Cond()).ends  # type: ignore[arg-type]
    assert ends is not None
    assert len(ends.rows) == ends.count == 16 / points
    assert not batch.t[ends.rows].any()
    assert torch.equal(ends.points, batch.points[ends.rows])
    assert torch.equal(ends.samples, student(batch.eps, batch.t, Cond())[ends.rows])


def test_state_round_trip() -> None:
    kd = renewed(objective(buffer=32, reuse=1, teacher_steps=1), 5)
    other = objective(buffer=32, reuse=1, teacher_steps=1)
    other.load_state({name: tensor.clone() for name, tensor in kd.state().items()})
    for each in (kd, other):
        renewed(each, 1, first=6)
    assert torch.equal(draw(kd).points, draw(other).points)
    assert torch.equal(draw(kd).eps, draw(other).eps)


@pytest.mark.parametrize("updates", [0, 1, 3, 6])
def test_what_came_to_nothing_is_taken_back(updates: int) -> None:
    """Of an empty buffer, one with room, one that is half full of room, and a full one."""
    kd = renewed(objective(buffer=140, reuse=1, teacher_steps=1), updates)
    before = {name: tensor.clone() for name, tensor in kd.state().items()}
    renewed(kd, 1, first=updates + 1)
    assert any(not torch.equal(tensor, kd.state()[name]) for name, tensor in before.items())
    kd.take_back()
    after = kd.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    kd.take_back()  # once is enough
    assert kd.state().keys() == before.keys()
    again, straight = (renewed(each, 2, first=updates + 1) for each in (kd, renewed(objective(
        buffer=140, reuse=1, teacher_steps=1), updates)))  # fmt: skip
    assert all(torch.equal(tensor, straight.state()[name]) for name, tensor in again.state().items())


def test_a_buffer_of_another_size_is_refused() -> None:
    kd = renewed(objective(buffer=32, reuse=1, teacher_steps=1), 5)
    with pytest.raises(RuntimeError, match="size"):
        objective(buffer=16, reuse=1, teacher_steps=1).load_state(kd.state())


def test_conditions_stay_with_their_paths() -> None:
    """Two classes, each a point: a path of class k ends on mean k."""
    means = torch.stack([MEAN, -MEAN])
    teacher = GaussianMixtureTeacher(means, torch.zeros(2), torch.ones(2), CosineVP(), conditioning="class")
    kd = renewed(objective(teacher, teacher.condition([0, 1])), 1)
    batch = draw(kd)
    assert set(batch.rows.tolist()) == {0, 1}
    assert torch.allclose(batch.points, means[batch.rows], atol=1e-5)
