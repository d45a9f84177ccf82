"""The training loop: EMA, golden curve, resume bit for bit, warm-up of companions, precision."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState

from bootcli.batch import MicroBatch
from bootcli.ema import EMA
from bootcli.engine import Engine
from bootcli.errors import BootError
from bootcli.objectives.base import Terms
from bootcli.pipelines.setup import RECOMPILE_LIMIT
from bootcli.plugin import Cond, Teacher
from bootcli.trainer import report as report_of
from bootcli.trainer import stream
from tests.training.short import ADVERSARIES, DIRECTIONS, EVERYTHING, build, config_of, every_objective, run

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_curve.json"


@pytest.mark.parametrize("ramp", [9.0, 2.0])
def test_ema_follows_its_formula(ramp: float) -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    module.requires_grad_(False)
    module.weight.fill_(0.0)
    ema = EMA(module, 0.5, ramp)
    expected = 0.0
    for n in range(1, 400):
        module.weight.fill_(float(n))
        ema.update(module, n)
        decay = min(0.5, (1 + n) / (1 + ramp + n))
        expected = decay * expected + (1 - decay) * n
    assert float(ema.weights["weight"]) == pytest.approx(expected, rel=1e-6)
    with ema.applied_to(module):
        assert float(module.weight) == pytest.approx(expected, rel=1e-6)
    assert float(module.weight) == 399.0


@pytest.mark.parametrize("ramp", [9.0, 2.0])
def test_an_average_on_another_device_moves_seldom_and_reaches_back_as_far(ramp: float) -> None:
    """The same for 200 updates, then near it; what is gone it forgets by the same factor."""
    module = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    module.weight.fill_(0.0)
    here, away = EMA(module, 0.999, ramp), EMA(module, 0.999, ramp, torch.device("cpu"))
    moved, before, gap = [], 0.0, 0.0
    for n in range(1, 3001):
        module.weight.fill_(math.log(n))  # it changes as weights do, ever more slowly
        here.update(module, n)
        away.update(module, n)
        found = float(away.weights["weight"])
        moved += [n] if found != before else []
        before, gap = found, max(gap, abs(found - float(here.weights["weight"])))
        assert n >= 200 or away.weights["weight"] == here.weights["weight"]
    assert {b - a for a, b in itertools.pairwise(m for m in moved if m > 1000)} == {10}
    assert gap < 0.02
    module.weight.fill_(0.0)
    reached = {ema: float(ema.weights["weight"]) for ema in (here, away)}
    for n in range(3001, 3101):
        for ema in (here, away):
            ema.update(module, n)
    left = [float(ema.weights["weight"]) / reached[ema] for ema in (here, away)]
    assert left[0] == pytest.approx(left[1], rel=1e-4)


def test_training_streams_differ_by_step_and_seed_only() -> None:
    draws = {place: torch.randn(4, generator=stream(*place)) for place in [(0, 1), (0, 2), (1, 1)]}
    assert torch.equal(draws[0, 1], torch.randn(4, generator=stream(0, 1)))
    assert not torch.equal(draws[0, 1], draws[0, 2])
    assert not torch.equal(draws[0, 1], draws[1, 1])


@every_objective
def test_everything_resumes_bit_for_bit(tiny_teacher: Teacher, objective: str) -> None:
    settings = {**EVERYTHING, "objective": objective, "correction.direction": DIRECTIONS[objective]}
    settings[ADVERSARIES[objective]] = 0.5
    config = config_of(**settings, batch_size=16)
    straight, reports = run(tiny_teacher, config)
    _, stopped = build(tiny_teacher, config)
    begun = stopped.run()
    for _ in range(3):
        next(begun)
    tensors, facts = stopped.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    _, resumed = build(tiny_teacher, config)
    resumed.load_state(tensors, json.loads(json.dumps(facts)))
    assert [r.loss for r in resumed.run()] == [r.loss for r in reports[3:]]
    for name, tensor in straight.state()[0].items():
        if not name.startswith("rng."):
            assert torch.equal(tensor, resumed.state()[0][name]), name
    for name in ("critic", "judge"):
        assert straight.companions[name].balance == resumed.companions[name].balance
        assert straight.companions[name].balance.updates


def test_critic_warms_up_before_the_student_listens(tiny_teacher: Teacher) -> None:
    """Until ``start`` the whole batch predicts; then the critic alone learns; then the student hears it."""
    settings = {"steps": 5, "correction.start": 1, "correction.warmup": 2, "optimizer.name": "adamw"}
    work, trainer = build(tiny_teacher, config_of(corrector=True, **settings))
    assert work.critic is not None
    first = next(iter(work.critic.parameters())).detach().clone()
    heard: list[bool] = []
    loss = trainer.work.corrector.loss  # type: ignore[union-attr]

    def watched(*args: Any, listens: bool) -> object:
        heard.append(listens)
        return loss(*args, listens=listens)

    trainer.work.corrector.loss = watched  # type: ignore[union-attr, method-assign]
    predicts: list[int] = []
    prediction = work.objective.loss

    def counted(*args: Any) -> Terms:
        predicts.append(len((terms := prediction(*args)).residual))
        return terms

    work.objective.loss = counted  # type: ignore[method-assign]
    reports = trainer.run()
    assert next(reports).images == 8
    assert torch.equal(first, next(iter(work.critic.parameters())))
    assert next(reports).images == 8
    assert predicts == [8, 6]
    assert not torch.equal(first, next(iter(work.critic.parameters())))
    list(reports)
    assert heard == [False, False, True, True]


@pytest.mark.parametrize("objective", ["boot", "kd"])
def test_judge_warms_up_before_the_student_listens(tiny_teacher: Teacher, objective: str) -> None:
    """Until it is heard the student learns as it does without an adversary, and in the first update after that its
    pull is measured; what the judge sees are the ends among what is regressed on stored paths."""
    settings: dict[str, object] = {"objective": objective, "steps": 5, "kd.teacher_steps": 2, "replay.teacher_steps": 4}
    settings |= {"optimizer.decay": "constant"} | ({"replay.share": 0.5} if objective == "boot" else {})
    _, alone = build(tiny_teacher, config_of(**settings))
    settings |= {ADVERSARIES[objective]: 0.5, "adversary.start": 1, "adversary.warmup": 2}
    work, trainer = build(tiny_teacher, config_of(**settings))
    assert work.adversary is not None
    assert work.judge is not None
    loss, seen = work.adversary.loss, []

    def watched(judge: Any, judged: Any, **kwargs: Any) -> object:
        seen.append(sum(len(each.ends.samples) for each in judged))
        return loss(judge, judged, **kwargs)

    work.adversary.loss = watched  # type: ignore[method-assign]
    judges, students = [next(work.judge.parameters()).detach().clone()], []
    for report, plain in zip(trainer.run(), alone.run(), strict=True):
        judges.append(next(work.judge.parameters()).detach().clone())
        same = zip(work.student.parameters(), alone.work.student.parameters(), strict=True)
        students.append(all(torch.equal(a, b) for a, b in same))
        assert report.residual == plain.residual
    assert [torch.equal(a, b) for a, b in itertools.pairwise(judges)] == [True] + [False] * 4
    assert students == [True] * 4 + [False]
    assert seen == [1 if objective == "boot" else 8] * 4


def test_training_is_as_far_as_its_steps_or_its_time(tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    work, trainer = build(tiny_teacher, config_of(steps=4, max_minutes=1.0))
    used, seen, draw = iter([0.0, 0.1, 0.9, 0.2]), [], work.objective.draw
    monkeypatch.setattr(trainer, "_time_used", lambda: next(used))
    monkeypatch.setattr(work.objective, "draw", lambda *args: seen.append(args[-1]) or draw(*args))
    list(trainer.run())
    assert seen == [0.0, 0.25, 0.9, 0.75]


def test_bins_of_the_residual_are_of_the_whole_range() -> None:
    t, residual = torch.tensor([0.05, 0.1, 0.3, 0.45]), torch.tensor([1.0, 3.0, 5.0, 7.0])
    terms = Terms(torch.tensor(0.0), {}, residual, t, residual)
    bins = report_of(1, 0.0, [MicroBatch(terms, terms.loss, {}, {})], 1.0, 0.0, 0.0, 0.0, 4).residual_bins
    assert bins[:3] == (2.0, 5.0, 7.0)
    assert all(math.isnan(each) for each in bins[3:])


def test_the_same_seed_gives_the_same_run(tiny_teacher: Teacher) -> None:
    first, second, other = (
        [report.loss for report in run(tiny_teacher, config_of(seed=seed))[1]] for seed in (0, 0, 1)
    )
    assert first == second
    assert first != other


def test_state_round_trip_continues_bit_for_bit(tiny_teacher: Teacher) -> None:
    straight, reports = run(tiny_teacher, config_of())
    _, stopped = build(tiny_teacher, config_of())
    begun = stopped.run()
    for _ in range(3):
        next(begun)
    tensors, facts = stopped.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.manual_seed(123)  # whatever else happens in the process must not matter
    _, resumed = build(tiny_teacher, config_of())
    resumed.load_state(tensors, json.loads(json.dumps(facts)))
    continued = list(resumed.run())
    assert [r.loss for r in continued] == [r.loss for r in reports[3:]]
    for name, tensor in straight.state()[0].items():
        if not name.startswith("rng."):
            assert torch.equal(tensor, resumed.state()[0][name]), name


@pytest.mark.parametrize("broken", ["loss", "gradient"])
@every_objective
def test_an_update_that_is_not_finite_leaves_no_trace(
    tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch, objective: str, broken: str
) -> None:
    """The state is that of the update before, and goes on from there where the fault is gone."""
    settings = {**EVERYTHING, "objective": objective, ADVERSARIES[objective]: 0.5, "batch_size": 16, "steps": 5}
    settings |= {f"{part}.{key}": value for part in ("kd", "replay") for key, value in (("reuse", 1), ("buffer", 40))}
    config = config_of(**settings)
    _, straight = run(tiny_teacher, config)
    work, trainer = build(tiny_teacher, config)
    reports = trainer.run()
    for _ in range(3):
        next(reports)
    before = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    facts = json.dumps({name: fact for name, fact in trainer.state()[1].items() if name != "seconds"})
    loss = work.objective.loss

    def spoilt(*args: Any) -> Terms:
        terms = loss(*args)
        if broken == "loss":
            return dataclasses.replace(terms, loss=terms.loss * math.nan, pull=terms.pull * math.nan)
        terms.loss.register_hook(lambda gradient: gradient * math.nan)
        return terms

    monkeypatch.setattr(work.objective, "loss", spoilt)
    with pytest.raises(BootError, match=f"{broken} is nan at step 4"):
        next(reports)
    tensors, after = trainer.state()
    assert json.dumps({name: fact for name, fact in after.items() if name != "seconds"}) == facts
    for name, tensor in before.items():
        assert name.startswith("rng.") or torch.equal(tensor, tensors[name]), name
    monkeypatch.undo()
    _, resumed = build(tiny_teacher, config)
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(after)))
    assert [r.loss for r in resumed.run()] == [r.loss for r in straight[3:]]


@every_objective
def test_mixed_precision_trains(tiny_teacher: Teacher, objective: str) -> None:
    """Near what full precision gives, with everything there is."""
    settings = {**EVERYTHING, "objective": objective, ADVERSARIES[objective]: 0.5, "batch_size": 16, "steps": 4}
    _, full = run(tiny_teacher, config_of(**settings))
    _, half = run(tiny_teacher, config_of(**settings, mixed_precision="bf16"))
    assert {r.images for r in half} == {16}, "of all parts"
    assert [r.loss for r in half] == pytest.approx([r.loss for r in full], rel=0.05)


def test_a_call_without_gradient_takes_none_from_the_next(tiny_teacher: Teacher) -> None:
    """Where half copies of weights are kept, old versions of torch kept those of the first call, which had none."""
    work, trainer = build(tiny_teacher, config_of(mixed_precision="bf16"))
    eps, t = torch.randn(2, *tiny_teacher.spec.sample_shape), torch.full((2,), 0.5, dtype=torch.float64)
    torch.nn.init.ones_(work.student.time_branch.out.weight)
    with trainer.engine.autocast():
        assert not torch.is_autocast_cache_enabled()
        with torch.no_grad():
            work.student(eps, t, Cond())
        work.student(eps, t, Cond()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in work.student.parameters())


def test_compiled_networks_of_one_class_have_room(tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student, teacher and critic share one limit of graphs, and torch's 8 are too few for them."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    build(tiny_teacher, config_of(**EVERYTHING))
    assert torch._dynamo.config.recompile_limit == 8
    build(tiny_teacher, config_of(**EVERYTHING, **{"optimizer.compile": True}))
    assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT > 8


def test_a_loss_scaler_serves_several_optimizers() -> None:
    """Each steps as it does alone: gradients are unscaled once, and the scale moves once an update."""
    data = torch.randn(4, 8)

    def train(scaler: torch.amp.GradScaler | None) -> list[torch.nn.Module]:
        torch.manual_seed(0)
        engine = Engine("cpu", "no")
        modules: list[torch.nn.Module] = [torch.nn.Linear(8, 8) for _ in range(3)]
        optimizers = [engine.prepare(m, torch.optim.SGD(m.parameters(), lr=1.0))[1] for m in modules]
        if scaler is not None:  # as with fp16, which needs a GPU
            engine._accelerator.state._mixed_precision = "fp16"
            engine._accelerator.native_amp, engine._accelerator.scaler = True, scaler
        for _ in range(3):
            engine.backward(torch.stack([m(data).square().mean() for m in modules]).sum())
            engine.clip(modules, 1.0)
            engine.step(optimizers, [0.1, 0.2, 0.3])
        return modules

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for plain, scaled in zip(train(None), train(scaler), strict=True):
        assert all(torch.allclose(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    assert scaler.get_scale() == 2048.0


def test_gradient_checkpointing_changes_memory_not_results(tiny_teacher: Teacher) -> None:
    plain = [r.loss for r in run(tiny_teacher, config_of(steps=3))[1]]
    saved = [r.loss for r in run(tiny_teacher, config_of(steps=3, **{"optimizer.gradient_checkpointing": True}))[1]]
    assert saved == pytest.approx(plain, rel=1e-4)


def test_the_golden_loss_curve(tiny_teacher: Teacher) -> None:
    """The first 20 losses; a change of the method or of its random streams shows here. Rewrite on purpose only."""
    losses = [report.loss for report in run(tiny_teacher, config_of(steps=20))[1]]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["losses"], rel=2e-3)


def test_a_gpu_is_taken_after_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Engine("cpu", "no")
    held: list[dict[str, object]] = []
    monkeypatch.setattr("bootcli.engine.pick_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr("bootcli.engine.Accelerator", lambda **_: held.append(dict(PartialState._shared_state)))
    Engine("cuda", "no")
    assert held == [{}]
