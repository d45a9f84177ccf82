"""The optimisers and the learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bootcli.config import DistillConfig, OptimizerConfig, resolve
from bootcli.optimizer import learning_rate, make_optimizer


def step(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """What one update takes off each parameter."""
    config: DistillConfig = resolve({"optimizer.name": name, "learning_rate": 1e-2})
    before = {key: p.detach().clone() for key, p in module.named_parameters()}
    optimizer = make_optimizer(module, config)
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    return {key: before[key] - p.detach() for key, p in module.named_parameters()}


def test_learning_rate_warms_up_and_decays() -> None:
    config = OptimizerConfig(warmup_steps=10, decay="cosine")
    rates = [learning_rate(config, 1.0, step, 110) for step in range(1, 111)]
    assert rates[4] == pytest.approx(0.5)
    assert max(rates) == rates[9] == 1.0
    assert rates[59] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(OptimizerConfig(warmup_steps=0, decay="constant"), 1.0, 7, 10) == 1.0
    assert learning_rate(OptimizerConfig(warmup_steps=0, decay="linear"), 1.0, 5, 10) == pytest.approx(0.5)


def test_muon_makes_updates_of_convolutions_orthogonal() -> None:
    update = step("muon", nn.Conv2d(8, 16, 3))["weight"].flatten(1)
    singular = torch.linalg.svdvals(update) / (1e-2 * 0.2 * 72**0.5)  # the scale that matches AdamW's
    assert float(singular.min()) > 0.5
    assert float(singular.max()) < 1.3


def test_muon_takes_steps_as_long_as_adamw() -> None:
    muon, adamw = (step(name, nn.Linear(64, 64))["weight"].square().mean().sqrt() for name in ("muon", "adamw"))
    assert 0.1 < float(muon / adamw) < 0.4  # 0.2 of AdamW's first, sign-like step: its usual size later on


def test_muon_leaves_biases_to_adamw() -> None:
    """Whose first step has one length, whatever the gradient: the learning rate, or more with Nesterov momentum."""
    size = step("muon", nn.Linear(8, 8))["bias"].abs()
    assert float(size.std() / size.mean()) < 1e-3
    assert 1.0 < float(size.mean() / 1e-2) < 2.5
