"""Thresholds, guidance and broadcasting."""

import pytest
import torch
from diffusers import DDPMScheduler

from bootcli.maths.broadcast import like
from bootcli.maths.guidance import guide
from bootcli.maths.threshold import Clip, Dynamic, NoThreshold


@pytest.fixture
def x_0() -> torch.Tensor:
    scale = torch.tensor([0.2, 1.0, 3.0]).reshape(-1, 1, 1, 1)
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize(("quantile", "bound"), [(0.995, 1.0), (0.9, 1.5), (0.5, 100.0)])
def test_dynamic_is_the_one_of_diffusers(x_0: torch.Tensor, quantile: float, bound: float) -> None:
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=bound)
    assert torch.equal(Dynamic(quantile, bound)(x_0), scheduler._threshold_sample(x_0))


def test_dynamic_leaves_samples_in_range_alone(x_0: torch.Tensor) -> None:
    small = x_0[:1] / x_0[:1].abs().max()
    assert torch.equal(Dynamic(max_bound=10.0)(small), small)


def test_clip_and_none(x_0: torch.Tensor) -> None:
    assert Clip()(x_0).abs().max() == 1
    assert Clip(2.5)(x_0).abs().max() == 2.5
    assert NoThreshold()(x_0) is x_0


def test_guidance_extrapolates() -> None:
    conditional, unconditional = torch.tensor([2.0]), torch.tensor([1.0])
    assert guide(conditional, unconditional, 1.0).item() == 2.0
    assert guide(conditional, unconditional, 0.0).item() == 1.0
    assert guide(conditional, unconditional, 7.5).item() == 8.5


def test_like_lines_up_a_vector_with_a_batch() -> None:
    v = torch.tensor([1.0, 2.0], dtype=torch.float64)
    scaled = like(v, torch.ones(2, 3, 4, 4)) * torch.ones(2, 3, 4, 4)
    assert scaled.dtype == torch.float32
    assert scaled[:, 0, 0, 0].tolist() == [1.0, 2.0]
    assert like(torch.tensor(3.0), torch.ones(2, 3)).shape == (1, 1)
