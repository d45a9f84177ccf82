"""The numbers of a student and of its teacher, measured on the same seeds and against the same reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

import torch
from torch import Tensor

from bootcli.engine import Engine
from bootcli.evaluate import features_of, frechet, gaussian_fit
from bootcli.manifold import NEIGHBOURS, Manifold, manifold_of, precision_recall, some_rows
from bootcli.reference import OTHER_NOISE, OWN_STEPS, Reference
from bootcli.sampler import (
    CondOf,
    SeedOf,
    paired_errors,
    path_ends,
    reference_calls,
    student_images,
    teacher_images,
)
from bootcli.student import Student
from bootcli.teachers.view import TeacherView

Progress = Callable[[str, int, int], None]
"""(what is sampled, images done, images in all)."""

Images = Callable[[CondOf, range, int, Engine], Iterator[Tensor]]
"""Draws the images of some seeds, so many at a time."""


@dataclass(frozen=True)
class Bench:
    """Who is measured, on what.

    Args:
        student, view: the student and its teacher.
        cond_of, seed_of: the conditions of both, and what their noise is drawn from.
        repeats: the seeds of each repeat.
        batch_size, engine: how to draw.
        reference: what images are compared with; None where nothing is.
        fid: whether to take the Frechet distance to it.
        manifold: of as many features of the reference as are compared; None without precision and recall.
        labels_of: the classes that images were asked for, by seeds, (b,); None without accuracy.
        t_max: where the teacher's paths start that the student is paired with; None where it is not.
        progress: called after each batch.
    """

    student: Student
    view: TeacherView
    cond_of: CondOf
    seed_of: SeedOf
    repeats: Sequence[range]
    batch_size: int
    engine: Engine
    reference: Reference | None
    fid: bool
    manifold: Manifold | None
    labels_of: Callable[[Sequence[int]], Tensor] | None
    t_max: float | None
    progress: Progress | None

    def of_student(self, starts: Sequence[float] = ()) -> dict[str, object]:
        """The student's numbers in one call, and in one more for each of ``starts`` (`student_images`).

        The error to its pair is that of one call: later ones draw noise of their own.
        """
        nfe = 1 + len(starts)
        images = partial(student_images, self.student, starts=starts, seed_of=self.seed_of)
        label = "student" if nfe == 1 else f"student, {nfe} calls"
        numbers = [self._scores(self.reference, label, images, seeds) for seeds in self.repeats]
        if self.t_max is not None and nfe == 1:
            paired = [self._paired_mse(self.t_max, seeds) for seeds in self.repeats]
            numbers = [one | {"paired_mse": error} for one, error in zip(numbers, paired, strict=True)]
        return {"nfe": nfe, **_summary(numbers)}

    def of_teacher(self, steps: int) -> dict[str, object]:
        """The teacher's numbers at so many steps."""
        images = partial(teacher_images, self.view, steps, seed_of=self.seed_of)
        numbers = [self._scores(self.reference, f"teacher, {steps} steps", images, seeds) for seeds in self.repeats]
        return {"steps": steps, "nfe": reference_calls(self.view, steps), **_summary(numbers)}

    def facts(self) -> dict[str, object]:
        """How precision, recall and the paired error were taken; None for what was not."""
        paired = None if self.t_max is None else {"teacher_steps": OWN_STEPS, "t_max": self.t_max}
        if self.manifold is None:
            return {"manifold": None, "paired": paired}
        return {"manifold": {"images": len(self.manifold.centres), "neighbours": NEIGHBOURS}, "paired": paired}

    def _scores(self, reference: Reference | None, label: str, images: Images, seeds: range) -> dict[str, float]:
        if reference is None:
            return {}
        batches = images(self.cond_of, seeds, self.batch_size, self.engine)
        features = features_of(self._reported(label, batches, seeds), reference.network, self.engine.device)
        scores = {"fid": frechet(gaussian_fit(features), reference.statistics)} if self.fid else {}
        if self.manifold is not None:
            drawn = manifold_of(some_rows(features, len(self.manifold.centres)))
            quality = precision_recall(self.manifold, drawn)
            scores |= {"precision": quality.precision, "recall": quality.recall}
        if self.labels_of is not None:
            scores["accuracy"] = accuracy(features, reference, self.labels_of(seeds), self.engine.device)
        return scores

    def _paired_mse(self, t_max: float, seeds: range) -> float:
        cond_of, seed_of, engine = self.cond_of, self.seed_of, self.engine
        ends = path_ends(self.view, t_max, OWN_STEPS, cond_of, seeds, self.batch_size, engine, seed_of)
        errors = paired_errors(self.student, ends, cond_of, seeds, engine, seed_of)
        return float(torch.cat(list(self._reported("student and teacher in pairs", errors, seeds))).mean())

    def _reported(self, label: str, batches: Iterator[Tensor], seeds: range) -> Iterator[Tensor]:
        done = seeds.start - self.repeats[0].start
        for batch in batches:
            yield batch
            done += len(batch)  # after its features are taken
            if self.progress is not None:
                self.progress(label, done, sum(map(len, self.repeats)))


def own_images(
    view: TeacherView,
    cond_of: CondOf,
    seeds: range,
    batch_size: int,
    engine: Engine,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """The teacher's own images for the conditions of some seeds, as a reference (`OWN_STEPS`, `OTHER_NOISE`)."""
    done = 0
    for batch in teacher_images(
        view, OWN_STEPS, cond_of, seeds, batch_size, engine, seed_of=lambda seed: seed + OTHER_NOISE
    ):
        yield batch
        done += len(batch)
        if progress is not None:
            progress("teacher, to compare with", done, len(seeds))


def accuracy(features: Tensor, reference: Reference, labels: Tensor, device: torch.device) -> float:
    """The share of images, by their features (n, d), that the reference's classifier takes for their labels (n,).

    Labels below 0 do not count.
    """
    assert reference.classes_of is not None  # of a reference that tells classes
    logits = reference.classes_of(features.float().to(device))
    return float((logits.argmax(1).cpu() == labels)[labels >= 0].double().mean())


def _summary(repeats: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """For each number its mean, its standard deviation (None for one repeat) and its value in every repeat."""
    row: dict[str, object] = {}
    for name in repeats[0]:
        values = [numbers[name] for numbers in repeats]
        row |= {name: fmean(values), f"{name}_std": stdev(values) if len(values) > 1 else None}
        row[f"{name}_repeats"] = values
    return row
