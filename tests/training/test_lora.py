"""LoRA students and critics in the teacher's own network: who sees which adapter, in the backward pass too."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from bootcli.config import DistillConfig
from bootcli.errors import UsageError
from bootcli.lora import fingerprint
from bootcli.plugin import Cond, Teacher
from bootcli.teachers.registry import load
from tests.training.short import EVERYTHING, build, config_of, run

LORA = {"student.lora_rank": 4, "student.head": "native"}
CRITIC = {"corrector": True, "correction.critic": "lora", "correction.lora_rank": 3, "correction.warmup": 0}
FULL = CRITIC | {"correction.critic": "full"}
OWNERS: dict[str, dict[str, object]] = {
    "full": {"student.head": "native"},
    "student": LORA,
    "student beside a full critic": LORA | FULL,
    "critic": CRITIC | {"student.head": "native"},
    "both": LORA | CRITIC,
    "both, identity": LORA | CRITIC | {"correction.direction": "identity"},
    "both and a judge": LORA | CRITIC | {"replay.share": 0.25, "replay.points": 1, "replay.adversary": 0.5}
    | {"adversary.warmup": 0, "replay.teacher_steps": 2},
}  # fmt: skip


def gradients(teacher: Teacher, config: DistillConfig) -> dict[str, Tensor]:
    """Of one update, with adapters that are no longer zero."""
    work, trainer = build(teacher, config)
    generator = torch.Generator().manual_seed(1)
    owners: dict[str, Any] = {"student": work.student, "critic": work.critic}
    for owner in owners.values():
        for p in owner.lora.parameters() if owner is not None and owner.lora is not None else ():
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    work.student.time_branch.out.weight.data += 0.1
    for companion in trainer.companions.values():  # as if its pull were known
        companion.balance = companion.balance.updated(1.0, 1.0)
    trainer._accumulate(1, 0.0)
    return {
        f"{name}.{key}": p.grad
        for name, owner in owners.items()
        if owner is not None
        for key, p in owner.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("owners", OWNERS)
def test_checkpointing_leaves_gradients_as_they_are(tiny_ddpm: Any, owners: str) -> None:
    """What is called again in the backward pass sees the adapter that it had, and not what is on by then."""
    both = []
    for saves in (False, True):
        teacher = load(str(tiny_ddpm)).teacher
        more = {"optimizer.gradient_checkpointing": saves}
        both.append(gradients(teacher, config_of(**OWNERS[owners], **more)))
    plain, saved = both
    assert plain.keys() == saved.keys()
    assert any(".lora." in key for key in plain) == (owners != "full")
    for key, gradient in plain.items():
        assert gradient.any() or not gradient.numel(), key
        assert torch.allclose(gradient, saved[key], rtol=1e-4, atol=1e-6 * float(gradient.abs().max() + 1)), key


def test_a_checkpoint_that_forgot_its_adapter_would_show(
    tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: torch's own checkpoint calls the network again without an adapter."""
    enable = tiny_teacher.enable_gradient_checkpointing
    monkeypatch.setattr(tiny_teacher, "enable_gradient_checkpointing", lambda net, function=None: enable(net))
    with pytest.raises(RuntimeError, match="different number of tensors was saved"):
        gradients(tiny_teacher, config_of(**LORA, **{"optimizer.gradient_checkpointing": True}))


