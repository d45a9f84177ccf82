"""The corrector and its critic, on teachers whose scores are known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher
from bootcli.companion import Balance, Companion
from bootcli.config import CorrectionConfig, resolve
from bootcli.critic import Critic
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.maths.schedule import CosineVP, VarianceExploding
from bootcli.objectives.corrector import Correction, Corrector, own_weight
from bootcli.student import Student
from bootcli.teachers.protocol import Cond, Teacher
from bootcli.teachers.view import TeacherView
from tests.objectives.closed import DDPM, MEAN


class Constant(nn.Module):
    """A student that draws a Gaussian: mean + std * eps."""

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(mean.clone()), nn.Parameter(torch.tensor(std))

    def forward(self, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert not t.any()
        return self.mean + self.std * eps


def corrector(teacher: Teacher, **config: Any) -> Corrector:
    return Corrector(CorrectionConfig(**config), TeacherView(teacher), 0.0, 1.0)


def corrected(
    teacher: Teacher, student: nn.Module, critic: nn.Module, n: int = 4096, *, listens: bool = True, **config: Any
) -> Correction:
    part = corrector(teacher, **config)
    draw = part.draw(torch.Generator().manual_seed(0), n, 1)
    return part.loss(student, critic, draw, Cond(), listens=listens)  # type: ignore[arg-type]


def companion(critic: Critic) -> Companion:
    config = resolve({"device": "cpu", "mixed_precision": "no", "learning_rate": 1e-3})
    return Companion(critic, config.correction, config, Engine("cpu", "no"))


@pytest.mark.parametrize("direction", ["score", "identity"])
def test_nothing_to_correct_where_critic_and_teacher_agree(direction: str) -> None:
    teacher = GaussianTeacher(MEAN, 0.5, CosineVP())
    student = Constant(MEAN, 0.5)
    result = corrected(teacher, student, Critic(teacher, CorrectionConfig()), direction=direction)
    assert result.student == 0
    assert not result.gap.any()


@pytest.mark.parametrize("direction", ["score", "identity"])
@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_direction_leads_from_the_critics_gaussian_to_the_teachers(prediction: Any, direction: str) -> None:
    """With the exact critic of N(m', s'), descent moves the mean towards m and the width towards s."""
    teacher = GaussianTeacher(MEAN, 0.5, CosineVP(), prediction)
    for mean, std in ((MEAN + 0.3, 0.5), (MEAN - 0.3, 0.5), (MEAN, 0.8), (MEAN, 0.3)):
        student = Constant(mean, std)
        critic = Critic(GaussianTeacher(mean, std, CosineVP(), prediction), CorrectionConfig())
        corrected(teacher, student, critic, direction=direction).student.backward()
        assert student.mean.grad is not None
        assert student.std.grad is not None
        if mean is MEAN:
            assert torch.sign(student.std.grad) == (1 if std > 0.5 else -1)
        else:
            assert (student.mean.grad * (mean - MEAN) > 0).all()


@pytest.mark.parametrize("direction", ["score", "identity"])
def test_each_network_gets_its_own_gradient_only(direction: str) -> None:
    teacher = GaussianTeacher(MEAN, 0.5, CosineVP())
    student, critic = Constant(MEAN + 0.3, 0.5), Critic(teacher, CorrectionConfig())
    with torch.no_grad():
        critic.net.get_parameter("means").add_(0.2)
    result = corrected(teacher, student, critic, direction=direction)
    result.student.backward(retain_graph=True)
    assert all(p.grad is None for p in critic.parameters())
    before = student.mean.grad.clone()  # type: ignore[union-attr]
    result.critic.backward()
    assert torch.equal(student.mean.grad, before)  # type: ignore[arg-type]
    assert critic.net.get_parameter("means").grad is not None
    assert all(p.grad is None for p in teacher.net.parameters())
    assert not corrected(teacher, student, critic, listens=False, direction=direction).student.requires_grad


def test_identity_direction_is_the_gradient_through_both_denoisers() -> None:
    """Of ``(f - f_g) . ((f - x) - alpha (f - f_g)) / mean |x - f|``, with the known slopes of a Gaussian's denoiser."""
    schedule, alpha = CosineVP(), 0.7
    teacher, student = GaussianTeacher(MEAN, 0.5, schedule), Constant(MEAN + 0.3, 0.8)
    critic = Critic(GaussianTeacher(MEAN + 0.3, 0.8, schedule), CorrectionConfig())
    part = corrector(teacher, direction="identity", alpha=alpha)
    draw = part.draw(torch.Generator().manual_seed(0), 8, 1)
    result = part.loss(student, critic, draw, Cond(), listens=True)  # type: ignore[arg-type]

    at = schedule(draw.tau[:, 0])
    a, sigma = (c.float()[:, None, None, None] for c in at)
    x = student(draw.eps, torch.zeros(8), Cond())
    x_tau = a * x + sigma * draw.noise[:, 0]
    slope, slope_g = (a * s**2 / (a**2 * s**2 + sigma**2) for s in (0.5, 0.8))
    f, f_g = (m + k * (x_tau - a * m) for m, k in ((MEAN, slope), (MEAN + 0.3, slope_g)))
    d, d_slope = f - f_g, a * (slope - slope_g)
    gradient = d_slope * (f - x - alpha * d) + d * (a * slope - 1 - alpha * d_slope)
    scale = (x - f).abs().flatten(1).mean(1)[:, None, None, None] + 1e-4
    assert torch.allclose(result.pull, 2 * (gradient / scale).square().flatten(1).mean(1).sqrt(), rtol=1e-3)
    result.student.backward()
    assert student.mean.grad is not None
    assert torch.allclose(student.mean.grad, 2 * (gradient / scale).sum(0) / gradient.numel(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "eps"])
