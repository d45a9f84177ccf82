"""The closed-form teachers against an independent statement of the same denoiser."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher
from bootcli.errors import UsageError
from bootcli.maths.prediction import PredictionType, to_x0
from bootcli.maths.schedule import CosineVP, LinearPath, Schedule, VarianceExploding, vp_table
from bootcli.teachers.protocol import Cond

SCHEDULES = [LinearPath(), CosineVP(), vp_table(torch.linspace(1e-4, 0.02, 1000)), VarianceExploding()]
MEANS = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
STDS = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
X = torch.randn(4, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tweedie(x_t: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor = WEIGHTS) -> Tensor:
    """E[x_0 | x_t] = (x_t + sigma^2 * grad log p(x_t)) / alpha, with the density from torch.distributions."""
    x_t = x_t.clone().requires_grad_(True)
    spread = (alpha**2 * STDS**2 + sigma**2).sqrt().reshape(3, 1, 1, 1).expand(MEANS.shape)
    density = MixtureSameFamily(Categorical(weights), Independent(Normal(alpha * MEANS, spread), 3))
    (score,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    return (x_t.detach() + sigma**2 * score) / alpha


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_denoiser_is_tweedies_formula(schedule: Schedule, t: float) -> None:
    teacher, times = GaussianMixtureTeacher(MEANS, STDS, WEIGHTS, schedule), torch.full((4,), t, dtype=torch.float64)
    alpha, sigma = (v[0] for v in schedule(times))
    assert (teacher.denoise(X * sigma, times) - tweedie(X * sigma, alpha, sigma)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_prediction_says_the_same_x0(kind: PredictionType) -> None:
    teacher = GaussianMixtureTeacher(MEANS, STDS, WEIGHTS, CosineVP(), kind)
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    raw = teacher.predict(teacher.net, X, t, Cond())
    assert (to_x0(kind, raw, X, CosineVP()(t)) - teacher.denoise(X, t)).abs().max() < 1e-12


def test_label_picks_the_component() -> None:
    teacher = GaussianMixtureTeacher(MEANS, STDS, WEIGHTS, CosineVP(), "x0", "class")
    t = torch.full((4,), 0.6, dtype=torch.float64)
    predicted = teacher.predict(teacher.net, X, t, teacher.condition([2, 0, None, 1]))
    alone = [GaussianTeacher(MEANS[i], float(STDS[i]), CosineVP()).denoise(X, t) for i in range(3)]
    expected = torch.stack([alone[2][0], alone[0][1], teacher.denoise(X, t)[2], alone[1][3]])
    assert (predicted - expected).abs().max() < 1e-12
    with pytest.raises(UsageError, match="not a class"):
        teacher.condition([3])


def test_point_mass_is_predicted_exactly_in_float32() -> None:
    point = GaussianTeacher(MEANS[0].float(), 0.0, LinearPath())
    predicted = point.predict(point.net, X.float(), torch.rand(4).double().clamp(min=0.01), Cond())
    assert torch.equal(predicted, MEANS[0].float().expand(4, -1, -1, -1))
