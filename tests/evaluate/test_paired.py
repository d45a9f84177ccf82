"""The error between student and teacher from the same noise: known students, by hand, and through the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bootcli.closed_form import GaussianTeacher
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.maths.schedule import DiscreteVP, LinearPath
from bootcli.pipelines import evaluate as pipeline
from bootcli.pipelines.defaults import start_time
from bootcli.plugin import Cond, Teacher
from bootcli.reference import OWN_STEPS
from bootcli.sampler import paired_errors, path_ends, prior_noise, teacher_endpoint
from bootcli.store.artifact import load_student
from bootcli.student import Student
from bootcli.teachers.registry import Loaded, load
from bootcli.teachers.view import TeacherView

SHAPE = (1, 2, 2)
Sample = Callable[[Tensor, Cond], Tensor]


def point(mean: float) -> Teacher:
    """Every path of this teacher ends at ``mean``."""
    return GaussianTeacher(torch.full(SHAPE, mean), 0.0, LinearPath())


def errors(teacher: Teacher, sample: Sample, batch_size: int = 4) -> Tensor:
    """Of nine seeds, of a student that samples as told."""
    student = Student(teacher, "native", 0.0)
    student.sample = sample  # type: ignore[method-assign]
    seeds, engine = range(20, 29), Engine("cpu", "no")
    ends = list(path_ends(TeacherView(teacher), 1.0, 5, lambda seeds: Cond(), seeds, batch_size, engine))
    assert {len(batch) for batch in ends[:-1]} <= {batch_size}
    return torch.cat(list(paired_errors(student, ends, lambda seeds: Cond(), seeds, engine)))


def test_a_student_at_the_end_of_the_path_has_no_error() -> None:
    broad = GaussianTeacher(torch.full(SHAPE, 0.5), 2.0, LinearPath())
    view = TeacherView(broad)
    found = errors(broad, lambda eps, cond: teacher_endpoint(view, eps, cond, 1.0, 5))
    assert found.tolist() == [0.0] * 9


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_errors_by_hand(batch_size: int) -> None:
    found = errors(point(0.7), lambda eps, cond: torch.full_like(eps, 1.2), batch_size)
    assert found.tolist() == pytest.approx([0.25] * 9, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_each_seed_has_its_own_error(batch_size: int) -> None:
    found = errors(point(-2.0), lambda eps, cond: eps - 2, batch_size)
    expected = prior_noise(range(20, 29), SHAPE).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)


# -- through the pipeline ---------------------------------------------------------------------------------------------


def test_the_pipeline_pairs_its_own_seeds_with_the_teachers_endpoint(tiny_run: Path) -> None:
    """The tiny teacher has no feature space: the paired error needs none."""
    file = tiny_run / "student" / "student.safetensors"
    settings: dict[str, Any] = {"num_images": 3, "seed": 7, "repeats": 2, "batch_size": 2, "device": "cpu"}
    result = pipeline.evaluate(file, metrics=["paired"], teacher_steps=(1,), **settings)
    artifact = load_student(file)
    teacher = load(artifact.config.teacher).teacher
    t_max = start_time(teacher, artifact.config)
    eps = prior_noise(range(7, 13), teacher.spec.sample_shape)
    with torch.no_grad():
        ends = teacher_endpoint(TeacherView(teacher), eps, Cond(), t_max, OWN_STEPS)
        square = (artifact.student.sample(eps, Cond()) - ends).square()
    student = result["student"]
    assert isinstance(student, dict)
    assert student["paired_mse"] == pytest.approx(float(square.mean()), rel=1e-4)
    assert student["paired_mse_repeats"] == pytest.approx([float(half.mean()) for half in square.chunk(2)], rel=1e-4)
    assert student["paired_mse_std"] > 0
    assert student.keys() == {"nfe", "paired_mse", "paired_mse_std", "paired_mse_repeats"}
    assert (result["metrics"], result["paired"]) == (["paired"], {"teacher_steps": 50, "t_max": t_max})
    assert (result["feature_space"], result["reference"], result["manifold"]) == (None, None, None)
    assert result["teacher"] == []


def test_classes_are_those_of_the_seeds(class_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    predict = Student.sample

    def spy(student: Student, eps: Tensor, cond: Cond) -> Tensor:
        asked.append(next(iter(cond.tensors.values())).tolist())
        return predict(student, eps, cond)

    monkeypatch.setattr(Student, "sample", spy)
    pipeline.evaluate(class_run, metrics=["paired"], num_images=5, seed=1, batch_size=5, device="cpu")
    assert asked == [[3, 1, 3, 1, 3]]


def test_a_teacher_of_too_few_timesteps_cannot_be_paired(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = GaussianTeacher(torch.zeros(1, 8, 8), 0.5, DiscreteVP((0.9, 0.5, 0.1)))
    loaded = Loaded(short, None, "short", "test")  # type: ignore[arg-type]  # the family is not asked for
    monkeypatch.setattr(pipeline, "load", lambda name: loaded)
    with pytest.raises(UsageError, match="--metric paired: The teacher has no 50 timesteps"):
        pipeline.evaluate(tiny_run, metrics=["paired"], num_images=4, device="cpu")


@pytest.mark.parametrize("wrong", [{"reference": "somewhere"}, {"save_reference": Path("kept.safetensors")}])
def test_a_reference_that_nothing_is_compared_with_is_refused(wrong: dict[str, Any], tiny_run: Path) -> None:
    with pytest.raises(UsageError, match="no reference is read"):
        pipeline.evaluate(tiny_run, metrics=["paired"], device="cpu", **wrong)
