"""The optimisers and the learning rate."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from bootcli.closed_form import GaussianTeacher
from bootcli.config import DistillConfig, OptimizerConfig, resolve
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.muon import CHUNK, COEFFICIENTS, chunks, orthogonal
from bootcli.optimizer import learning_rate, load_optimizer, make_optimizer, optimizer_tensors
from bootcli.pipelines.defaults import without_auto
from bootcli.teachers.protocol import Teacher
from tests.objectives.closed import DDPM, MEAN
from tests.training.short import EVERYTHING, build, config_of


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
    endless = OptimizerConfig(warmup_steps=10, decay="inverse-sqrt", decay_after=100)
    rates = [learning_rate(endless, 2.0, step, 10**9, 0.9) for step in (5, 50, 100, 400, 2500)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.4])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_time_that_is_used_up_counts_from_the_first_update(decay: Any) -> None:
    """However much of it the warm-up takes, the rate makes no jump and ends at 0."""
    config = OptimizerConfig(warmup_steps=50, decay=decay)
    rates = [learning_rate(config, 1.0, step, 10**9, step / 100) for step in range(1, 101)]
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) < 0.04
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    early = [learning_rate(config, 1.0, step, 10**9, step / 20) for step in range(1, 21)]
    assert early[-1] == pytest.approx(0.0, abs=1e-12)
    assert max(early) > 0.05


@pytest.mark.parametrize(
    ("words", "rate"),
    [({}, 5e-4), ({"student.lora_rank": 4}, 2e-3), ({"student.lora_rank": 4, "learning_rate": 1e-5}, 1e-5)],
)
def test_a_lora_takes_a_higher_rate(words: dict[str, object], rate: float) -> None:
    found = without_auto(GaussianTeacher(MEAN, 0.5, DDPM), resolve(words), Engine("cpu", "no"))
    assert found.learning_rate == rate


def test_critic_and_judge_learn_at_rates_of_their_own(tiny_teacher: Teacher) -> None:
    for name in ("correction", "adversary"):
        still = {f"{name}.learning_rate_scale": 1e-12}
        work, trainer = build(tiny_teacher, config_of(**EVERYTHING, objective="kd", **{"kd.adversary": 0.5}, **still))
        networks = [each for each in (work.critic, work.judge) if each is not None]
        before = [copy.deepcopy(each.state_dict()) for each in networks]
        list(trainer.run())
        moved = [
            max(float((tensor - old[key]).abs().max()) for key, tensor in each.state_dict().items())
            for each, old in zip(networks, before, strict=True)
        ]
        assert [change < 1e-8 for change in moved] == [name == "correction", name == "adversary"]


def test_orthogonal_is_near_the_polar_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in [(12, 12), (12, 40), (40, 12)]]
    for g, o in zip(matrices, orthogonal(matrices), strict=True):
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        inside = u.mT @ o @ v.mT  # the same singular vectors make it diagonal
        assert torch.allclose(inside, torch.diag(inside.diagonal()), atol=1e-4)
        assert 0.6 < float(inside.diagonal().min()) < float(inside.diagonal().max()) < 1.3


def test_orthogonal_is_the_quintic_iteration() -> None:
    g = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    x = g / g.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        x = a * x + (b * (x @ x.mT) + c * (x @ x.mT) @ (x @ x.mT)) @ x
    assert torch.allclose(orthogonal([g])[0], x, atol=1e-5)


def test_a_gradient_without_full_rank_is_no_trouble() -> None:
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(64, 2, generator=generator) @ torch.randn(2, 500, generator=generator)
    assert torch.linalg.svdvals(orthogonal([thin])[0])[:3] == pytest.approx([1.0, 1.0, 0.0], abs=0.35)
    assert not orthogonal([torch.zeros(8, 8)])[0].any()


def test_chunks_keep_order_and_bound() -> None:
    params = [nn.Parameter(torch.zeros(n)) for n in (1, CHUNK, 2, 3)]
    assert [[p.numel() for p in part] for part in chunks(params)] == [[1], [CHUNK], [2, 3]]


def test_muon_steps_hidden_layers_and_leaves_the_rest_to_adamw() -> None:
    hidden, bias = step("muon", nn.Conv2d(8, 16, 3)).values()
    singular = torch.linalg.svdvals(hidden.flatten(1)) / (1e-2 * 0.2 * 72**0.5)
    assert 0.6 < float(singular.min()) < float(singular.max()) < 1.3
    assert torch.allclose(bias.abs(), torch.full_like(bias, 1e-2), rtol=1e-4)  # AdamW's first step is sign-like
    pixels = step("muon", nn.Conv2d(3, 16, 3))["weight"]
    assert torch.allclose(pixels.abs(), torch.full_like(pixels, 1e-2), rtol=1e-4)


def test_muon_takes_steps_as_long_as_adamw() -> None:
    muon, adamw = (step(name, nn.Linear(64, 64))["weight"].square().mean().sqrt() for name in ("muon", "adamw"))
    assert float(muon / adamw) == pytest.approx(0.2, rel=0.2)  # AdamW's first step is sign-like, later ones 0.2 of it


def test_muon_decays_hidden_weights() -> None:
    layer = nn.Linear(8, 8, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros(8, 8)
    make_optimizer(layer, resolve({"learning_rate": 0.1, "optimizer.weight_decay": 0.5})).step()
    assert torch.allclose(layer.weight, before * (1 - 0.1 * 0.5))


def test_a_loss_scaler_skips_a_step_of_infinite_gradients() -> None:
    layer = nn.Linear(8, 8)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer, scaler = make_optimizer(layer, resolve({"learning_rate": 0.1})), torch.amp.GradScaler("cpu")
    scaler.scale(layer(torch.ones(1, 8)).sum()).backward()
    for p in layer.parameters():
        p.grad = torch.full_like(p, math.inf)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


class EightBits(torch.optim.Optimizer):
    """What the state of bitsandbytes looks like: plain numbers of steps, and bytes."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("step", 0)
                assert type(state["step"]) is int
                state["step"] += 1
                state.setdefault("state1", torch.zeros(p.shape, dtype=torch.uint8)).add_(state["step"])
                p.add_(p.grad + state["state1"].float(), alpha=-group["lr"])


