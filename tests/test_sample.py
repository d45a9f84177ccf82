"""`sample`: files by seed, whatever the batch size; requests that cannot be honoured."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from bootcli.config import from_dict, to_dict
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.pipelines import sample as pipeline
from bootcli.pipelines.requests import condition_of
from bootcli.pipelines.sample import sample
from bootcli.plugin import Cond, Teacher
from bootcli.prompts import Prompt, Prompts
from bootcli.sampler import prior_noise, student_images, teacher_images
from bootcli.store.artifact import find_artifact, load_student
from bootcli.store.rundir import RunDir
from bootcli.store.tensors import read_tensors, write_tensors
from bootcli.student import Student
from bootcli.teachers.registry import load
from bootcli.teachers.view import TeacherView

Pixels = npt.NDArray[np.int64]


def pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.array(image).astype(np.int64)


def same(one: Path, two: Path) -> bool:
    """Equal up to rounding, which may differ with the batch size."""
    return bool(np.abs(pixels(one) - pixels(two)).max() <= 1)


def test_one_file_per_seed_and_a_grid(tiny_run: Path, tmp_path: Path) -> None:
    counted: list[tuple[int, int]] = []
    out = tmp_path / "new" / "out"
    drawn = sample(tiny_run, num_images=5, seed=7, batch_size=2, output=out, progress=lambda *n: counted.append(n))
    names = ["000007.png", "000008.png", "000009.png", "000010.png", "000011.png"]
    assert [path.name for path in drawn.files] == names
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid.png"]
    assert counted == [(2, 5), (4, 5), (5, 5)]
    assert (drawn.nfe, drawn.source, drawn.output) == (1, "student", out)
    assert drawn.seconds > 0
    assert drawn.write_seconds > 0
    tile = 64 // 8
    assert pixels(drawn.grid).shape == ((2 * 9 + 1) * tile, (3 * 9 + 1) * tile), "enlarged, so that it can be seen"
    with Image.open(drawn.files[1]) as image:
        assert image.size == (8, 8)
        assert image.info["seed"] == "8"
        assert image.info["training_steps"] == str(load_student(tiny_run).step)
        assert image.info["Software"].startswith("bootcli ")


def test_an_image_depends_on_its_seed_alone(tiny_run: Path, tmp_path: Path) -> None:
    several = sample(tiny_run, num_images=6, seed=3, batch_size=4, output=tmp_path / "a")
    one_by_one = sample(tiny_run, num_images=3, seed=5, batch_size=1, output=tmp_path / "b")
    for theirs in one_by_one.files:
        assert same(theirs, several.output / theirs.name), theirs.name
    assert not same(several.files[0], several.files[1])


def test_the_image_is_the_student_of_the_noise_of_its_seed(tiny_run: Path, tmp_path: Path) -> None:
    drawn = sample(tiny_run, num_images=2, seed=11, output=tmp_path / "a")
    student = load_student(tiny_run).student
    eps = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(12))
    with torch.no_grad():
        expected = (student.net(eps, 999).sample.clamp(-1, 1) + 1) * 127.5
    assert student.head == "x0"
    assert np.abs(pixels(drawn.files[1]) - expected[0, 0].round().long().numpy()).max() <= 1


def test_prior_noise_rows_are_apart() -> None:
    rows = prior_noise([4, 5], (1, 2, 2))
    assert torch.equal(prior_noise([5], (1, 2, 2)), rows[1:])
    assert not torch.equal(rows[0], rows[1])


def test_the_default_folder_is_the_runs_and_can_be_drawn_again(tiny_run: Path) -> None:
    first = sample(tiny_run, num_images=2)
    assert first.output == tiny_run / "samples"
    before = pixels(first.files[1])
    more = sample(tiny_run / "student", num_images=1, seed=1)
    assert more.files == first.files[1:]
    assert np.abs(pixels(more.files[0]) - before).max() <= 1
    assert first.files[0].is_file(), "images of other seeds stay"


def test_a_student_alone_has_its_samples_beside_it(tiny_run: Path, tmp_path: Path) -> None:
    """In a folder of its own, and a file of prompts that happens to be there is another's."""
    shutil.copy(find_artifact(tiny_run), tmp_path / "mine.safetensors")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red fox"}\n')
    assert sample(tmp_path / "mine.safetensors", num_images=1).output == tmp_path / "samples" / "mine"


def test_the_best_so_far_has_a_folder_of_its_own(tiny_run: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(tiny_run, tmp_path / "run")))
    run.best.parent.mkdir(exist_ok=True)
    shutil.copy(run.student, run.best)
    assert sample(run.best, num_images=1).output == run.samples / "best"


@pytest.mark.parametrize("name", [".", "student.safetensors"])
def test_inside_the_folder_of_the_student_the_run_is_known(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tiny_run / "student")
    artifact = load_student(Path(name))
    assert artifact.run is not None
    assert artifact.samples == tiny_run.absolute() / "samples"


