"""A student that was trained to refine: drawn from and measured in several calls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bootcli.closed_form import GaussianTeacher
from bootcli.config import DistillConfig, RefinerConfig
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.images import to_uint8
from bootcli.maths.schedule import VarianceExploding
from bootcli.maths.signal_ode import from_signal
from bootcli.pipelines.distill import distill
from bootcli.pipelines.evaluate import evaluate
from bootcli.pipelines.refinement import refinement_starts, refiner_times
from bootcli.pipelines.sample import sample
from bootcli.pipelines.settings import resolve_config
from bootcli.sampler import noises, prior_noise, student_images
from bootcli.store.artifact import load_student
from bootcli.teachers.protocol import Cond


@pytest.fixture(scope="module")
def refined_run(tiny_ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "refined"
    settings = {"teacher": str(tiny_ddpm), "steps": 3, "batch_size": 8, "preview_teacher_steps": 2}
    list(distill(resolve_config({**settings, "refiner.share": 0.25, "watch.every": 0}, {}, {}), run))
    return run


def test_times_are_spread_over_those_that_were_trained(refined_run: Path) -> None:
    artifact = load_student(refined_run)
    teacher, config = artifact.student.teacher, artifact.config
    levels = {1: [], 2: [0.5], 3: [1.1, 0.25], 4: [1.1, 0.5, 0.25]}
    for nfe, expected in levels.items():
        at = teacher.spec.schedule(torch.tensor(refinement_starts(teacher, config, nfe), dtype=torch.float64))
        assert (at.sigma / at.alpha).tolist() == pytest.approx(expected)
    with pytest.raises(UsageError, match="at most 4"):
        refinement_starts(teacher, config, 5)


@pytest.mark.parametrize("sigmas", [(), (0.25, 0.5), (0.5, 0.5), (100.0, 0.5)])
def test_noise_levels_outside_the_path_are_refused(refined_run: Path, sigmas: tuple[float, ...]) -> None:
    artifact = load_student(refined_run)
    config = replace(artifact.config, refiner=replace(artifact.config.refiner, sigmas=sigmas))
    with pytest.raises(UsageError, match="falling, between 0 and"):
        refiner_times(artifact.student.teacher, config)


def test_noise_levels_that_a_teacher_does_not_have_are_refused() -> None:
    """EDM's begin at 0.002, and below there is nothing but clean data."""
    teacher = GaussianTeacher(torch.zeros(1, 4, 4), 0.5, VarianceExploding(), "x0")
    config = DistillConfig(refiner=RefinerConfig(share=0.1, sigmas=(0.5, 0.001)))
    with pytest.raises(UsageError, match=r"falling, between 0\.002 and"):
        refiner_times(teacher, config)
    assert refiner_times(teacher, replace(config, refiner=RefinerConfig(share=0.1, sigmas=(0.5, 0.003))))[-1] > 0


def test_noise_levels_below_the_end_of_the_path_are_refused(refined_run: Path) -> None:
    artifact = load_student(refined_run)
    config = replace(artifact.config, student=replace(artifact.config.student, t_min=0.2))
    with pytest.raises(UsageError, match=r"falling, between 0\.[3-9]"):  # above the least of the usual levels
        refiner_times(artifact.student.teacher, config)


def test_each_call_starts_from_the_last_sample_noised_again(refined_run: Path) -> None:
    student, seeds = load_student(refined_run).student, [3, 4]
    starts = [0.5, 0.25]
    (drawn,) = student_images(student, lambda seeds: Cond(), seeds, 8, Engine("cpu", "no"), starts)
    first, *later = noises(seeds, 3, (1, 8, 8))
    assert torch.equal(first, prior_noise(seeds, (1, 8, 8))), "the first call is that of one-step samples"
    with torch.no_grad():
        z = student.sample(first, Cond())
        for start, noise in zip(starts, later, strict=True):
            t = torch.full((2,), start, dtype=torch.float64)
            x = from_signal(z, noise, student.teacher.spec.schedule(t))
            z = student.teacher.predict(student.net, x, t, Cond())  # an x0 head
    assert torch.equal(drawn, to_uint8(z))


def test_more_calls_have_a_folder_of_their_own(refined_run: Path) -> None:
    one, four = sample(refined_run, num_images=2), sample(refined_run, num_images=2, nfe=4)
    assert (one.nfe, four.nfe) == (1, 4)
    assert four.output == one.output / "nfe-4"
    assert one.files[0].read_bytes() != four.files[0].read_bytes()
    again = sample(refined_run, num_images=1, seed=1, nfe=4, output=refined_run / "again")
    assert again.files[0].name == four.files[1].name


def test_a_student_of_one_step_says_so(tiny_run: Path) -> None:
    with pytest.raises(UsageError, match="one step only"):
        sample(tiny_run, nfe=2)
    with pytest.raises(UsageError, match="--nfe is of the student"):
        sample(tiny_run, nfe=2, teacher_steps=4)
    with pytest.raises(UsageError, match="at least 1"):
        sample(tiny_run, nfe=0)


def test_evaluate_measures_each_number_of_calls(tmp_path: Path) -> None:
    settings: dict[str, object] = {
        "teacher": "fashion", "steps": 1, "batch_size": 8, "preview_teacher_steps": 2, "refiner.share": 0.25,
        "watch.every": 0, "kd.buffer": 8, "kd.teacher_steps": 1, "device": "cpu",
    }  # fmt: skip
    list(distill(resolve_config(settings, {}, {}), tmp_path / "run"))
    result = evaluate(tmp_path / "run", metrics=("fid", "paired"), num_images=16, nfe=(1, 2, 4), device="cpu")
    assert result["student"]["nfe"] == 1  # type: ignore[index]
    assert "paired_mse" in result["student"]  # type: ignore[operator]
    more = result["student_in_more_calls"]
    assert isinstance(more, list)
    assert [row["nfe"] for row in more] == [2, 4]
    assert len({row["fid"] for row in [result["student"], *more]}) == 3
    assert all("paired_mse" not in row for row in more), "later calls draw noise of their own"
    (written,) = (tmp_path / "run" / "evaluations").iterdir()
    assert json.loads(written.read_text())["student_in_more_calls"][0]["nfe"] == 2
