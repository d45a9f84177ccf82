"""The share of samples that are of the class that was asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bootcli.errors import UsageError
from bootcli.evaluate import Statistics
from bootcli.pipelines import evaluate as pipeline
from bootcli.pipelines.bench import accuracy
from bootcli.pipelines.requests import class_in
from bootcli.plugin import FeatureSpace, Teacher
from bootcli.reference import Reference
from bootcli.teachers.registry import Loaded

from .conftest import DIM


class FirstPixel(nn.Module):
    """A feature network of colour pictures."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :DIM]


def classifier_of(label: int) -> FeatureSpace:
    """A feature space whose classifier takes everything for one class."""
    logits = torch.nn.functional.one_hot(torch.tensor(label), 4).float()
    return FeatureSpace(
        *("pixels", FirstPixel(), torch.zeros(DIM).double(), torch.eye(DIM).double(), 100, "made up"),
        classes_of=lambda features: logits.expand(len(features), 4),
    )


@pytest.fixture
def at_hand(class_teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    loaded = Loaded(class_teacher, None, "classes", "test")  # type: ignore[arg-type]  # the family is not asked for
    monkeypatch.setattr(pipeline, "load", lambda name: loaded)
    return class_teacher


@pytest.mark.parametrize(("label", "share"), [(1, 5 / 9), (3, 4 / 9), (0, 0)])
def test_each_image_has_the_class_of_its_seed(at_hand: Teacher, class_run: Path, label: int, share: float) -> None:
    """The run has classes 1 and 3, which seeds take in turn."""
    at_hand.feature_space = lambda: classifier_of(label)  # type: ignore[method-assign]
    result = pipeline.evaluate(class_run, metrics=["accuracy"], num_images=9, teacher_steps=(2,), device="cpu")
    student, teacher = result["student"], result["teacher"]
    assert student["accuracy"] == teacher[0]["accuracy"] == pytest.approx(share)  # type: ignore[index]
    assert "fid" not in student  # type: ignore[operator]


def test_without_a_classifier_there_is_no_accuracy(at_hand: Teacher, class_run: Path) -> None:
    bare = dataclasses.replace(classifier_of(0), classes_of=None)
    at_hand.feature_space = lambda: bare  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="pixels features do not tell the teacher's classes"):
        pipeline.evaluate(class_run, metrics=["accuracy"], num_images=4, device="cpu")


def test_accuracy_is_refused_before_anything_is_drawn(
    at_hand: Teacher, class_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draws(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher draws")

    monkeypatch.setattr(pipeline, "own_images", draws)
    with pytest.raises(UsageError, match="the features of the reference do not tell the teacher's classes"):
        pipeline.evaluate(
            class_run, metrics=["accuracy"], num_images=4, device="cpu", reference="inception-clean:teacher"
        )


def test_a_classifier_of_other_classes_is_refused(at_hand: Teacher, class_run: Path) -> None:
    other = dataclasses.replace(classifier_of(0), classes_of=lambda features: torch.zeros(len(features), 10))
    at_hand.feature_space = lambda: other  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="tells 10 classes, the teacher has 4"):
        pipeline.evaluate(class_run, metrics=["accuracy"], num_images=4, device="cpu")


def test_without_classes_there_is_no_accuracy(
    tiny_run: Path, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Loaded(tiny_teacher, None, "tiny", "test")  # type: ignore[arg-type]
    tiny_teacher.feature_space = lambda: classifier_of(0)  # type: ignore[method-assign]
    monkeypatch.setattr(pipeline, "load", lambda name: loaded)
    with pytest.raises(UsageError, match="has no classes"):
        pipeline.evaluate(tiny_run, metrics=["accuracy"], num_images=4, device="cpu")


WORDS = ("t-shirt", "shirt", "ankle boot", "bag")


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("a photo of a shirt", 1),
        ("A red T-shirt on the left", 0),
        ("a brown ankle boot, black background", 2),
        ("a shirt and a bag", -1),
        ("two bags", -1),
        ("a red fox in snow", -1),
        ("a bag, a blue bag", 3),
    ],
)
def test_a_prompt_names_its_class(prompt: str, label: int) -> None:
    assert class_in(prompt, WORDS) == label


def test_prompts_without_a_class_do_not_count() -> None:
    features, cpu = torch.zeros(4, DIM), torch.device("cpu")
    statistics = Statistics(np.zeros(DIM), np.eye(DIM), 100)
    reference = Reference("pixels", FirstPixel(), statistics, "made up", classes_of=classifier_of(1).classes_of)
    assert accuracy(features, reference, torch.tensor([1, -1, 2, 1]), cpu) == pytest.approx(2 / 3)


@pytest.mark.parametrize("words", [("ankle", "ankle boot"), ("ankle boot", "ankle")])
def test_of_words_that_begin_alike_the_longest_counts(words: tuple[str, ...]) -> None:
    assert class_in("a brown ankle boot", words) == words.index("ankle boot")