def test_a_grid_of_many_is_no_larger_than_viewers_open(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bootcli.pipelines.sample.GRID_SIDE", 64)
    for name, count in (("some", 30), ("many", 80)):  # seven by seven of 8x8 pixels, and the lines between
        drawn = sample(tiny_run, num_images=count, output=tmp_path / name)
        assert max(pixels(drawn.grid).shape) <= 64
        assert len(drawn.files) == count
    tall, wide = torch.zeros(1, 48, 8), torch.zeros(1, 8, 48)
    assert (pipeline._columns(tall, 7), pipeline._columns(wide, 7)) == (7, 1)


def test_a_named_folder_is_not_written_over_unasked(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "000000.png").write_text("mine")
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        sample(tiny_run, num_images=1, output=tmp_path)
    assert (tmp_path / "000000.png").read_text() == "mine"
    sample(tiny_run, num_images=1, output=tmp_path, overwrite=True)
    assert pixels(tmp_path / "000000.png").shape == (8, 8)
    assert (tmp_path / "note.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="is a file"):
        sample(tiny_run, num_images=1, output=tmp_path / "note.txt", overwrite=True)


def test_the_teacher_is_drawn_by_the_reference_sampler(tiny_run: Path, tiny_ddpm: Path) -> None:
    from diffusers import DDIMScheduler, UNet2DModel

    drawn = sample(tiny_run, num_images=2, seed=4, teacher_steps=3)
    assert drawn.output == tiny_run / "samples" / "teacher-3-steps"
    assert (drawn.nfe, drawn.source) == (3, "teacher, 3 steps")
    unet = UNet2DModel.from_pretrained(tiny_ddpm, subfolder="unet")
    scheduler = DDIMScheduler.from_pretrained(
        tiny_ddpm, subfolder="scheduler", timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(3)
    x = prior_noise([4, 5], (1, 8, 8))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
    expected = ((x.clamp(-1, 1) + 1) * 127.5).round().long()
    for path, image in zip(drawn.files, expected, strict=True):
        assert np.abs(pixels(path) - image[0].numpy()).max() <= 1


def test_more_steps_than_timesteps_are_refused(tiny_ddpm: Path) -> None:
    view = TeacherView(load(str(tiny_ddpm)).teacher)
    with pytest.raises(UsageError, match="no 1001 timesteps"):
        next(teacher_images(view, 1001, lambda seeds: view.teacher.condition([]), range(1), 1, Engine("cpu", "no")))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"class_label": 1}, "no classes"),
        ({"prompts": Prompts([Prompt("a cat")])}, "takes no prompts"),
        ({"resolution": (16, 16)}, "draw one size"),
        ({"num_images": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"teacher_steps": 0}, "at least 1"),
        ({"class_label": 1, "teacher_steps": 2}, "no classes"),
    ],
)
def test_impossible_requests(tiny_run: Path, tmp_path: Path, request_: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sample(tiny_run, output=tmp_path / "out", **request_)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_classes_take_turns_by_seed(class_run: Path, tmp_path: Path) -> None:
    turns = sample(class_run, num_images=4, seed=3, batch_size=3, output=tmp_path / "a")
    for label in (1, 3):
        ours = sample(class_run, num_images=4, seed=3, class_label=label)
        assert ours.output == class_run / "samples" / f"class-{label}"
        equal = [same(a, b) for a, b in zip(turns.files, ours.files, strict=True)]
        assert equal == [(1, 3)[seed % 2] == label for seed in range(3, 7)]


@pytest.mark.parametrize(("classes", "label", "message"), [((1, 3), 2, "not distilled"), (None, 4, "not a class")])
def test_classes_the_student_does_not_know(
    class_run: Path, tmp_path: Path, classes: tuple[int, ...] | None, label: int, message: str
) -> None:
    tensors, header = read_tensors(find_artifact(class_run))
    config = to_dict(load_student(class_run).config)
    write_tensors(tmp_path / "a.safetensors", tensors, {**header, "config": {**config, "classes": classes}})
    with pytest.raises(UsageError, match=message):
        sample(tmp_path / "a.safetensors", class_label=label)


def test_conditions_are_a_function_of_the_seed(class_run: Path) -> None:
    artifact = load_student(class_run)
    cond_of = condition_of(artifact.student.teacher, artifact.config)
    assert cond_of([0, 1, 2, 7]).tensors["labels"].tolist() == [1, 3, 1, 3]
    everything = from_dict({**to_dict(artifact.config), "classes": None})
    assert condition_of(artifact.student.teacher, everything)([6]).tensors["labels"].tolist() == [2]


def test_a_single_image_is_computed_like_one_of_many(tiny_teacher: Teacher) -> None:
    """Products of one row may round another way, so a batch of one is drawn as two."""
    sizes = []

    def cond_of(seeds: Sequence[int]) -> Cond:
        sizes.append(len(seeds))
        return Cond()

    student, engine = Student(tiny_teacher, "x0", 0.0), Engine("cpu", "no")
    drawn = list(student_images(student, cond_of, range(5), 2, engine))
    drawn += list(teacher_images(TeacherView(tiny_teacher), 2, cond_of, range(5), 2, engine))
    assert [len(batch) for batch in drawn] == [2, 2, 1] * 2
    assert set(sizes) == {2}
