"""Guidance, against diffusers and against itself one sample at a time."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from bootcli.maths.guidance import guide

CONDITIONAL, UNCONDITIONAL = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
W = torch.tensor([1.0, 2.5, 7.3])


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_it_is_that_of_diffusers(phi: float) -> None:
    guided = UNCONDITIONAL + 7.5 * (CONDITIONAL - UNCONDITIONAL)
    theirs = rescale_noise_cfg(guided, CONDITIONAL, guidance_rescale=phi)
    torch.testing.assert_close(guide(CONDITIONAL, UNCONDITIONAL, 7.5, phi), theirs)


def test_rescaled_in_full_it_spreads_as_the_conditional_prediction() -> None:
    guided = guide(CONDITIONAL, UNCONDITIONAL, W, 1.0)
    torch.testing.assert_close(guided.flatten(1).std(1), CONDITIONAL.flatten(1).std(1))


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_sample_has_its_w(dtype: torch.dtype, phi: float) -> None:
    conditional, unconditional = CONDITIONAL.to(dtype), UNCONDITIONAL.to(dtype)
    together = guide(conditional, unconditional, W, phi)
    for i, w in enumerate(W):
        alone = guide(conditional[i : i + 1], unconditional[i : i + 1], float(w), phi)[0]
        torch.testing.assert_close(together[i], alone)
        assert alone.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(together[0].float(), conditional[0].float(), atol=2e-2), "w = 1 is no guidance"
