"""Memory: what is computed is what is held; where things lie; micro-batches that are found by trying."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bootcli.batch import PARTS, Parts
from bootcli.config import MemoryConfig
from bootcli.engine import Engine
from bootcli.errors import DoesNotFit, UsageError
from bootcli.memory import LORA_RANK, learned, main_memory, need_of, optimizer_bytes, switches
from bootcli.objectives.kd import KD
from bootcli.plugin import Teacher
from bootcli.teachers.registry import load
from bootcli.trainer import Trainer
from tests.training.short import EVERYTHING, build, config_of

CPU = torch.device("cpu")
LORA = {"student.lora_rank": 4, "student.head": "native"}
CRITIC = {"corrector": True, "correction.warmup": 0}
JUDGE = {"replay.share": 0.25, "replay.adversary": 0.5, "adversary.warmup": 0, "replay.points": 1}


def size_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("adamw", LORA), ("muon", CRITIC | JUDGE), ("muon", LORA | CRITIC | {"correction.critic": "lora"})],
    ids=["LoRA", "whole networks", "LoRAs"],
)
def test_what_is_computed_is_what_is_held(tiny_teacher: Teacher, name: str, settings: dict[str, object]) -> None:
    """Byte for byte, after an update; the teacher's part is computed from shapes, before a LoRA is in it and after."""
    base = size_of(tiny_teacher.net.parameters())
    config = config_of(**settings, **{"optimizer.name": name, "replay.teacher_steps": 2})
    work, trainer = build(tiny_teacher, config)
    next(trainer.run())
    need = need_of(tiny_teacher, trainer.config, CPU, work.judge)
    owners: list[nn.Module] = [each for each in (work.student, work.critic, work.judge) if each is not None]
    optimizers = [trainer.optimizer, *(each.optimizer for each in trainer.companions.values())]
    states = [slot for each in optimizers for slots in each.state.values() for slot in slots.values()]
    assert need.teacher == base
    assert need.student == size_of(work.student.parameters())
    assert need.companions == sum(size_of(owner.parameters()) for owner in owners[1:])
    assert need.gradients == sum(size_of(learned(owner)) for owner in owners)
    assert need.optimizer == size_of(states)
    assert need.average == size_of(trainer.ema.weights.values())
    assert need.casts == need.other == 0


@pytest.mark.parametrize("objective", ["kd", "boot"])
def test_main_memory_is_what_the_stores_hold_when_full(tiny_teacher: Teacher, objective: str) -> None:
    settings = {**EVERYTHING, "objective": objective, "kd.buffer": 16, "replay.points": 2}
    work, trainer = build(tiny_teacher, config_of(**settings, steps=16))
    list(trainer.run())
    stores = [each.state() for each in (work.objective, work.replay) if isinstance(each, KD)]
    assert all(len(store["eps"]) == 16 for store in stores)
    held = size_of(tensor for store in stores for name, tensor in store.items() if name != "next")
    assert main_memory(tiny_teacher, trainer.config, CPU) == {"stored paths": held}


def test_main_memory_has_what_is_kept_off_a_device(tiny_ddpm: Path) -> None:
    teacher, cuda = load(str(tiny_ddpm)).teacher, torch.device("cuda")
    away = {"memory.offload_teacher": True, "memory.offload_ema": True, "memory.half_teacher": True}
    config = config_of(mixed_precision="bf16", corrector=False, **{"student.head": "native"}, **away)
    on = need_of(teacher, dataclasses.replace(config, memory=MemoryConfig(half_teacher=True)), cuda)
    assert main_memory(teacher, config, cuda) == {"teacher": on.teacher, "average": on.average}
    assert main_memory(teacher, config, CPU) == {}


def test_eight_bit_states_are_as_large_as_is_said() -> None:
    adamw8bit = pytest.importorskip("bitsandbytes.optim").AdamW8bit
    net = nn.Sequential(nn.Linear(80, 80), nn.Conv2d(16, 33, 3), nn.Linear(10, 10))
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer = adamw8bit(net.parameters(), lr=1e-3)
    optimizer.step()
    slots = [slots for p in net.parameters() for slots in [optimizer.state[p]]]
    held = size_of(slot for each in slots for name, slot in each.items() if name not in ("step", "qmap1", "qmap2"))
    assert optimizer_bytes([p.shape for p in net.parameters()], "adamw8bit") == held