def test_in_mixed_precision_one_copy_of_an_input_is_kept(tiny_ddpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft would keep another for the adapter; the gradients are those of either."""
    kept, both = [0, 0], []
    for i in range(2):
        alive: dict[int, Tensor] = {}  # held, so that no two have one address

        def pack(tensor: Tensor, alive: dict[int, Tensor] = alive) -> Tensor:
            alive[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            both.append(gradients(load(str(tiny_ddpm)).teacher, config_of(**LORA, mixed_precision="bf16")))
        kept[i] = sum(tensor.untyped_storage().nbytes() for tensor in alive.values())
        monkeypatch.setattr("bootcli.lora._cast_once", lambda layer, inputs: None)
    assert kept[0] < 0.9 * kept[1], kept
    for key, gradient in both[0].items():
        assert torch.allclose(gradient, both[1][key], rtol=0.05, atol=0.02 * float(gradient.abs().max())), key


def test_the_teacher_answers_as_before(tiny_teacher: Teacher) -> None:
    """Bit for bit, before, beside and after the training of two adapters; the judge sees it too."""
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7], dtype=torch.float64), Cond()
    tiny_teacher.net.requires_grad_(False)
    before, known = tiny_teacher.predict(tiny_teacher.net, x, t, cond), fingerprint(tiny_teacher.net)
    work, trainer = build(tiny_teacher, config_of(**OWNERS["both and a judge"], steps=3))
    assert work.student.lora is not None
    assert work.student.lora.base == known
    eps = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        start = work.student.sample(eps, cond)
    list(trainer.run())
    assert torch.equal(tiny_teacher.predict(tiny_teacher.net, x, t, cond), before)
    with torch.no_grad():
        learned = work.student.sample(eps, cond)
    assert not torch.equal(start, learned)
    names = {f"student.{name}" for name, _ in work.student.named_parameters()}
    assert {name for name in trainer.state()[0] if name.startswith("student.")} == names
    assert all(name.startswith(("student.lora.", "student.time_branch.")) for name in names)
    assert work.critic is not None
    assert not {id(p) for p in work.student.parameters()} & {id(p) for p in work.critic.parameters()}
    work.student.merge()
    with torch.no_grad():
        merged = work.student.sample(eps, cond)
    assert torch.allclose(merged, learned, atol=1e-3)


def test_it_starts_as_the_teacher(tiny_teacher: Teacher) -> None:
    work, _ = build(tiny_teacher, config_of(**LORA))
    full, _ = build(load(str(tiny_teacher._folder)).teacher, config_of(**{"student.head": "native"}))  # type: ignore[attr-defined]
    eps, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7], dtype=torch.float64), Cond()
    assert torch.equal(work.student(eps, t, cond), full.student(eps, t, cond))


def test_both_resume_bit_for_bit(tiny_ddpm: Any) -> None:
    config = config_of(**EVERYTHING, **LORA, **{"correction.critic": "lora"}, batch_size=16)
    straight, reports = run(load(str(tiny_ddpm)).teacher, config)
    _, stopped = build(load(str(tiny_ddpm)).teacher, config)
    begun = stopped.run()
    for _ in range(3):
        next(begun)
    tensors, facts = stopped.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    _, resumed = build(load(str(tiny_ddpm)).teacher, config)
    resumed.load_state(tensors, json.loads(json.dumps(facts)))
    assert [r.loss for r in resumed.run()] == [r.loss for r in reports[3:]]
    for name, tensor in straight.state()[0].items():
        if not name.startswith("rng."):
            assert torch.equal(tensor, resumed.state()[0][name]), name


def test_a_lora_does_not_go_on_from_another_teacher(tiny_ddpm: Any) -> None:
    teacher, other = (load(str(tiny_ddpm)).teacher for _ in range(2))
    _, trainer = build(teacher, config_of(**LORA))
    other.net.get_parameter("conv_in.bias").data[0] += 1e-4
    _, resumed = build(other, config_of(**LORA))
    with pytest.raises(ValueError, match="other weights of the teacher"):
        resumed.load_state(*trainer.state())


def test_half_of_the_base_is_near_the_whole(tiny_ddpm: Any) -> None:
    """Weights that learn stay float32; what begins as a copy begins with all of its bits."""
    losses = []
    for half, settings in itertools.product((False, True), (OWNERS["both"], OWNERS["full"])):
        teacher = load(str(tiny_ddpm)).teacher
        config = config_of(**settings, steps=3, mixed_precision="bf16", **{"memory.half_teacher": half})
        work, trainer = build(teacher, config)
        assert next(teacher.net.parameters()).dtype == (torch.bfloat16 if half else torch.float32)
        assert all(p.dtype == torch.float32 for p in work.student.parameters())
        if work.student.lora is None:
            start = load(str(tiny_ddpm)).teacher.net.state_dict()
            assert all(torch.equal(p, start[name]) for name, p in work.student.net.named_parameters())
        losses.append([report.loss for report in trainer.run()])
    assert losses[0] == pytest.approx(losses[2], rel=0.05)
    assert losses[1] == pytest.approx(losses[3], rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student.lora_rank": 4}, "157 times as large"),
        ({"student.lora_rank": 4, "student.head": "x0"}, "makes the last layer anew"),
        (LORA | {"memory.offload_teacher": True}, "has to stay"),
        (LORA | {"optimizer.compile": True, "optimizer.gradient_checkpointing": True}, "need the LoRA that they had"),
        ({"memory.offload_teacher": True, "optimizer.compile": True}, "moves a compiled network"),
        ({"memory.half_teacher": True}, "computes in float32"),
        (LORA | {"student.start_t": 0.5}, "a LoRA starts as the teacher"),
        (
            {"memory.offload_teacher": True, "replay.share": 0.5, "replay.adversary": 0.5},
            "looks through the teacher's layers",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_teacher: Teacher, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(tiny_teacher, config_of(**settings))
