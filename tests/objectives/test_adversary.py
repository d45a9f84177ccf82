"""The adversary and its judge, on teachers whose samples are known."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher
from bootcli.config import AdversaryConfig, CorrectionConfig
from bootcli.critic import Critic
from bootcli.errors import UsageError
from bootcli.judge import Features, Judge, make_judge
from bootcli.maths.schedule import CosineVP, LinearPath, Schedule, VarianceExploding
from bootcli.maths.signal_ode import from_signal
from bootcli.objectives.adversary import Adversary, AdversaryDraw, Judged, Verdict
from bootcli.objectives.base import Ends
from bootcli.teachers.protocol import Cond, Teacher
from tests.objectives.closed import MEAN

WIDE = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))


class Open(GaussianTeacher):
    """Its one map of features is its prediction."""

    def feature_layers(self, net: nn.Module) -> Sequence[nn.Module]:
        return [net.get_submodule("output")]


def adversary(teacher: Teacher, **config: Any) -> Adversary:
    return Adversary(AdversaryConfig(**config), 1.0, "prediction", Features(teacher))


def test_noise_levels_that_a_teacher_does_not_have_are_refused() -> None:
    """EDM's begin at 0.002, and below there is nothing but clean data."""
    teacher = Open(torch.zeros(1, 4, 4), 0.5, VarianceExploding(), "x0")
    assert adversary(teacher, sigmas=(0.001, 0.1))
    with pytest.raises(UsageError, match="below all noise levels"):
        adversary(teacher, sigmas=(0.0005, 0.001))


def ends_of(samples: Tensor, points: Tensor) -> Ends:
    return Ends(torch.arange(len(samples)), samples, points, len(samples))


def judged(part: Adversary, judge: nn.Module, ends: Ends, seed: int = 0, *, listens: bool = True) -> Verdict:
    draw = part.draw(torch.Generator().manual_seed(seed), len(ends.samples))
    return part.loss(judge, [Judged(ends, draw, Cond())], listens=listens)


def test_features_are_the_teachers_own(tiny_teacher: Teacher) -> None:
    """As hooks on the whole network see them, with its weights, without running the rest of it."""
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    features = Features(tiny_teacher)
    seen: list[Tensor] = []
    whole = copy.deepcopy(tiny_teacher.net)
    for layer in tiny_teacher.feature_layers(whole):
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    tiny_teacher.predict(whole, x, t, Cond())
    found = features(x, t, Cond())
    assert len(found) == len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, seen, strict=True))
    ours, theirs = ({p.data_ptr() for p in net.parameters()} for net in (features.net, tiny_teacher.net))
    assert ours == theirs

    def never(*args: object) -> None:
        raise AssertionError("the output layer ran")

    tiny_teacher.output_layer(features.net).register_forward_pre_hook(never)
    features(x, t, Cond())
    hooks = [m for m in tiny_teacher.net.modules() if m._forward_hooks]
    assert not hooks, "the teacher's own network is left alone"


def test_a_teacher_that_names_no_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="names no layers"):
        Features(GaussianTeacher(MEAN, 0.5, CosineVP()))


def test_judge_has_a_head_for_each_map(tiny_teacher: Teacher) -> None:
    features = Features(tiny_teacher)
    maps = features(torch.randn(2, 1, 8, 8), torch.full((2,), 0.1, dtype=torch.float64), Cond())
    logits = make_judge(features, Cond(), 4)(maps)
    assert [tuple(each.shape) for each in logits] == [(2, each[0, 0].numel()) for each in maps]


