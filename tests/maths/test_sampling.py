"""EDM's Heun sampler: its algorithm, its order, its calls."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher
from bootcli.maths.sampling import ddim, heun
from bootcli.maths.schedule import CosineVP, Schedule, VarianceExploding


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def two_clusters(schedule: Schedule) -> GaussianMixtureTeacher:
    means = torch.stack([torch.full((1, 2, 2), -1.0), torch.full((1, 2, 2), 0.5)]).double()
    return GaussianMixtureTeacher(means, torch.tensor([0.3, 0.6]), torch.tensor([0.4, 0.6]), schedule)


def test_it_is_algorithm_1_of_the_paper() -> None:
    schedule = VarianceExploding()
    teacher, eps = two_clusters(schedule), noise(8, 1, 2, 2)
    levels = [float(sigma) for sigma in schedule(schedule.grid(18)).sigma]
    assert levels[0] == pytest.approx(80)
    assert levels[17] == pytest.approx(0.002)
    assert levels[18] == 0
    steps = zip(schedule.grid(18), schedule.grid(18)[1:], levels, levels[1:], strict=False)
    x = 80 * eps
    for t, s, sigma, below in steps:
        d = (x - teacher.denoise(x, t.expand(8))) / sigma
        euler = x + (below - sigma) * d
        if below:
            d = (d + (euler - teacher.denoise(euler, s.expand(8))) / below) / 2
        x = x + (below - sigma) * d
    *_, ours = heun(teacher.denoise, schedule, 80 * eps, schedule.grid(18))
    assert (ours - x).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_it_asks_twice_a_step_but_once_in_the_last(steps: int) -> None:
    schedule = VarianceExploding()
    teacher = two_clusters(schedule)
    calls: list[float] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        return teacher.denoise(x, t)

    states = list(heun(counted, schedule, 80 * noise(2, 1, 2, 2), schedule.grid(steps)))
    assert len(states) == steps
    assert len(calls) == 2 * steps - 1
    assert min(calls) > 0


@pytest.mark.parametrize("schedule", [VarianceExploding(), CosineVP()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2)])
def test_order_of_convergence(schedule: Schedule, sampler: object, order: int) -> None:
    """On a Gaussian the path is known: x / sqrt(alpha^2 s^2 + sigma^2) is constant."""
    std = 0.5
    teacher = GaussianTeacher(torch.zeros(1, 2, 2, dtype=torch.float64), std, schedule)
    ends = torch.tensor([0.9, 0.3], dtype=torch.float64)
    alpha, sigma = schedule(ends)
    spread = (alpha**2 * std**2 + sigma**2).sqrt()
    x = spread[0] * noise(4, 1, 2, 2)
    errors = []
    for steps in (20, 40, 80):
        *_, end = sampler(teacher.denoise, schedule, x, torch.linspace(0.9, 0.3, steps + 1, dtype=torch.float64))  # type: ignore[operator]
        errors.append(float((end - x * spread[1] / spread[0]).abs().max()))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.15)
