"""FreeFlow's residual at students that are known in closed form, and training that reaches one."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from scipy.stats import linregress
from torch import Tensor, nn

from bootcli.closed_form import GaussianTeacher
from bootcli.config import BootConfig, FreeFlowConfig
from bootcli.maths.schedule import CosineVP, LinearPath, Schedule
from bootcli.objectives.base import PathDraw, Terms
from bootcli.objectives.boot import Boot
from bootcli.objectives.freeflow import FreeFlow, lambda_slope, tau_of
from bootcli.student import Student
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView
from tests.objectives.closed import DDPM, MEAN, SCHEDULES, Exact, noise

Derivative = Literal["difference", "jvp"]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_derivative = pytest.mark.parametrize("derivative", ["difference", "jvp"])


def drawn(delta: float, low: float, high: float, n: int = 16) -> PathDraw:
    s = torch.linspace(low, high, n, dtype=torch.float64)
    return PathDraw(noise(n), torch.zeros(n, dtype=torch.long), s + delta, s, torch.ones(n))


def terms_of(teacher: GaussianTeacher, draw: PathDraw, t_max: float = 1.0, shift: float = 0.0, **config: Any) -> Terms:
    objective = FreeFlow(FreeFlowConfig(**config), TeacherView(teacher), 0.0, t_max)
    return objective.loss(Exact(teacher, t_max, shift), draw, Cond())  # type: ignore[arg-type]


@every_derivative
@every_schedule
def test_zero_at_a_point_mass(schedule: Schedule, derivative: Derivative) -> None:
    terms = terms_of(GaussianTeacher(MEAN, 0.0, schedule), drawn(0.1, 0.1, 0.9), derivative=derivative)
    assert terms.residual.max() < 1e-12


@every_schedule
def test_residual_falls_with_the_difference(schedule: Schedule) -> None:
    """The root mean square of R is of first order in delta: the implicit step is Euler's."""
    teacher, deltas = GaussianTeacher(MEAN, 0.5, schedule), torch.tensor([0.04, 0.02, 0.01])
    residuals = [terms_of(teacher, drawn(float(d), 0.4, 0.7)).residual.mean().sqrt() for d in deltas]
    assert abs(linregress(deltas.log2(), torch.stack(residuals).log2()).slope - 1) < 0.3


@every_schedule
def test_exact_derivative_leaves_no_residual(schedule: Schedule) -> None:
    """At the exact student f - y + dy / dlambda is 0: what is left is rounding."""
    teacher, draw = GaussianTeacher(MEAN, 0.5, schedule), drawn(0.01, 0.3, 0.8)
    assert terms_of(teacher, draw, derivative="jvp").residual.mean().sqrt() < 5e-4
    assert terms_of(teacher, draw, derivative="jvp").residual.mean() < terms_of(teacher, draw).residual.mean() / 100


def test_constant_error_of_a_point_mass_student_is_its_residual() -> None:
    """y = m + c: f - y = -c and dy / dlambda = 0, in units of x_0, as BOOT's."""
    teacher, draw = GaussianTeacher(MEAN, 0.0, CosineVP()), drawn(0.1, 0.2, 0.9)
    for derivative in ("difference", "jvp"):
        assert torch.allclose(terms_of(teacher, draw, shift=0.5, derivative=derivative).residual, torch.tensor(0.25))
    boot = Boot(BootConfig(solver="euler"), TeacherView(teacher), 0.0, 1.0)
    assert torch.allclose(boot.loss(Exact(teacher, 1.0, 0.5), draw, Cond()).residual, torch.tensor(0.25))  # type: ignore[arg-type]


