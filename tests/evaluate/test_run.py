"""The whole evaluation: its report, its seeds, its notes, and what it keeps."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.evaluate import features_of
from bootcli.manifold import manifold_of, precision_recall, some_rows
from bootcli.pipelines import evaluate as pipeline
from bootcli.pipelines.scoring import FIRST_SEED
from bootcli.plugin import Cond, FeatureSpace, Teacher
from bootcli.reference import OTHER_NOISE, reference_for
from bootcli.sampler import noises, student_images, teacher_images
from bootcli.store.artifact import load_student
from bootcli.store.tensors import read_tensors
from bootcli.teachers.registry import Loaded
from bootcli.teachers.view import TeacherView

from .conftest import CPU, DIM


@pytest.fixture
def at_hand(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """The run's teacher, with its feature space."""
    loaded = Loaded(teacher, None, "tiny", "test")  # type: ignore[arg-type]  # the family is not asked for
    monkeypatch.setattr(pipeline, "load", lambda name: loaded)
    return teacher


def test_an_evaluation_says_all_it_takes_to_repeat_it(at_hand: Teacher, tiny_run: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = pipeline.evaluate(
        tiny_run,
        num_images=8,
        repeats=2,
        teacher_steps=(1, 3),
        batch_size=5,
        device="cpu",
        progress=lambda *facts: seen.append(facts),
    )
    student, teacher = result["student"], result["teacher"]
    assert isinstance(student, dict)
    assert isinstance(teacher, list)
    assert [(row["steps"], row["nfe"]) for row in teacher] == [(1, 1), (3, 3)]
    for row in (student, *teacher):
        assert row["fid"] == pytest.approx(sum(row["fid_repeats"]) / 2)
        assert row["fid_std"] > 0
    assert student["nfe"] == 1
    assert student.keys() == {"nfe", "fid", "fid_std", "fid_repeats"}
    assert (result["metrics"], result["feature_space"]) == (["fid"], "corners-5")
    assert (result["manifold"], result["paired"]) == (None, None)
    assert result["reference"] == {
        "feature_space": "corners-5",
        "dimensions": DIM,
        "source": "made up",
        "num_images": 1000,
        "floor": {"num_images": 10, "fid": 0.5},
    }
    assert result["sampler"] == {
        "method": "ddim",
        "eta": 0.0,
        "timestep_spacing": "trailing",
        "use_clipped_model_output": True,
        "threshold": "Clip(bound=1.0)",
        "guidance_scale": 1.0,
        "precision": "float32",
    }
    assert [facts[1:] for facts in seen if facts[0] == "student"] == [(5, 16), (8, 16), (13, 16), (16, 16)]
    (written,) = (tiny_run / "evaluations").glob("fid-*.json")
    assert json.loads(written.read_text()) == json.loads(json.dumps(result))
    written.unlink()


def test_numbers_are_told_where_they_cannot_be_kept(
    at_hand: Teacher, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(pipeline, "write_json", full)
    result = pipeline.evaluate(tiny_run, num_images=8, device="cpu")
    assert result["notes"][-1] == "These numbers were not kept in the run: Read-only file system."  # type: ignore[index]
    monkeypatch.undo()


def test_each_evaluation_has_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "now")
    for number in range(3):
        pipeline._keep(tmp_path, "fid", {"number": number})
    kept = {file.name: json.loads(file.read_text())["number"] for file in tmp_path.iterdir()}
    assert kept == {"fid-now.json": 0, "fid-now-2.json": 1, "fid-now-3.json": 2}


def seeds_drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every seed that noise is drawn from, in order."""
    drawn: list[int] = []

    def spy(seeds: Any, count: int, shape: tuple[int, int, int]) -> Tensor:
        drawn.extend(seeds)
        return noises(seeds, count, shape)

    monkeypatch.setattr("bootcli.sampler.noises", spy)
    return drawn


def test_student_and_teacher_share_seeds_and_repeats_do_not(
    at_hand: Teacher, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = seeds_drawn(monkeypatch)
    file = tiny_run / "student" / "student.safetensors"
    pipeline.evaluate(file, num_images=6, seed=40, repeats=3, teacher_steps=(1,), batch_size=4, device="cpu")
    assert drawn == [*range(40, 58)] * 2


def test_noise_that_is_called_other_is(tmp_path: Path) -> None:
    """A generator looks at 32 bits of its seed alone."""
    seeds = [0, FIRST_SEED, OTHER_NOISE, FIRST_SEED + OTHER_NOISE]
    (drawn,) = noises(seeds, 1, (1, 2, 2))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_the_teachers_own_images_are_a_reference(
    at_hand: Teacher, own_space: FeatureSpace, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the conditions of the student's, from other noise; kept, they are the same reference again."""
    drawn = seeds_drawn(monkeypatch)
    asked: dict[str, Any] = {"metrics": ("fid", "pr"), "num_images": 12, "seed": 7, "repeats": 2, "device": "cpu"}
    seen: list[tuple[str, int, int]] = []
    file, kept = tiny_run / "student" / "student.safetensors", tmp_path / "kept.safetensors"
    result = pipeline.evaluate(
        file, reference="teacher", save_reference=kept, batch_size=8, progress=lambda *f: seen.append(f), **asked
    )
    assert drawn == [*range(2**30 + 7, 2**30 + 19), *range(7, 31)]
    assert [facts[1:] for facts in seen if "compare" in facts[0]] == [(8, 12), (12, 12)]
    view = TeacherView(at_hand)
    seeds = range(2**30 + 7, 2**30 + 19)
    images = teacher_images(view, 50, lambda seeds: Cond(), seeds, 12, Engine("cpu", "no"))
    mean = features_of(images, own_space.network, CPU).double().mean(0)
    stored, facts = read_tensors(kept)
    torch.testing.assert_close(stored["mean"], mean, atol=0.2, rtol=0)  # a level may round another way
    assert (facts["source"], facts["num_images"]) == ("the teacher's own, 50 steps", 12)
    again = pipeline.evaluate(file, reference=str(kept), **asked)
    assert again["student"] == result["student"]


def test_all_metrics_of_a_set_of_images_are_of_one_drawing(
    at_hand: Teacher, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = seeds_drawn(monkeypatch)
    asked: dict[str, Any] = {"num_images": 6, "repeats": 2, "teacher_steps": (2,), "batch_size": 4, "device": "cpu"}
    both = pipeline.evaluate(tiny_run, metrics=["pr", "fid"], **asked)
    assert drawn == [*range(12)] * 2
    assert both["metrics"] == ["fid", "pr"], "in one order, whatever the order they were asked in"
    (written,) = (tiny_run / "evaluations").glob("fid-pr-2*.json")
    written.unlink()
    file = tiny_run / "student" / "student.safetensors"
    for metric, names in {"fid": ["fid"], "pr": ["precision", "recall"]}.items():
        alone = pipeline.evaluate(file, metrics=[metric], **asked)
        rows = [alone["student"], *alone["teacher"]]  # type: ignore[misc]
        for row, same in zip(rows, [both["student"], *both["teacher"]], strict=True):  # type: ignore[misc]
            for key in [name + end for name in names for end in ("", "_std", "_repeats")]:
                assert row[key] == same[key]
        assert not {"fid", "precision", "recall"} - set(names) & rows[0].keys()


def test_precision_and_recall_are_of_as_many_images_of_both(
    at_hand: Teacher, own_space: FeatureSpace, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_space.features is not None
    artifact = load_student(tiny_run)
    images = list(student_images(artifact.student, lambda seeds: Cond(), range(50), 25, Engine("cpu", "no")))
    drawn = features_of(images, own_space.network, CPU)
    for num_images, most, compared in ((30, 10_000, 30), (50, 10_000, 40), (50, 20, 20)):
        monkeypatch.setattr(pipeline, "MOST_ROWS", most)
        result = pipeline.evaluate(
            tiny_run / "student" / "student.safetensors", metrics=["pr"], num_images=num_images, device="cpu"
        )
        real, generated = some_rows(own_space.features, compared), some_rows(drawn[:num_images], compared)
        expected = precision_recall(manifold_of(real), manifold_of(generated))
        student = result["student"]
        assert isinstance(student, dict)
        assert student["precision"] == pytest.approx(expected.precision, abs=0.06)  # a level may round another way
        assert student["recall"] == pytest.approx(expected.recall, abs=0.06)
        assert result["manifold"] == {"images": compared, "neighbours": 3}
        assert f"{compared} images of each set" in " ".join(result["notes"])  # type: ignore[arg-type]


def test_a_reference_of_too_few_images_for_precision_and_recall(
    at_hand: Teacher, own_space: FeatureSpace, tiny_run: Path
) -> None:
    few = dataclasses.replace(own_space, features=torch.zeros(3, DIM))
    at_hand.feature_space = lambda: few  # type: ignore[method-assign]
    with pytest.raises(BootError, match="made up: precision and recall need more than 3 images"):
        pipeline.evaluate(tiny_run, metrics=["pr"], num_images=8, device="cpu")


def test_the_batch_size_changes_nothing(at_hand: Teacher, tiny_run: Path) -> None:
    file = tiny_run / "student" / "student.safetensors"
    small, large = (pipeline.evaluate(file, num_images=12, batch_size=n, device="cpu") for n in (5, 12))
    assert small["student"]["fid"] == pytest.approx(large["student"]["fid"], rel=1e-3)  # type: ignore[index]


def test_notes_warn_of_numbers_that_mislead(at_hand: Teacher, tiny_run: Path) -> None:
    file = tiny_run / "student" / "student.safetensors"
    notes = " ".join(pipeline.evaluate(file, num_images=4, device="cpu")["notes"])  # type: ignore[arg-type]
    for part in ("not comparable with Inception", "4 images of the student", "--repeats"):
        assert part in notes


@pytest.mark.parametrize(("num_images", "nearest"), [(4, 5), (70, 100)])
def test_the_floor_is_that_of_the_nearest_number_of_images(
    teacher: Teacher, own_space: FeatureSpace, num_images: int, nearest: int
) -> None:
    own = dataclasses.replace(own_space, floor={5: 0.5, 100: 0.1})
    teacher.feature_space = lambda: own  # type: ignore[method-assign]
    facts = pipeline._facts(reference_for(teacher, None, CPU), num_images)
    assert facts["floor"] == {"num_images": nearest, "fid": own.floor[nearest]}


def test_steps_that_the_teacher_lacks_are_refused_before_any_image(at_hand: Teacher, tiny_run: Path) -> None:
    seen: list[object] = []
    with pytest.raises(UsageError, match="no 100000 timesteps"):
        pipeline.evaluate(tiny_run, num_images=4, teacher_steps=(1, 100_000), device="cpu", progress=seen.append)  # type: ignore[arg-type]
    assert not seen


@pytest.mark.parametrize(
    "wrong",
    [
        {"metrics": ["fid", "kid"]},
        {"metrics": []},
        {"metrics": ["pr"], "num_images": 3},
        {"num_images": 1},
        {"repeats": 0},
        {"teacher_steps": (4, 0)},
        {"batch_size": 0},
    ],
)
def test_impossible_requests_are_usage_errors(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        pipeline.evaluate(tmp_path / "missing", **wrong)


def test_statistics_can_be_kept_for_later(
    at_hand: Teacher, tiny_run: Path, pictures: tuple[Path, Tensor], tmp_path: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    file = tiny_run / "student" / "student.safetensors"
    settings: dict[str, Any] = {"metrics": ["fid", "pr"], "num_images": 8, "device": "cpu"}
    first = pipeline.evaluate(file, reference=str(pictures[0]), save_reference=kept, **settings)
    again = pipeline.evaluate(file, reference=str(kept), **settings)
    assert first["student"]["fid"] == pytest.approx(again["student"]["fid"])  # type: ignore[index]
    for name in ("precision", "recall"):
        assert first["student"][name] == again["student"][name]  # type: ignore[index]
    assert again["reference"]["num_images"] == 12  # type: ignore[index]
    with pytest.raises(UsageError, match=r"\.safetensors"):
        pipeline.evaluate(file, save_reference=tmp_path / "kept.npz", **settings)
    with pytest.raises(UsageError, match="is there already"):
        pipeline.evaluate(file, save_reference=file, **settings)
