"""What shares a batch: parts, micro-batches, conditions and weights."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bootcli.batch import Batch
from bootcli.errors import BootError
from bootcli.objectives.adversary import Verdict
from bootcli.objectives.kd import KD
from bootcli.pipelines.setup import refiner_times
from bootcli.plugin import Teacher
from tests.training.short import ADVERSARIES, DIRECTIONS, EVERYTHING, build, config_of, every_objective, run


@every_objective
def test_update_does_not_depend_on_how_the_batch_is_split(tiny_teacher: Teacher, objective: str) -> None:
    """Also with a corrector, whose balance is a running mean over whole updates, and with stored paths."""
    settings = {**EVERYTHING, "objective": objective, "steps": 4, "batch_size": 16, "optimizer.name": "adamw"}
    settings |= {"correction.direction": DIRECTIONS[objective], ADVERSARIES[objective]: 0.5}
    whole, ours = run(tiny_teacher, config_of(**settings))
    split, theirs = run(tiny_teacher, config_of(**settings, **{"optimizer.accumulation": 2}))
    assert [r.loss for r in ours] == pytest.approx([r.loss for r in theirs], rel=1e-3)
    for networks in ("student", "critic", "judge"):
        pairs = zip(getattr(whole.work, networks).parameters(), getattr(split.work, networks).parameters(), strict=True)
        medians = [float((a - b).detach().abs().median()) for a, b in pairs]
        assert max(medians) < 1e-4, medians  # a tenth of one update of Adam, whose first ones are sign-like


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny_teacher: Teacher) -> None:
    settings: dict[str, object] = {"steps": 2, "optimizer.name": "adamw"}
    whole, _ = run(tiny_teacher, config_of(**settings))
    split, _ = run(tiny_teacher, config_of(**settings, **{"optimizer.accumulation": 2}))
    for a, b in zip(whole.work.student.parameters(), split.work.student.parameters(), strict=True):
        # Adam's first updates are sign-like, so that a gradient near 0 may round to the other side.
        assert (a - b).detach().abs().median() < 1e-6


def test_a_batch_that_cannot_be_split_is_refused(tiny_teacher: Teacher) -> None:
    with pytest.raises(BootError, match="cannot be split"):
        build(tiny_teacher, config_of(**{"optimizer.accumulation": 3}))


def test_a_batch_too_small_for_its_parts_is_refused(tiny_teacher: Teacher) -> None:
    with pytest.raises(BootError, match="leaves none to predict"):
        build(tiny_teacher, config_of(**EVERYTHING, batch_size=3))


@pytest.mark.parametrize("objective", ["boot", "kd"])
def test_judge_sees_an_end_with_the_condition_of_its_path(class_teacher: Teacher, objective: str) -> None:
    settings: dict[str, object] = {"objective": objective, "steps": 2, "kd.teacher_steps": 2, "replay.teacher_steps": 4}
    settings |= {"replay.share": 0.5} if objective == "boot" else {}
    work, trainer = build(class_teacher, config_of(**settings, **{ADVERSARIES[objective]: 0.5}, classes=(1, 3)))
    paths = work.replay if objective == "boot" else work.objective
    assert work.adversary is not None
    assert isinstance(paths, KD)
    loss, seen = work.adversary.loss, set()

    def watched(judge: Any, judged: Any, **kwargs: Any) -> object:
        (each,) = judged
        for row, point in zip(each.ends.rows, each.ends.points, strict=True):
            stored = [torch.equal(point, points[-1]) for points in paths._points].index(True)
            (label,) = each.cond.rows(row[None]).tensors["labels"].tolist()
            assert label == (1, 3)[int(paths._rows[stored])]
            seen.add(label)
        return loss(judge, judged, **kwargs)

    work.adversary.loss = watched  # type: ignore[method-assign]
    list(trainer.run())
    assert seen == {1, 3}


@pytest.mark.parametrize(("objective", "refined", "ends"), [("boot", 0, 1), ("kd", 0, 8), ("boot", 2, 3), ("kd", 2, 8)])
def test_the_adversary_weighs_as_much_as_the_samples_it_judges(
    tiny_teacher: Teacher, objective: str, refined: int, ends: int
) -> None:
    """Its balance times its loss of each end, in the mean over the whole batch; what is refined are ends too."""
    settings: dict[str, object] = {"objective": objective, "kd.teacher_steps": 2, "replay.teacher_steps": 4}
    settings |= {"refiner.share": refined / 8}
    settings |= {"replay.share": 0.5} if objective == "boot" else {}
    work, trainer = build(tiny_teacher, config_of(**settings, **{ADVERSARIES[objective]: 0.5}))
    (work.replay or work.objective).renew(torch.Generator().manual_seed(0), 8, 1, 0, trainer.engine)
    assert work.adversary is not None
    judge: Any = SimpleNamespace(prepared=work.judge, is_heard=lambda step: True, balance=SimpleNamespace(ratio=3.0))
    losses = []
    for student, told in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        work.adversary.loss = lambda *_, student=student, told=told, **__: Verdict(  # type: ignore[method-assign, misc]
            torch.tensor(student), torch.tensor(told), torch.ones(ends)
        )
        generator = torch.Generator().manual_seed(0)
        batch = Batch(work, work.config, {"judge": judge}, trainer.parts, 1, 0.0, generator, 1)
        losses.append(float(batch.micro_batch(work.student, 0, torch.device("cpu")).loss.detach()))
    assert losses[1] - losses[0] == pytest.approx(0.5 * 3.0 * ends / 8, rel=1e-4)
    assert losses[2] - losses[0] == pytest.approx(1.0, rel=1e-4), "the judge learns from the mean over all it sees"


def test_what_is_refined_is_judged_from_where_it_started(tiny_teacher: Teacher) -> None:
    """Against the end of the teacher's path from the same noised sample."""
    settings: dict[str, object] = {"objective": "kd", "kd.teacher_steps": 2, "refiner.share": 0.25, "kd.adversary": 0.5}
    work, trainer = build(tiny_teacher, config_of(**settings, steps=1))
    assert work.adversary is not None
    assert work.refiner is not None
    loss, refine, regressed, seen = work.adversary.loss, work.refiner.loss, [], []

    def refined(*given: Any) -> Any:
        regressed.append(refine(*given))
        return regressed[-1]

    def watched(judge: Any, judged: Any, **kwargs: Any) -> object:
        seen.append([each.ends for each in judged])
        return loss(judge, judged, **kwargs)

    work.adversary.loss, work.refiner.loss = watched, refined  # type: ignore[method-assign]
    list(trainer.run())
    assert work.refiner.times.tolist() == list(refiner_times(tiny_teacher, work.config)), "the times it samples from"
    ((stored, own),) = seen
    assert (len(stored.samples), len(own.samples)) == (6, 2)
    assert own is regressed[0].ends
    assert regressed[0].residual == pytest.approx((own.samples - own.points).detach().square().flatten(1).mean(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "boot", "replay.adversary": 0.5}, "needs stored paths"),
        ({"objective": "kd", "replay.share": 0.25, "replay.adversary": 0.5}, "Set kd.adversary"),
        ({"objective": "kd", "kd.adversary": 0.5, "adversary.sigmas": [0.2, 0.1]}, "do not rise"),
        ({"objective": "boot", "replay.share": 0.25, "replay.adversary": 0.5}, "2 samples together learn 4 points"),
        ({"objective": "kd", "kd.adversary": 0.5, "kd.points": 9}, "8 samples together learn 9 points"),
    ],
)
def test_an_adversary_without_samples_is_refused(
    tiny_teacher: Teacher, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(BootError) as error:
        build(tiny_teacher, config_of(**settings))
    assert message in f"{error.value.message} {error.value.hint}"


def test_a_recipe_for_kd_does_not_bind_another_objective(tiny_teacher: Teacher) -> None:
    build(tiny_teacher, config_of(objective="boot", **{"kd.adversary": 0.5, "kd.points": 9}))


@pytest.mark.parametrize(
    ("settings", "new"),
    [
        ({"objective": "kd"}, 8),
        ({"objective": "kd", "refiner.share": 0.25}, 6),
        ({"objective": "kd", "corrector": True, "correction.share": 0.25}, 6),
        ({"objective": "boot", "replay.share": 0.5, "replay.points": 1}, 4),
    ],
)
def test_a_path_is_reused_as_often_as_is_said(tiny_teacher: Teacher, settings: dict[str, object], new: int) -> None:
    """An update with reuse 1 makes as many new paths as it learns from, whatever shares the batch."""
    few = {f"{name}.{key}": 1 for name in ("kd", "replay") for key in ("reuse", "teacher_steps")}
    work, trainer = build(tiny_teacher, config_of(**few, **settings, steps=3))
    paths, stored = work.replay or work.objective, []
    for _ in trainer.run():
        stored.append(len(paths.state()["eps"]))
    assert [after - before for before, after in itertools.pairwise(stored)] == [new, new]
