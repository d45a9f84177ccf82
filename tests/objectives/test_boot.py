"""The BOOT loss at students that are known in closed form, and training that reaches one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from scipy.stats import linregress
from torch import Tensor, nn

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher
from bootcli.config import BootConfig
from bootcli.maths.prediction import PredictionType
from bootcli.maths.schedule import CosineVP, LinearPath, Schedule
from bootcli.maths.signal_ode import Solver, step_ratio
from bootcli.objectives.base import PathDraw, Terms
from bootcli.objectives.boot import Boot
from bootcli.student import Student
from bootcli.teachers.protocol import Cond, Head
from bootcli.teachers.view import TeacherView
from tests.objectives.closed import DDPM, MEAN, SCHEDULES, Exact, noise

every_solver = pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def boot_loss(teacher: GaussianTeacher, draw: PathDraw, t_max: float = 1.0, shift: float = 0.0, **config: Any) -> Terms:
    objective = Boot(BootConfig(**config), TeacherView(teacher), 0.0, t_max)
    return objective.loss(Exact(teacher, t_max, shift), draw, Cond())  # type: ignore[arg-type]


def drawn(delta: float, low: float, high: float, n: int = 16) -> PathDraw:
    t = torch.linspace(low, high, n, dtype=torch.float64)
    return PathDraw(noise(n), torch.zeros(n, dtype=torch.long), t, t - delta, torch.ones(n))


@every_solver
@every_schedule
@pytest.mark.parametrize("weight", ["uniform", "velocity", "target"])
def test_zero_at_a_point_mass(schedule: Schedule, solver: Solver, weight: str) -> None:
    """Whatever the step, the solver and the weight: f is constant, so every step is exact."""
    terms = boot_loss(GaussianTeacher(MEAN, 0.0, schedule), drawn(0.2, 0.2, 1.0), solver=solver, weight=weight)
    assert terms.loss.item() == 0.0
    assert not terms.residual.any()


@pytest.mark.parametrize("prediction", get_args(PredictionType))
def test_zero_at_a_point_mass_whatever_is_predicted(prediction: PredictionType) -> None:
    t_max = DDPM.time_of(20.0)
    terms = boot_loss(GaussianTeacher(MEAN, 0.0, DDPM, prediction), drawn(0.2, 0.2, t_max), t_max)
    assert terms.loss.item() < 1e-9  # what is left is float32: the conversion of eps amplifies its rounding by 20


@every_solver
@every_schedule
def test_residual_at_the_gaussian_student_is_of_the_solvers_order(schedule: Schedule, solver: Solver) -> None:
    """The root mean square of R falls as delta for euler and delta^2 for the two-stage solvers."""
    teacher, deltas = GaussianTeacher(MEAN, 0.5, schedule), torch.tensor([0.05, 0.025, 0.0125])
    residuals = [boot_loss(teacher, drawn(float(d), 0.4, 0.7), solver=solver).residual.mean().sqrt() for d in deltas]
    slope = linregress(deltas.log2(), torch.stack(residuals).log2()).slope
    assert abs(slope - (1 if solver == "euler" else 2)) < 0.4


@every_schedule
def test_boundary_is_the_start_of_the_exact_path(schedule: Schedule) -> None:
    t_max = schedule.time_of(20.0)
    teacher, draw = GaussianTeacher(MEAN, 0.5, schedule), drawn(0.1, 0.2, 0.7)
    assert boot_loss(teacher, draw, t_max).parts["boundary"] < 1e-12
    # A constant error shows in full at the boundary; along the path only what a step does not carry on.
    terms = boot_loss(teacher, draw, t_max, shift=0.5, beta=3.0)
    assert terms.parts["boundary"].item() == pytest.approx(3.0 * 0.5**2, rel=1e-5)
    assert terms.loss.item() == pytest.approx(sum(float(part) for part in terms.parts.values()), rel=1e-5)


def test_constant_error_of_a_point_mass_student_is_its_residual() -> None:
    """y = m + c, so target - y_s = (r - 1) c and R = -c: the residual is in units of x_0, whatever the step."""
    teacher = GaussianTeacher(MEAN, 0.0, CosineVP())
    for delta in (0.2, 0.01):
        assert torch.allclose(boot_loss(teacher, drawn(delta, 0.2, 1.0), shift=0.5).residual, torch.tensor(0.25))


def test_weights_are_what_they_say() -> None:
    teacher, draw = GaussianTeacher(MEAN, 0.5, CosineVP()), drawn(0.1, 0.2, 1.0)
    at_t, at_s = CosineVP()(draw.t), CosineVP()(draw.s)
    weights = {
        "uniform": torch.ones(16),
        "velocity": (1 + at_t.alpha / at_t.sigma) ** 2,
        "target": (1 - step_ratio(at_t, at_s)) ** 2,
    }
    for name, w_t in weights.items():
        terms = boot_loss(teacher, draw, weight=name)
        assert terms.parts["bootstrap"].item() == pytest.approx(float((w_t * terms.residual).mean()), rel=1e-5)


def test_velocity_weight_is_held_below_one_step() -> None:
    """The steps that are cut short at t_min must not outweigh the rest: E[1 / max(t, delta)^2] = 2 / delta - 1."""
    teacher = GaussianTeacher(MEAN, 0.0, LinearPath())
    objective = Boot(BootConfig(delta=0.1, weight="velocity"), TeacherView(teacher), 0.0, 1.0)
    draw = objective.draw(torch.Generator().manual_seed(0), 1000, 1, 0.0)
    terms = objective.loss(Exact(teacher, 1.0, shift=0.5), draw, Cond())  # type: ignore[arg-type]
    assert terms.parts["bootstrap"].item() / 0.5**2 == pytest.approx(2 / 0.1 - 1, rel=0.02)


def test_gradient_is_at_the_cleaner_time_and_the_boundary_only() -> None:
    """Downwind gradients diverge: the student's value at t, and the teacher, are constants."""
    teacher, draw = GaussianTeacher(MEAN, 0.5, CosineVP()), drawn(0.1, 0.2, 0.9)
    seen: dict[float, Tensor] = {}

    def student(eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        values = torch.zeros(len(t), 1, 2, 2, requires_grad=True)
        if torch.is_grad_enabled():
            seen.update({float(time): values for time in t})
            seen[-1.0] = values
        return values

    boot = Boot(BootConfig(), TeacherView(teacher), 0.0, 1.0)
    terms = boot.loss(student, draw, Cond())  # type: ignore[arg-type]
    assert seen.keys() == {-1.0, 1.0, *draw.s.tolist()}
    (gradient,) = torch.autograd.grad(terms.loss, seen[-1.0])
    assert gradient.flatten(1).any(1).all()


def test_several_teacher_steps_land_nearer_to_the_path() -> None:
    """One bootstrap step of 0.4 by four teacher steps is as exact as steps of 0.1: some 16 times better at order 2."""
    teacher = GaussianTeacher(MEAN, 0.5, CosineVP())
    one, four = (boot_loss(teacher, drawn(0.4, 0.5, 0.9), teacher_steps=n).residual.mean().sqrt() for n in (1, 4))
    assert 8 < float(one / four) < 22


def test_power_weighs_each_sample_by_its_own_error() -> None:
    """0 is the mean square R^2; 0.5 and 1 divide it by (R^2 + 1e-4)^power, and the pull follows."""
    teacher, draw = GaussianTeacher(MEAN, 0.5, CosineVP()), drawn(0.1, 0.2, 1.0)
    plain = boot_loss(teacher, draw, shift=0.5, beta=0.0)
    for power in (0.5, 1.0):
        terms = boot_loss(teacher, draw, shift=0.5, beta=0.0, power=power)
        weight = (plain.residual + 1e-4) ** -power
        assert terms.loss.item() == pytest.approx(float((weight * plain.residual).mean()), rel=1e-5)
        assert torch.allclose(terms.pull, weight * plain.pull, rtol=1e-5)


def test_power_weighs_what_counts() -> None:
    """With 1 every sample has the same share of the loss, whatever w_t makes of its error."""
    teacher, draw = GaussianTeacher(MEAN, 0.5, CosineVP()), drawn(0.1, 0.2, 1.0)
    for name in ("velocity", "target"):
        at_t, r = CosineVP()(draw.t), step_ratio(CosineVP()(draw.t), CosineVP()(draw.s))
        w_t = (1 + at_t.alpha / at_t.sigma) ** 2 if name == "velocity" else (1 - r) ** 2
        terms = boot_loss(teacher, draw, shift=0.5, beta=0.0, power=1.0, weight=name)
        error = w_t * terms.residual
        assert terms.loss.item() == pytest.approx(float((error / (error + 1e-4)).mean()), rel=1e-5)


def test_pull_is_the_gradient_at_the_output() -> None:
    """The gradient of a constant shift of sample i is pull_i in root mean square, for the sum over samples."""
    teacher, draw = GaussianTeacher(MEAN, 0.0, CosineVP()), drawn(0.1, 0.2, 1.0)
    exact = Exact(teacher, 1.0, shift=0.3)
    terms = Boot(BootConfig(beta=0.0), TeacherView(teacher), 0.0, 1.0).loss(exact, draw, Cond())  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(terms.loss, exact.shift)
    assert float(gradient) == pytest.approx(float(terms.pull.mean()), rel=1e-4)


def test_delta_goes_from_its_first_to_its_last_value() -> None:
    objective = Boot(
        BootConfig(delta=0.4, delta_end=0.1), TeacherView(GaussianTeacher(MEAN, 0.5, CosineVP())), 0.0, 1.0
    )
    steps = []
    for progress in (0.0, 0.5, 1.0):
        draw = objective.draw(torch.Generator().manual_seed(0), 64, 1, progress)
        steps.append(float((draw.t - draw.s).max()))
    assert steps == pytest.approx([0.4, 0.2, 0.1])


def test_time_power_crowds_the_draw() -> None:
    """P(t < t_0) = (t_0 / t_max)^(1 / power)."""
    for power, below in ((1.0, 0.25), (2.0, 0.5), (0.5, 0.0625)):
        config = BootConfig(time_power=power)
        objective = Boot(config, TeacherView(GaussianTeacher(MEAN, 0.5, CosineVP())), 0.0, 1.0)
        t = objective.draw(torch.Generator().manual_seed(0), 1000, 1, 0.0).t
        assert float((t < 0.25).double().mean()) == pytest.approx(below, abs=0.002)


def test_draw_is_stratified_reproducible_and_divisible() -> None:
    teacher = GaussianTeacher(MEAN, 0.5, DDPM)
    objective = Boot(BootConfig(delta=0.1), TeacherView(teacher), 0.05, 0.8)
    draw, again = (objective.draw(torch.Generator().manual_seed(3), 64, 1, 0.0) for _ in range(2))
    assert torch.equal(draw.eps, again.eps)
    assert torch.equal(draw.t, again.t)
    assert draw.s.min() >= 0.05
    assert draw.t.max() < 0.8
    assert torch.allclose(draw.t - draw.s, torch.tensor(0.075).double())
    gaps = draw.t.sort().values.diff()
    assert gaps.max() < 2 * 0.675 / 64
    part = objective.take(draw, slice(8, 24), torch.device("cpu"))
    assert torch.equal(part.eps, draw.eps[8:24])
    assert torch.equal(part.s, draw.s[8:24])


def test_clean_end_has_its_share_of_the_draw() -> None:
    """Where t_min is clean data, steps that would go below it end on it: samples are drawn there."""
    objective = Boot(BootConfig(delta=0.1), TeacherView(GaussianTeacher(MEAN, 0.5, DDPM)), 0.0, 0.8)
    draw = objective.draw(torch.Generator().manual_seed(0), 1000, 1, 0.0)
    assert float((draw.s == 0).double().mean()) == pytest.approx(0.1, abs=0.002)
    assert (draw.t > draw.s).all()
    assert draw.t.min() < 0.002


def test_classes_reach_student_and_teacher() -> None:
    """The closed-form student of each class has no loss on its own class, and has some on the other."""
    means = torch.stack([MEAN, -MEAN])
    teacher = GaussianMixtureTeacher(means, torch.zeros(2), torch.ones(2), CosineVP(), conditioning="class")
    objective = Boot(BootConfig(), TeacherView(teacher), 0.0, 1.0)

    def student(eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return means[cond.tensors["label"]]

    cond = teacher.condition([0] * 8 + [1] * 8)
    assert objective.loss(student, drawn(0.1, 0.2, 1.0), cond).loss == 0  # type: ignore[arg-type]
    swapped = lambda eps, t, cond: student(eps, t, Cond({"label": 1 - cond.tensors["label"]}))  # noqa: E731
    assert objective.loss(swapped, drawn(0.1, 0.2, 1.0), cond).loss > 0.1  # type: ignore[arg-type]


def train(student: Student, objective: Boot, steps: int) -> None:
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        objective.loss(student, objective.draw(generator, 64, 1, 0.0), Cond()).loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("schedule", "prediction", "head"),
    [(LinearPath(), "flow", "native"), (CosineVP(), "v", "native"), (DDPM, "eps", "x0")],
    ids=["flow", "v", "eps"],
)
def test_training_reaches_the_exact_solution(schedule: Schedule, prediction: PredictionType, head: Head) -> None:
    """500 updates bring the root mean square error below 0.05 along the path and 0.13 at its end, from 0.4 to 0.7."""
    teacher, t_max = GaussianTeacher(MEAN, 0.5, schedule, prediction), schedule.time_of(20.0)
    t_max = t_max if prediction == "eps" else 1.0
    torch.manual_seed(0)
    student = Student(teacher, head, t_min=0.0)
    if head == "x0":
        student.start_at(torch.zeros(1), noise(4, seed=0), Cond())

    @torch.no_grad()
    def error(fraction: float) -> float:
        t = torch.full((256,), fraction * t_max, dtype=torch.float64)
        difference = student(noise(256, seed=1), t, Cond()) - teacher.exact_signal(noise(256, seed=1), t, t_max)
        return float(difference.square().mean().sqrt())

    assert min(error(0.05), error(0.0)) > 0.4
    train(student, Boot(replace(BootConfig(), delta=0.1, solver="midpoint"), TeacherView(teacher), 0.0, t_max), 500)
    assert max(error(fraction) for fraction in (1.0, 0.75, 0.5, 0.25, 0.1)) < 0.05
    assert error(0.0) < 0.13
