"""Prediction types: definitions, round trips, and the ends of the path."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from bootcli.maths.prediction import PredictionType, from_x0, to_x0
from bootcli.maths.schedule import Coefficients, CosineVP, LinearPath, Schedule, VarianceExploding, vp_table

SCHEDULES = [LinearPath(), CosineVP(), vp_table(torch.linspace(1e-4, 0.02, 1000)), VarianceExploding()]
every_kind = pytest.mark.parametrize("kind", get_args(PredictionType))


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(7, 2, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    return x_0, eps


def mix(x_0: Tensor, eps: Tensor, at: Coefficients) -> Tensor:
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in at)
    return alpha * x_0 + sigma * eps


@every_kind
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_round_trip(kind: PredictionType, schedule: Schedule) -> None:
    x_0, eps = draw()
    at = schedule(torch.linspace(0.2, 0.8, 7, dtype=torch.float64))
    x_t = mix(x_0, eps, at)
    error = (to_x0(kind, from_x0(kind, x_0, x_t, at), x_t, at) - x_0).abs().max()
    assert error < 1e-12
    prediction = draw(1)[0]
    assert (from_x0(kind, to_x0(kind, prediction, x_t, at), x_t, at) - prediction).abs().max() < 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_definitions(schedule: Schedule) -> None:
    x_0, eps = draw()
    at = schedule(torch.linspace(0.2, 0.8, 7, dtype=torch.float64))
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in at)
    native = {"eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0, "flow": eps - x_0}
    for kind in get_args(PredictionType):
        assert (to_x0(kind, native[kind], mix(x_0, eps, at), at) - x_0).abs().max() < 1e-12


def test_flow_is_the_velocity_of_the_linear_path() -> None:
    x_0, eps = draw()
    t, h = torch.linspace(0.2, 0.8, 7, dtype=torch.float64), 1e-3
    velocity = (mix(x_0, eps, LinearPath()(t + h)) - mix(x_0, eps, LinearPath()(t - h))) / (2 * h)
    at = LinearPath()(t)
    assert (from_x0("flow", x_0, mix(x_0, eps, at), at) - velocity).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
def test_pure_noise_is_legal_but_for_eps(kind: PredictionType) -> None:
    x_0, eps = draw()
    at = LinearPath()(torch.ones(7, dtype=torch.float64))
    assert torch.equal(to_x0(kind, from_x0(kind, x_0, eps, at), eps, at).round(decimals=12), x_0.round(decimals=12))
    assert not to_x0("eps", eps * 0.99, eps, at).isfinite().all()


@every_kind
def test_result_has_the_dtype_of_the_sample(kind: PredictionType) -> None:
    x_t = torch.ones(1, 1, 2, 2)
    at = CosineVP()(torch.tensor([0.5]))
    assert to_x0(kind, x_t.bfloat16(), x_t, at).dtype == torch.float32