def test_switches_save_what_they_say(tiny_ddpm: Path) -> None:
    """Each is the difference of two computations; what is on, or cannot be, is not named."""
    teacher, cuda = load(str(tiny_ddpm)).teacher, torch.device("cuda")
    config = config_of(mixed_precision="bf16", corrector=False, **{"student.head": "native"})
    need = need_of(teacher, config, cuda)
    found = {each.setting.removeprefix("--set "): each.saves for each in switches(teacher, config, cuda, 1000, None)}
    assert found["optimizer.accumulation=2"] == 500
    assert found["optimizer.gradient_checkpointing=true"] is None
    assert found["memory.half_teacher=true"] == need.teacher // 2
    assert found["memory.offload_teacher=true"] == need.teacher
    assert found["memory.offload_ema=true"] == need.average
    assert f"--lora-rank {LORA_RANK}" not in found  # this teacher wants an x0 head
    on = {"optimizer.gradient_checkpointing": True, "optimizer.accumulation": 8, "memory.offload_ema": True}
    on |= {"memory.half_teacher": True, "optimizer.name": "adamw"}
    config = config_of(mixed_precision="bf16", corrector=False, **LORA, **on)
    (left,) = switches(teacher, config, cuda, None, None)
    assert left.setting == "--set optimizer.name=adamw8bit"


def test_where_things_lie_changes_no_result(tiny_ddpm: Path) -> None:
    losses = []
    for away in (False, True):
        teacher = load(str(tiny_ddpm)).teacher
        moves = {"memory.offload_teacher": away, "memory.offload_ema": away, "optimizer.accumulation": 2}
        work, trainer = build(teacher, config_of(**CRITIC, **moves, steps=3))
        assert (work.offload_teacher is not None) == away
        losses.append([report.loss for report in trainer.run()])
        assert all(average.device == CPU for average in trainer.ema.weights.values())
    assert losses[0] == losses[1]


def test_the_teacher_leaves_when_the_student_learns() -> None:
    """It is fetched when it is called, and sent away before a gradient of the student and before the backward pass."""
    net, moves = nn.Linear(2, 2), []
    send = Engine("cpu", "no").offload(net)
    original = net.to
    net.to = lambda *args, **kwargs: moves.append(args) or original(*args, **kwargs)  # type: ignore[method-assign, func-returns-value, assignment]
    net(torch.zeros(1, 2))
    send()
    assert moves == [("cpu",)]


