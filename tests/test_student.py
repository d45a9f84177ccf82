"""The student: exact at t_min, and where it starts from."""

from __future__ import annotations

import torch

from bootcli.plugin import Cond, Teacher
from bootcli.student import Student


def ones(n: int, t: float = 1.0) -> torch.Tensor:
    return torch.full((n,), t, dtype=torch.float64)


def test_the_time_branch_is_silent_at_t_min_only(tiny_teacher: Teacher) -> None:
    student = Student(tiny_teacher, "x0", t_min=0.02)
    torch.nn.init.normal_(student.time_branch.out.weight)
    eps = torch.randn(3, *tiny_teacher.spec.sample_shape)
    assert torch.equal(student(eps, ones(3, 0.02), Cond()), student.sample(eps, Cond()))
    assert not torch.allclose(student(eps, ones(3, 0.5), Cond()), student.sample(eps, Cond()))


def test_the_native_head_starts_on_the_boundary_condition(tiny_teacher: Teacher) -> None:
    student = Student(tiny_teacher, "native", t_min=0.0)
    eps = torch.randn(3, *tiny_teacher.spec.sample_shape)
    alpha, sigma = tiny_teacher.spec.schedule(ones(1))
    expected = (eps - float(sigma) * tiny_teacher.predict(tiny_teacher.net, eps, ones(3), Cond())) / float(alpha)
    torch.testing.assert_close(student(eps, ones(3, 0.4), Cond()), expected)


def test_an_x0_head_starts_near_the_mean_with_the_features_of_start_t(tiny_teacher: Teacher) -> None:
    student = Student(tiny_teacher, "x0", t_min=0.0)
    eps = torch.randn(4, *tiny_teacher.spec.sample_shape)
    seen: list[torch.Tensor] = []
    student.start_at(torch.tensor([-0.3]), eps, Cond())
    student.borrow_features(0.5, eps, Cond())
    for net, t in ((tiny_teacher.net, 0.5), (student.net, 1.0)):
        layer = tiny_teacher.output_layer(net)
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        tiny_teacher.predict(net, eps, ones(4, t), Cond())
        handle.remove()
    torch.testing.assert_close(seen[0], seen[1])
    assert abs(float(student.sample(eps, Cond()).detach().mean()) + 0.3) < 0.1


def test_a_native_head_too_may_start_with_the_features_of_another_time(tiny_teacher: Teacher) -> None:
    student = Student(tiny_teacher, "native", t_min=0.0)
    eps = torch.randn(4, *tiny_teacher.spec.sample_shape)
    student.borrow_features(0.5, eps, Cond())
    with torch.no_grad():
        borrowed = tiny_teacher.predict(student.net, eps, ones(4), Cond())
        torch.testing.assert_close(borrowed, tiny_teacher.predict(tiny_teacher.net, eps, ones(4, 0.5), Cond()))