def test_critic_learns_the_denoiser_of_the_samples(prediction: Any) -> None:
    """Its loss has its minimum at the exact denoiser of the student's own distribution."""
    schedule = DDPM if prediction == "eps" else CosineVP()
    teacher = GaussianTeacher(MEAN, 0.5, schedule, prediction)
    student = Constant(MEAN + 0.4, 0.7)
    exact = Critic(GaussianTeacher(MEAN + 0.4, 0.7, schedule, prediction), CorrectionConfig())
    best = float(corrected(teacher, student, exact).critic)
    for mean, std in ((MEAN, 0.5), (MEAN + 0.4, 0.5), (MEAN + 0.3, 0.7), (MEAN + 0.5, 0.7)):
        other = Critic(GaussianTeacher(mean, std, schedule, prediction), CorrectionConfig())
        assert float(corrected(teacher, student, other).critic) > best


def test_critics_errors_weigh_as_in_the_training_of_its_kind() -> None:
    """EDM's lambda for what predicts x_0, by its formula at sigma_data 1/2; nothing for the others."""
    at = VarianceExploding()(torch.tensor([0.1, 0.4, 1.0], dtype=torch.float64))
    expected = [(s**2 + 0.25) / (0.5 * s) ** 2 for s in at.sigma.tolist()]
    assert own_weight("x0", at).tolist() == pytest.approx(expected)
    assert own_weight("eps", at).tolist() == [1, 1, 1]
    teacher = GaussianTeacher(MEAN, 0.5, VarianceExploding(), "x0")
    critic = Critic(GaussianTeacher(MEAN, 0.7, VarianceExploding(), "x0"), CorrectionConfig())
    part, student = corrector(teacher), Constant(MEAN, 0.7)
    draw = part.draw(torch.Generator().manual_seed(0), 8, 1)
    sigma = teacher.spec.schedule(draw.tau[:, 0]).sigma
    samples = student(draw.eps, torch.zeros(8, dtype=torch.float64), Cond())
    x_tau = samples + sigma[:, None, None, None].float() * draw.noise[:, 0]
    errors = (critic(x_tau, draw.tau[:, 0], Cond()) - samples).square().flatten(1).mean(1)
    weighted = (errors * (sigma**2 + 0.25) / (0.5 * sigma) ** 2).mean()
    found = part.loss(student, critic, draw, Cond(), listens=True).critic  # type: ignore[arg-type]
    assert float(found) == pytest.approx(float(weighted), rel=1e-4)


@pytest.mark.parametrize("direction", ["score", "identity"])
def test_student_and_critic_reach_the_teachers_gaussian(direction: str) -> None:
    """From a wrong mean and width, with a critic that learns beside it."""
    teacher = GaussianTeacher(MEAN, 0.5, CosineVP())
    student, critic = Constant(MEAN + 0.5, 1.0), Critic(teacher, CorrectionConfig())
    part, generator = corrector(teacher, direction=direction), torch.Generator().manual_seed(0)
    of_critic = torch.optim.Adam([critic.net.get_parameter("means"), critic.net.get_parameter("stds")], lr=3e-2)
    of_student = torch.optim.Adam(student.parameters(), lr=5e-3)
    for step in range(500):
        result = part.loss(student, critic, part.draw(generator, 128, 1), Cond(), listens=step >= 50)  # type: ignore[arg-type]
        (result.critic + (result.student if step >= 50 else 0)).backward()
        of_critic.step()
        if step >= 50:
            of_student.step()
        of_critic.zero_grad()
        of_student.zero_grad()
    assert (student.mean - MEAN).abs().max() < 0.05
    assert abs(float(student.std) - 0.5) < 0.05