class Hungry(nn.Module):
    """Out of memory beyond so many samples with gradients."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen = most, [0]

    def hook(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen.append(len(args[0]))
        if torch.is_grad_enabled() and len(args[0]) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(("most", "found"), [(20, 1), (12, 2), (2, 8)])
def test_micro_batches_are_found_by_trying(tiny_teacher: Teacher, most: int, found: int) -> None:
    """Boot calls the student on 16 samples and 4 of the boundary; nothing of the trial stays."""
    work, trainer = build(tiny_teacher, config_of(batch_size=16))
    before = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    hungry = Hungry(most)
    handle = work.student.net.register_forward_pre_hook(hungry.hook)  # type: ignore[arg-type]
    assert trainer.fitting() == found
    handle.remove()
    after = trainer.state()[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(p.grad is None for p in work.student.parameters())


def test_what_fits_nowhere_is_said(tiny_teacher: Teacher) -> None:
    work, trainer = build(tiny_teacher, config_of(batch_size=4))
    work.student.net.register_forward_pre_hook(Hungry(0).hook)  # type: ignore[arg-type]
    with pytest.raises(DoesNotFit, match="Not even a micro-batch of 1"):
        trainer.fitting()


def test_a_trial_has_everything_that_comes_later(tiny_teacher: Teacher) -> None:
    """Companions that start late, and stored paths, without making any; other errors are not taken for memory."""
    work, trainer = build(tiny_teacher, config_of(**EVERYTHING, batch_size=16, **{"correction.start": 500}, **{
        "replay.adversary": 0.5, "adversary.start": 500}))  # fmt: skip
    assert work.corrector is not None
    assert work.adversary is not None
    heard: list[bool] = []
    for part in (work.corrector, work.adversary):
        loss = part.loss

        def watched(*args: Any, loss: Any = loss, listens: bool) -> Any:
            heard.append(listens)
            return loss(*args, listens=listens)

        part.loss = watched  # type: ignore[method-assign, assignment]
    assert trainer.fitting() == 1
    assert heard == [True, True]
    assert work.replay is not None
    assert not len(work.replay.state()["eps"])

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    work.corrector.loss = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fitting()


def test_what_is_found_is_the_runs(tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    work, trainer = build(tiny_teacher, config_of(batch_size=16))
    assert work.config.optimizer.accumulation is None
    assert trainer.config.optimizer.accumulation == 1  # on a CPU nothing is tried
    monkeypatch.setattr(Engine, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(Trainer, "fitting", lambda self: 4)
    chosen = Trainer(work, work.config, Engine("cpu", "no"))
    assert chosen.config == dataclasses.replace(
        work.config, optimizer=dataclasses.replace(work.config.optimizer, accumulation=4)
    )
    assert chosen.parts.shares == 4


@pytest.mark.parametrize("shares", [1, 2, 4, 8, 16])
def test_micro_batches_share_as_the_batch_does(shares: int) -> None:
    """Every sample is in one of them, they are equally large, and each has its part of every share."""
    config = config_of(batch_size=16, corrector=True, **{"refiner.share": 0.125, "replay.share": 0.25})
    parts = Parts.of(config, shares)
    assert (parts.prediction, parts.correction, parts.refinement, parts.replay) == (6, 4, 2, 4)
    splits = [parts.rows(index) for index in range(shares)]
    for name in PARTS:
        assert [rows[name].start for rows in splits[1:]] == [rows[name].stop for rows in splits[:-1]]
        assert (splits[0][name].start, splits[-1][name].stop) == (0, getattr(parts, name))
        sizes = [rows[name].stop - rows[name].start for rows in splits]
        assert max(sizes) - min(sizes) <= 1
    assert {sum(rows[name].stop - rows[name].start for name in PARTS) for rows in splits} == {16 // shares}


def test_processes_that_learn_together_need_something_each() -> None:
    config = config_of(batch_size=16, corrector=True)
    assert Parts.of(config, 8).correction == 4
    assert Parts.of(config, 2, processes=2).shares == 4
    with pytest.raises(UsageError, match="no sample that corrects"):
        Parts.of(config, 4, processes=2)


def test_an_update_is_the_same_in_micro_batches_of_one(tiny_ddpm: Path) -> None:
    """With shares that no micro-batch has whole: losses and what is learned differ by rounding."""
    settings = {**EVERYTHING, "replay.adversary": 0.5, "steps": 4, "optimizer.name": "adamw", "correction.warmup": 1}
    runs = []
    for accumulation in (1, 4, 8):
        config = config_of(**settings, batch_size=8, **{"optimizer.accumulation": accumulation})
        work, trainer = build(load(str(tiny_ddpm)).teacher, config)
        runs.append(([report.loss for report in trainer.run()], work, trainer))
    for (ours, whole, one), (theirs, split, other) in itertools.pairwise(runs):
        assert ours == pytest.approx(theirs, rel=1e-3)
        for name in ("student", "critic", "judge"):
            pairs = zip(getattr(whole, name).parameters(), getattr(split, name).parameters(), strict=True)
            assert max(float((a - b).detach().abs().median()) for a, b in pairs) < 1e-4, name
        for name, companion in one.companions.items():
            balance, their = (dataclasses.astuple(each.companions[name].balance) for each in (one, other))
            assert balance == pytest.approx(their, rel=1e-3)
            assert companion.balance.updates