def test_losses_are_those_of_the_non_saturating_gan() -> None:
    """The student's gradient is that of its loss, to its samples alone; the judge's to its own weights alone."""
    teacher = Open(WIDE, 0.5, CosineVP())
    part, judge = adversary(teacher), Judge([1], 4)
    samples, points = (WIDE + 0.5 * torch.randn(6, 1, 8, 8) for _ in range(2))
    samples.requires_grad_(True)
    draw = part.draw(torch.Generator().manual_seed(0), 6)

    def logits(x: Tensor) -> Tensor:
        x_tau = from_signal(x, draw.noise, teacher.spec.schedule(draw.tau))
        (each,) = judge(part.features(x_tau, draw.tau, Cond()))
        return each  # type: ignore[no-any-return]

    persuasion = softplus(-logits(samples)).mean()
    (expected,) = torch.autograd.grad(persuasion, samples)
    told = softplus(-logits(points)).mean() + softplus(logits(samples.detach())).mean()
    of_judge = torch.autograd.grad(told, list(judge.parameters()))

    verdict = part.loss(judge, [Judged(ends_of(samples, points), draw, Cond())], listens=True)
    assert verdict.student.item() == pytest.approx(persuasion.item(), rel=1e-5)
    assert verdict.judge.item() == pytest.approx(told.item(), rel=1e-5)
    (verdict.student + verdict.judge).backward()
    assert samples.grad is not None
    assert torch.allclose(samples.grad, expected, atol=1e-7)
    for parameter, gradient in zip(judge.parameters(), of_judge, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    assert torch.allclose(verdict.pull, 6 * 64 * expected.square().flatten(1).mean(1).sqrt(), rtol=1e-4)


def test_the_student_hears_nothing_while_the_judge_warms_up() -> None:
    part, judge = adversary(Open(WIDE, 0.5, CosineVP())), Judge([1], 4)
    samples = torch.randn(4, 1, 8, 8, requires_grad=True)
    first, later = (judged(part, judge, ends_of(samples, torch.randn(4, 1, 8, 8)), listens=on) for on in (False, True))
    assert not first.pull.any()
    assert later.pull.all()
    assert torch.autograd.grad(first.student, samples)[0].eq(0).all()
    assert torch.autograd.grad(later.student, samples)[0].any()


@pytest.mark.parametrize("schedule", [CosineVP(), LinearPath()])
def test_noise_levels_are_the_same_under_every_clock(schedule: Schedule) -> None:
    part = adversary(Open(WIDE, 0.5, schedule), sigmas=(0.1, 0.3))
    at = schedule(part.draw(torch.Generator().manual_seed(0), 640).tau)
    assert float((at.sigma / at.alpha).min()) == pytest.approx(0.1, abs=1e-3)
    assert float((at.sigma / at.alpha).max()) == pytest.approx(0.3, abs=1e-3)


def test_it_moves_a_student_to_the_teachers_distribution() -> None:
    """Without any regression: a Gaussian of another mean and width becomes the teacher's."""
    torch.manual_seed(0)
    part, judge = adversary(Open(WIDE, 0.5, CosineVP()), sigmas=(0.16, 0.5)), Judge([1], 16)
    mean, std = nn.Parameter(WIDE + 0.4), nn.Parameter(torch.tensor(0.9))
    of_student = torch.optim.Adam([mean, std], lr=5e-3, betas=(0.5, 0.9))
    of_judge = torch.optim.Adam(judge.parameters(), lr=5e-3, betas=(0.5, 0.9))

    def distance() -> float:
        return float((mean - WIDE).square().mean().detach() + (std.detach() - 0.5).square())

    before = distance()
    for step in range(400):
        generator = torch.Generator().manual_seed(step)
        eps, other = (torch.randn(64, 1, 8, 8, generator=generator) for _ in range(2))
        verdict = judged(part, judge, ends_of(mean + std * eps, WIDE + 0.5 * other), step)
        for optimizer in (of_student, of_judge):
            optimizer.zero_grad()
        (verdict.student + verdict.judge).backward()
        of_student.step()
        of_judge.step()
    assert distance() < 0.2 * before, (before, distance())


class Labelled(GaussianMixtureTeacher):
    """Two classes, with one map of features."""

    def feature_layers(self, net: nn.Module) -> Sequence[nn.Module]:
        return [net.get_submodule("output")]


def test_ends_keep_their_noise_and_conditions() -> None:
    """Some rows of a batch give what they give as a batch of their own, in proportion to their number."""
    means = torch.stack([WIDE, -WIDE])
    teacher = Labelled(means, torch.full((2,), 0.5), torch.ones(2), CosineVP(), conditioning="class")
    part, judge = adversary(teacher), Judge([1], 4)
    samples, points = (torch.randn(6, 1, 8, 8) for _ in range(2))
    cond, draw = teacher.condition([0, 1, 1, 0, 1, 0]), part.draw(torch.Generator().manual_seed(0), 6)
    rows = torch.tensor([1, 3, 4])
    some = part.loss(judge, [Judged(Ends(rows, samples[rows], points[rows], 2.0), draw, cond)], listens=True)
    same, own = ends_of(samples[rows], points[rows]), AdversaryDraw(draw.tau[rows], draw.noise[rows])
    alone, wrong = (
        part.loss(judge, [Judged(same, own, teacher.condition(labels))], listens=True)
        for labels in ([1, 0, 1], [0, 1, 0])
    )
    assert some.student.item() == pytest.approx(1.5 * alone.student.item(), rel=1e-5)
    assert some.judge.item() == pytest.approx(1.5 * alone.judge.item(), rel=1e-5)
    assert torch.allclose(some.pull, alone.pull)
    assert not torch.allclose(some.pull, wrong.pull)
    parts = [Judged(ends_of(samples[a], points[a]), AdversaryDraw(draw.tau[a], draw.noise[a]), cond.rows(a))
             for a in (rows[:1], rows[1:])]  # fmt: skip
    both = part.loss(judge, parts, listens=True)
    assert torch.allclose(both.pull, alone.pull, rtol=1e-4), "parts of a batch are judged as one"
    assert (both.student.item(), both.judge.item()) == pytest.approx(
        (alone.student.item(), alone.judge.item()), rel=1e-5
    )


def test_features_know_nothing_of_a_lora_critic(tiny_teacher: Teacher) -> None:
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.4], dtype=torch.float64)
    tiny_teacher.net.requires_grad_(False)
    features = Features(tiny_teacher)
    before = features(x, t, Cond())
    critic = Critic(tiny_teacher, CorrectionConfig(critic="lora", lora_rank=4))
    with torch.no_grad():
        for parameter in critic.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert critic.lora is not None
    with critic.lora.active():
        after = features(x, t, Cond())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