def test_draw_is_stratified_and_reaches_the_highest_noise() -> None:
    part = corrector(GaussianTeacher(MEAN, 0.5, CosineVP()), levels=2, tau_power=0.5)
    draw, again = (part.draw(torch.Generator().manual_seed(0), 500, 3) for _ in range(2))
    assert torch.equal(draw.noise, again.noise)
    assert draw.tau.shape == (500, 2)
    assert draw.tau.max() > 0.999
    assert draw.tau.min() > 0
    assert float((draw.tau < 0.505).double().mean()) == pytest.approx(0.25, abs=0.01)
    part_of_it = part.take(draw, slice(3, 7), torch.device("cpu"))
    assert torch.equal(part_of_it.tau, draw.tau[3:7])
    assert torch.equal(part_of_it.noise, draw.noise[3:7])
    assert set(draw.rows.tolist()) == {0, 1, 2}


def test_teacher_is_guided_within_the_interval_only() -> None:
    means = torch.stack([MEAN, -MEAN])
    teacher = GaussianMixtureTeacher(means, torch.ones(2) * 0.3, torch.ones(2), CosineVP(), conditioning="class")
    view = TeacherView(teacher, 3.0, teacher.condition([None]))
    plain, cond = TeacherView(teacher), teacher.condition([0, 0])
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([0.3, 0.9], dtype=torch.float64)  # levels 0.34 and 0.86
    some = view.within((0.0, 0.7)).x0(x, t, cond)
    assert torch.equal(some[0], view.x0(x, t, cond)[0])
    assert torch.equal(some[1], plain.x0(x, t, cond)[1])
    assert not torch.equal(view.x0(x, t, cond)[1], plain.x0(x, t, cond)[1])
    assert Corrector(CorrectionConfig(), view, 0.0, 1.0).teacher.interval == (0.0, 0.7)


def test_balance_is_the_mean_of_the_updates_so_far() -> None:
    balance = Balance()
    assert balance.ratio == 0
    for prediction in (2.0, 4.0, 6.0):
        balance = balance.updated(prediction, 2.0)
    assert balance.ratio == pytest.approx(2.0)
    for _ in range(200):
        balance = balance.updated(1.0, 4.0)
    assert balance.ratio == pytest.approx(0.25, rel=1e-3)
    assert Balance().updated(1.0, 0.0).ratio < 1000, "a critic that is still the teacher"


@pytest.mark.parametrize("direction", ["score", "identity"])
def test_pull_is_the_same_while_the_critic_warms_up(direction: str) -> None:
    """So that the balance fits from the first update at which the student listens."""
    teacher, student = GaussianTeacher(MEAN, 0.5, CosineVP()), Constant(MEAN + 0.3, 0.5)
    critic = Critic(GaussianTeacher(MEAN + 0.3, 0.8, CosineVP()), CorrectionConfig())
    first, later = (corrected(teacher, student, critic, 8, listens=on, direction=direction) for on in (False, True))
    assert torch.allclose(first.pull, later.pull)
    assert first.pull.mean() > 0.01


def test_lora_critic_shares_the_teachers_weights(tiny_teacher: Teacher) -> None:
    """It begins as the teacher, learns beside it, and leaves the teacher's own answer as it was."""
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7], dtype=torch.float64), Cond()
    tiny_teacher.net.requires_grad_(False)
    with torch.no_grad():
        before = tiny_teacher.predict(tiny_teacher.net, x, t, cond)
    student = Student(tiny_teacher, "x0", 0.0)
    frozen = {p.data_ptr() for p in tiny_teacher.net.parameters()}
    critic = Critic(tiny_teacher, CorrectionConfig(critic="lora", lora_rank=1))
    assert frozen <= {p.data_ptr() for p in critic.net.parameters()}
    assert (
        0
        < sum(p.numel() for p in critic.parameters() if p.requires_grad)
        < sum(p.numel() for p in student.net.parameters()) / 4
    )
    assert torch.allclose(critic(x, t, cond), before, atol=1e-6)

    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        critic(x, t, cond).square().mean().backward()
        optimizer.step()
    assert (critic(x, t, cond) - before).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(tiny_teacher.predict(tiny_teacher.net, x, t, cond), before)


def test_critic_state_round_trip(tiny_teacher: Teacher) -> None:
    for kind in ("full", "lora"):
        teacher = copy.deepcopy(tiny_teacher)
        critic = Critic(teacher, CorrectionConfig(critic=kind))  # type: ignore[arg-type]
        with torch.no_grad():
            for p in critic.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        other = Critic(copy.deepcopy(tiny_teacher), CorrectionConfig(critic=kind))  # type: ignore[arg-type]
        state = companion(critic).state("critic")
        learned = critic.net if critic.lora is None else critic.lora
        assert len(state) == len(list(learned.parameters())), "only what learns"
        companion(other).load_state("critic", state)
        assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), other.parameters(), strict=True))


def test_lora_needs_modules_to_adapt() -> None:
    with pytest.raises(UsageError, match="no modules for a LoRA"):
        Critic(GaussianTeacher(MEAN, 0.5, CosineVP()), CorrectionConfig(critic="lora"))
