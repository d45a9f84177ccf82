"""Students as diffusers folders: what plain diffusers makes of them is what bootcli makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bootcli_ddpm import family
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from bootcli.errors import BootError
from bootcli.plugin import Cond, Head
from bootcli.student import Student

from .conftest import MakeFolder

CASES: list[tuple[dict[str, Any], dict[str, Any], Head]] = [
    ({}, {}, "x0"),
    ({}, {"beta_schedule": "scaled_linear"}, "native"),
    ({}, {"beta_schedule": "sigmoid"}, "native"),
    ({}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "native"),
    ({}, {"prediction_type": "sample", "thresholding": True}, "native"),
    ({"out_channels": 6, "sample_size": (8, 16)}, {"variance_type": "learned"}, "x0"),
    ({"in_channels": 1, "out_channels": 1}, {"num_train_timesteps": 100}, "native"),
]


def student_of(folder: Path, head: Head) -> Student:
    """With its time branch and its last layer moved, as after training."""
    student = Student(family.load(folder), head, t_min=0.01)
    torch.nn.init.normal_(student.time_branch.out.weight)
    spec = student.teacher.spec
    cond = student.teacher.condition([0] if spec.conditioning == "class" else [None])
    eps = torch.randn(1, *spec.sample_shape)
    student.start_at(torch.full((spec.sample_shape[0],), 0.1), eps, cond)
    student.borrow_features(0.5, eps, cond)
    return student


def export(student: Student, folder: Path) -> None:
    student.teacher.export_formats()["diffusers"].write(student.teacher, student.net, student.head, folder)


@pytest.mark.parametrize(("unet", "scheduler", "head"), CASES)
def test_one_step_of_the_plain_pipeline_is_the_student(
    make_folder: MakeFolder, tmp_path: Path, unet: dict[str, Any], scheduler: dict[str, Any], head: Head
) -> None:
    student, out = student_of(make_folder(unet, scheduler), head), tmp_path / "export"
    export(student, out)
    pipeline = DDIMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, torch.manual_seed(5), num_inference_steps=1, eta=0, output_type="np").images
    eps = torch.randn(2, *student.teacher.spec.sample_shape, generator=torch.manual_seed(5))
    with torch.no_grad():
        ours = student.sample(eps, Cond())
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    torch.testing.assert_close(theirs, (ours.clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-5)
    assert not list(out.rglob("*.bin"))


def test_the_export_is_a_teacher_again(make_folder: MakeFolder, tmp_path: Path) -> None:
    student, out = student_of(make_folder(), "x0"), tmp_path / "export"
    export(student, out)
    assert family.matches(out)
    again = family.load(out)
    assert again.spec.prediction == "x0"
    assert again.spec.schedule == student.teacher.spec.schedule


def snippet(out: Path) -> str:
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    return str(code[0]).replace("path/to/this/folder", str(out))


def test_the_card(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--someone--model"
    make_folder().rename(cached)
    (cached / "README.md").write_text("---\nlicense: mit\n---\n")
    out = tmp_path / "export"
    export(student_of(cached, "x0"), out)
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["license"], facts["base_model"], facts["library_name"]) == ("mit", "someone/model", "diffusers")
    assert "someone/model" in text
    assert str(tmp_path) not in text
    monkeypatch.chdir(tmp_path)
    exec(snippet(out), {})
    assert (tmp_path / "sample.png").is_file()


def test_a_class_conditional_student_runs_as_its_card_says(make_folder: MakeFolder, tmp_path: Path) -> None:
    student, out = student_of(make_folder({"num_class_embeds": 4}), "x0"), tmp_path / "export"
    export(student, out)
    names: dict[str, Any] = {}
    exec(snippet(out), names)
    with torch.no_grad():
        ours = student.sample(names["noise"], student.teacher.condition([0]))
    torch.testing.assert_close(names["images"], ours.clamp(-1, 1), rtol=0, atol=1e-5)
    assert isinstance(names["unet"], UNet2DModel)
    assert isinstance(names["scheduler"], DDIMScheduler)


def test_only_a_network_of_the_family_is_written(make_folder: MakeFolder, tmp_path: Path) -> None:
    teacher = family.load(make_folder())
    with pytest.raises(BootError, match="DDIMPipeline"):
        teacher.export_formats()["diffusers"].write(teacher, torch.nn.Linear(1, 1), "x0", tmp_path / "export")