def test_weights() -> None:
    """Those of the paper: power 0 is the mean of (R / tau)^2, power 1 makes every sample's loss 1 and its pull 2 / |R|.
    Ours: a pull of 2 at every time, however large the error."""
    teacher, draw = GaussianTeacher(MEAN, 0.0, LinearPath()), drawn(0.1, 0.2, 0.9)
    plain = terms_of(teacher, draw, shift=0.5, weight="velocity", power=0.0, beta=0.0)
    assert plain.loss.item() == pytest.approx(float((0.25 / draw.s**2).mean()), rel=1e-4)
    scaled = terms_of(teacher, draw, shift=0.5, weight="velocity", power=1.0, beta=0.0)
    assert scaled.loss.item() == pytest.approx(1.0, rel=1e-2)
    assert torch.allclose(scaled.pull, torch.tensor(2 / 0.5), rtol=1e-2)
    for shift in (0.5, 2.0):
        ours = terms_of(teacher, draw, shift=shift, beta=0.0)
        assert ours.loss.item() == pytest.approx(shift, rel=1e-2)
        assert torch.allclose(ours.pull, torch.tensor(2.0), rtol=1e-2)


def test_gradient_is_at_the_cleaner_time_and_the_difference_looks_to_noise() -> None:
    teacher, draw = GaussianTeacher(MEAN, 0.5, CosineVP()), drawn(0.1, 0.2, 0.8)
    asked: list[tuple[bool, set[float]]] = []

    def student(eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        asked.append((torch.is_grad_enabled(), set(t.tolist())))
        return torch.zeros(len(t), 1, 2, 2, requires_grad=True)

    FreeFlow(FreeFlowConfig(), TeacherView(teacher), 0.0, 1.0).loss(student, draw, Cond())  # type: ignore[arg-type]
    cleaner, noisier = set(draw.s.tolist()), set(draw.t.tolist())
    assert asked == [(True, cleaner | {1.0}), (False, noisier)]


@every_schedule
def test_slope_of_lambda(schedule: Schedule) -> None:
    """On the straight path lambda = log(t / (1 - t)); everywhere it integrates to lambda itself."""
    t = torch.linspace(0.2, 0.9, 2001, dtype=torch.float64)
    at = schedule(t[[0, -1]])
    rise = (at.sigma / at.alpha).log().diff().item()
    assert torch.trapezoid(lambda_slope(schedule, t), t).item() == pytest.approx(rise, rel=1e-3)
    if isinstance(schedule, LinearPath):
        assert torch.allclose(lambda_slope(schedule, t), 1 / (t * (1 - t)), rtol=1e-6)
        assert torch.allclose(tau_of(schedule, t), t)


def test_draw_keeps_to_the_range() -> None:
    objective = FreeFlow(FreeFlowConfig(delta=0.1), TeacherView(GaussianTeacher(MEAN, 0.5, DDPM)), 0.0, 0.8)
    draw = objective.draw(torch.Generator().manual_seed(0), 1000, 1, 0.0)
    assert draw.s.min() > 0
    assert draw.t.max() <= 0.8
    gaps = draw.t - draw.s
    assert float(gaps.min()) == pytest.approx(0.04), "half a delta: it is divided by"
    assert torch.allclose((draw.t - draw.s)[draw.t < 0.8], torch.tensor(0.08).double())


@every_derivative
def test_training_reaches_the_exact_solution(derivative: Derivative) -> None:
    teacher = GaussianTeacher(MEAN, 0.5, LinearPath(), "flow")
    objective = FreeFlow(
        FreeFlowConfig(delta=0.05, derivative=derivative, weight="uniform", power=0.0), TeacherView(teacher), 0.0, 1.0
    )
    torch.manual_seed(0)
    student = Student(teacher, "native", t_min=0.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 600)
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def error(at: float) -> float:
        t = torch.full((256,), at, dtype=torch.float64)
        difference = student(noise(256, seed=1), t, Cond()) - teacher.exact_signal(noise(256, seed=1), t)
        return float(difference.square().mean().sqrt())

    assert min(error(0.25), error(0.1)) > 0.25
    for _ in range(600):
        optimizer.zero_grad()
        objective.loss(student, objective.draw(generator, 64, 1, 0.0), Cond()).loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert max(error(at) for at in (1.0, 0.9, 0.5, 0.25)) < 0.1
    if derivative == "difference":  # it damps what an exact derivative carries on undamped, and settles sooner
        assert error(0.1) < 0.1
