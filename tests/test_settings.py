"""What settings are refused before a run begins: in a teacher's recipe, in their types, and for want of an effect."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bootcli.closed_form import GaussianTeacher
from bootcli.config import OWN_IMAGES, DistillConfig, flatten, read_overrides, resolve, to_dict
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.maths.schedule import DiscreteVP
from bootcli.pipelines import setup
from bootcli.pipelines.settings import resolve_config
from bootcli.pipelines.setup import set_up
from bootcli.plugin import Teacher
from bootcli.prompts import Prompt, Prompts

CPU = Engine("cpu", "no")


@pytest.fixture
def folder(tiny_ddpm: Path, tmp_path: Path) -> Path:
    """A teacher of somebody else."""
    return Path(shutil.copytree(tiny_ddpm, tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher", "fashion"),
        ("init_from", "/home/me/runs/mine"),
        ("device", "cpu"),
        ("max_minutes", 1e-9),
        ("seed", 3),
        ("watch.reference", "/home/me/pictures"),
        ("watch", {"reference": "/home/me/pictures"}),
    ],
)
def test_a_recipe_in_a_folder_says_nothing_for_the_user(folder: Path, key: str, value: object) -> None:
    (folder / "recipe.json").write_text(json.dumps({"steps": 7, key: value}))
    with pytest.raises(BootError, match=rf"The recipe of the teacher .*theirs is broken: {key}.*"):
        resolve_config({"teacher": str(folder)}, {}, {})


@pytest.mark.parametrize(
    ("words", "key", "value", "switch"),
    [
        ({}, "boot.delta", 0.2, "--objective boot"),
        ({"objective": "boot"}, "kd.teacher_steps", 8, "--objective kd"),
        ({"corrector": False}, "correction.balance", 0.5, "--corrector"),
        ({}, "adversary.warmup", 3, "kd.adversary"),
        ({"objective": "boot"}, "adversary.warmup", 3, "replay.adversary"),
        ({}, "replay.points", 2, "replay.share"),
        ({}, "refiner.sigmas", [1.0], "refiner.share"),
    ],
)
def test_a_setting_without_effect_is_refused(
    folder: Path, words: dict[str, object], key: str, value: object, switch: str
) -> None:
    """On the command line; a config file has them all."""
    words = words | {"teacher": str(folder)}
    with pytest.raises(UsageError, match="no part that it belongs to") as caught:
        resolve_config(words, {key: value}, {})
    assert switch in caught.value.hint
    resolve_config(words, {}, dict(flatten(to_dict(resolve_config(words, {}, {})))))
    with pytest.raises(UsageError, match="starts as that one"):
        resolve_config(words | {"init_from": "run"}, {"student.start_t": 0.3}, {})


def test_what_is_off_may_be_switched_off(folder: Path) -> None:
    off = {"replay.share": 0.0, "refiner.share": 0.0, "kd.adversary": 0.0}
    resolve_config({"teacher": str(folder), "objective": "boot"}, off, {})


def test_a_recipe_in_a_folder_names_no_prompts(folder: Path) -> None:
    (folder / "recipe.json").write_text(json.dumps({"prompts": "/home/me/diary.txt"}))
    with pytest.raises(BootError, match=r"recipe\.json names prompts, which is for the user to say"):
        resolve_config({"teacher": str(folder)}, {}, {})


def test_a_recipe_may_ask_for_the_teachers_own_images(folder: Path) -> None:
    (folder / "recipe.json").write_text(json.dumps({"watch.reference": OWN_IMAGES}))
    assert resolve_config({"teacher": str(folder)}, {}, {}).watch.reference == OWN_IMAGES


def test_code_may_bring_prompts(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As the families of text teachers do with a file beside the weights."""
    from bootcli_ddpm.teacher import DDPMTeacher

    monkeypatch.setattr(DDPMTeacher, "recipe", lambda self: {"prompts": str(folder / "prompts.txt")})
    assert resolve_config({"teacher": str(folder)}, {}, {}).prompts == str(folder / "prompts.txt")


@pytest.mark.parametrize(
    "word",
    ["steps=true", "learning_rate=true", "watch.patience=false", "guidance_range=[true,2]", "classes=[true]"],
)
def test_true_and_false_are_no_numbers(word: str) -> None:
    with pytest.raises(UsageError, match=f"Setting {word.partition('=')[0]} = .*should be a number, not true or false"):
        resolve(read_overrides([word]))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "3", 3),
        ("learning_rate", "0.5", 0.5),
        ("corrector", "true", True),
        ("optimizer.compile", "False", False),
    ],
)
def test_texts_are_read_as_what_they_say(key: str, text: str, value: object) -> None:
    assert resolve({key: text}) == resolve({key: value})


def test_no_classes_are_none_to_choose_from() -> None:
    with pytest.raises(UsageError, match=r"Setting classes = \[\]"):
        resolve({"classes": []})
    assert resolve({"classes": [0]}).classes == (0,)


def short(**spec: Any) -> Teacher:
    """A teacher of three timesteps."""
    teacher = GaussianTeacher(torch.zeros(1, 2, 2), 0.5, DiscreteVP((0.9, 0.5, 0.1)))
    teacher.spec = dataclasses.replace(teacher.spec, **spec)
    return teacher


def test_previews_in_more_steps_than_there_are_timesteps() -> None:
    with pytest.raises(UsageError, match="preview_teacher_steps = 4: The teacher has no 4 timesteps"):
        set_up(short(), DistillConfig(preview_teacher_steps=4), CPU)
    assert set_up(short(), DistillConfig(preview_teacher_steps=3), CPU)


def test_negative_prompts_of_a_file_need_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, prompts = short(conditioning="text"), Prompts([Prompt("a fox"), Prompt("a hare", "snow")])
    with pytest.raises(UsageError, match="without guidance nothing leads away from its negative prompts"):
        set_up(teacher, DistillConfig(), CPU, prompts=prompts)

    def reached(*args: object, **settings: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(setup, "PromptPool", reached)
    guided, plain = DistillConfig(guidance_scale=3.0), Prompts([Prompt("a fox")])
    for config, texts, fresh in (
        (guided, prompts, True),
        (DistillConfig(), plain, True),
        (DistillConfig(), prompts, False),
    ):
        with pytest.raises(InterruptedError):
            set_up(teacher, config, CPU, prompts=texts, fresh=fresh)