@pytest.fixture(params=["real", "stand-in"])
def eight_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """bitsandbytes where it is installed, and a stand-in for it; whether it is the real one."""
    if request.param == "real":
        pytest.importorskip("bitsandbytes")
    else:
        package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
        optim.AdamW8bit = EightBits  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    return request.param == "real"


def test_eight_bits_go_through_a_checkpoint(eight_bits: bool) -> None:
    """The third update is the same from a state that was stored and from one that was kept."""
    config = resolve({"optimizer.name": "adamw8bit", "learning_rate": 1e-2})

    def network() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 4))  # one with 4096 values or more
        return net, make_optimizer(net, config)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        net(torch.randn(8, 80, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    net, optimizer = network()
    for seed in (1, 2):
        step(net, optimizer, seed)
    stored = {name: tensor.clone() for name, tensor in optimizer_tensors("o", optimizer).items()}
    assert stored["o.0.state1"].dtype == torch.uint8
    other, again = network()
    other.load_state_dict(net.state_dict())
    load_optimizer("o", again, stored)
    for each, of in ((net, optimizer), (other, again)):
        step(each, of, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert int(optimizer_tensors("o", again)["o.0.step"]) == 3


def test_eight_bits_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(UsageError, match="needs bitsandbytes") as error:
        make_optimizer(nn.Linear(2, 2), resolve({"optimizer.name": "adamw8bit", "learning_rate": 0.1}))
    assert "bootcli[8bit]" in error.value.hint
    with pytest.raises(UsageError, match="does not run on meta"):
        make_optimizer(nn.Linear(2, 2, device="meta"), resolve({"optimizer.name": "adamw8bit", "learning_rate": 0.1}))
