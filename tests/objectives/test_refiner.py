"""Few-step refinement on teachers that are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bootcli.closed_form import GaussianTeacher
from bootcli.config import RefinerConfig
from bootcli.maths.broadcast import like
from bootcli.maths.schedule import CosineVP
from bootcli.objectives.refiner import Refiner
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView
from tests.objectives.closed import MEAN


class Ideal(nn.Module):
    """Draws N(m, s) from noise, and follows the exact path from a noised sample: x_u - alpha m grows as S."""

    def __init__(self, teacher: GaussianTeacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, eps: Tensor, t: Tensor, cond: Cond, start: Tensor | None = None) -> Tensor:
        mean, s = self.teacher.mean.float(), self.teacher.std
        if start is None:
            assert not torch.is_grad_enabled()
            return mean + s * eps
        assert torch.is_grad_enabled()
        alpha, sigma = (like(v, eps) for v in self.teacher.spec.schedule(start))
        width = (alpha**2 * s**2 + sigma**2).sqrt()
        return mean + s * (eps - alpha * mean) / width + self.shift


def refiner(teacher: GaussianTeacher, teacher_steps: int, power: float = 0.0) -> Refiner:
    config = RefinerConfig(share=0.1, teacher_steps=teacher_steps)
    return Refiner(config, power, TeacherView(teacher), 0.0, (0.6, 0.4, 0.2))


def loss(teacher: GaussianTeacher, teacher_steps: int, shift: float = 0.0, power: float = 0.0) -> float:
    part, student = refiner(teacher, teacher_steps, power), Ideal(teacher)
    with torch.no_grad():
        student.shift.fill_(shift)
    return float(part.loss(student, part.draw(torch.Generator().manual_seed(0), 300, 1), Cond()).loss.detach())  # type: ignore[arg-type]


def test_ideal_student_has_no_loss_but_the_solvers() -> None:
    """The target is the end of the teacher's path from the noised sample: of second order in the teacher's steps."""
    teacher = GaussianTeacher(MEAN, 0.5, CosineVP())
    errors = [loss(teacher, steps) ** 0.5 for steps in (8, 16, 32)]
    assert errors[0] < 0.002
    assert 2 < errors[0] / errors[1] < 8
    assert 2 < errors[1] / errors[2] < 8


def test_point_mass_is_exact_and_a_shift_shows_in_full() -> None:
    teacher = GaussianTeacher(MEAN, 0.0, CosineVP())
    assert loss(teacher, 1) < 1e-10
    assert loss(teacher, 1, shift=0.5) == pytest.approx(0.25, rel=1e-4)
    assert loss(teacher, 1, shift=0.5, power=0.5) == pytest.approx(0.5, rel=1e-3)


def test_draw_takes_the_times_in_turn() -> None:
    teacher = TeacherView(GaussianTeacher(MEAN, 0.5, CosineVP()))
    part = Refiner(RefinerConfig(), 0.0, teacher, 0.1, (0.5, 0.3))
    draw = part.draw(torch.Generator().manual_seed(0), 10, 4)
    assert sorted(set(draw.start.tolist())) == pytest.approx([0.3, 0.5])
    assert (draw.start == draw.start[0]).sum() == 5
    taken = part.take(draw, slice(2, 5), torch.device("cpu"))
    assert torch.equal(taken.start, draw.start[2:5])
    assert torch.equal(taken.noise, draw.noise[2:5])


def test_the_teacher_is_asked_once_for_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = GaussianTeacher(MEAN, 0.5, CosineVP())
    part, seen = refiner(teacher, 3), []
    asked = part.teacher.x0

    def counted(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append(float(t[0]))
        return asked(x, t, cond)

    monkeypatch.setattr(part.teacher, "x0", counted)
    part.loss(Ideal(teacher), part.draw(torch.Generator().manual_seed(0), 4, 1), Cond())  # type: ignore[arg-type]
    assert len(seen) == len(set(seen)) == 6  # midpoint: twice a step
