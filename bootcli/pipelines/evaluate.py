"""`bootcli evaluate`: a number for the student, the same number for its teacher at a few step counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from bootcli.config import Device
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.evaluate import INCEPTION, Reference, frechet, reference_for, statistics_of, write_reference
from bootcli.pipelines.setup import condition_of, teacher_view
from bootcli.sampler import CondOf, reference_times, student_images, teacher_images
from bootcli.store.artifact import load_student
from bootcli.store.files import write_json
from bootcli.store.rundir import RunDir
from bootcli.teachers.registry import load
from bootcli.teachers.view import TeacherView

METRICS = ("fid",)

Progress = Callable[[str, int, int], None]
"""(what is sampled, images done, images in all)."""

Sample = Callable[[CondOf, range], Iterator[Tensor]]
"""Draws the images of some seeds."""


def evaluate(
    run: Path,
    *,
    metric: str = "fid",
    num_images: int = 5000,
    seed: int = 0,
    repeats: int = 1,
    reference: str | None = None,
    teacher_steps: tuple[int, ...] = (),
    batch_size: int = 64,
    device: Device = "auto",
    save_reference: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure a student and its teacher with the same seeds, conditions and reference.

    Image i of repeat k has the seed ``seed + k * num_images + i`` and the condition that `bootcli sample` gives that
    seed. Networks compute in float32, whatever the run was trained in, so that the number is the same on every device.

    Args:
        run: a run folder or a student file.
        metric: one of `METRICS`.
        num_images: images of each repeat.
        seed: of the first image.
        repeats: how often to draw anew; the mean is reported beside every number.
        reference: see `bootcli.evaluate.reference_for`.
        teacher_steps: numbers of steps of the reference sampler to measure the teacher at.
        batch_size: images drawn at a time; changes the result by rounding at most.
        device: where to compute.
        save_reference: a .safetensors file to keep the reference's statistics in, for later use as ``reference``.
        progress: called after each batch.

    Returns:
        JSON-able facts, also written to ``RUN/evaluations/`` where ``run`` is a folder. ``nfe`` counts the calls of
        the network per image: a guided step has two.

    Raises `UsageError` for impossible arguments, `BootError` for broken files.
    """
    _check(metric, num_images, repeats, teacher_steps, batch_size)
    if save_reference is not None and save_reference.suffix != ".safetensors":
        raise UsageError(f"{save_reference}: statistics are kept in a .safetensors file.", "Change the file's ending.")
    began = time.perf_counter()
    artifact = load_student(run)
    config, engine = artifact.config, Engine(device, "no")
    teacher = load(config.teacher).teacher
    view = teacher_view(teacher, config, engine)
    against = reference_for(teacher, reference, engine.device)
    if save_reference is not None:
        write_reference(save_reference, against)
    for steps in teacher_steps:
        reference_times(view, steps)  # an impossible number is refused before any image is drawn
    student = artifact.student.to(engine.device)
    seeds = [range(seed + k * num_images, seed + (k + 1) * num_images) for k in range(repeats)]
    bench = _Bench(against, condition_of(teacher, config), seeds, engine.device, progress)

    def by_student(cond_of: CondOf, seeds: range) -> Iterator[Tensor]:
        return student_images(student, cond_of, seeds, batch_size, engine)

    def by_teacher(steps: int) -> Sample:
        return lambda cond_of, seeds: teacher_images(view, steps, cond_of, seeds, batch_size, engine)

    calls = 1 if view.guidance_scale == 1.0 else 2
    result: dict[str, object] = {
        "metric": metric,
        "feature_space": against.feature_space,
        "student": {"nfe": 1, **bench.measure("student", by_student)},
        "teacher": [
            {"steps": n, "nfe": n * calls, **bench.measure(f"teacher, {n} steps", by_teacher(n))} for n in teacher_steps
        ],
        "reference": _facts(against, num_images),
        "sampler": _sampler(view),
        "num_images": num_images,
        "seed": seed,
        "repeats": repeats,
        "run": str(run),
        "training_steps": artifact.step,
        "seconds": round(time.perf_counter() - began, 2),
        "notes": _notes(against, num_images, repeats),
    }
    if run.is_dir():
        write_json(RunDir(run).evaluations / f"{metric}-{time.strftime('%Y%m%d-%H%M%S')}.json", result)
    return result


@dataclass(frozen=True)
class _Bench:
    """What every sampler is measured on."""

    reference: Reference
    cond_of: CondOf
    repeats: Sequence[range]
    device: torch.device
    progress: Progress | None

    def measure(self, label: str, sample: Sample) -> dict[str, object]:
        """The distance of each repeat, their mean and their standard deviation."""
        fids = [self._fid(label, sample, seeds) for seeds in self.repeats]
        return {"fid": fmean(fids), "fid_std": stdev(fids) if len(fids) > 1 else None, "fid_repeats": fids}

    def _fid(self, label: str, sample: Sample, seeds: range) -> float:
        batches = self._reported(label, sample(self.cond_of, seeds), seeds.start - self.repeats[0].start)
        return frechet(statistics_of(batches, self.reference.network, self.device), self.reference.statistics)

    def _reported(self, label: str, batches: Iterator[Tensor], done: int) -> Iterator[Tensor]:
        for batch in batches:
            yield batch
            done += len(batch)  # after its features are taken
            if self.progress is not None:
                self.progress(label, done, sum(map(len, self.repeats)))


def _check(metric: str, num_images: int, repeats: int, teacher_steps: Sequence[int], batch_size: int) -> None:
    if metric not in METRICS:
        raise UsageError(f"Unknown metric {metric!r}.", f"There is: {', '.join(METRICS)}")
    if num_images < 2:
        raise UsageError(f"--num-images {num_images}: statistics need at least 2 images.")
    if repeats < 1 or batch_size < 1 or any(steps < 1 for steps in teacher_steps):
        raise UsageError("Repeats, batch size and teacher steps must be at least 1.")


def _facts(reference: Reference, num_images: int) -> dict[str, object]:
    nearest = min(reference.floor, key=lambda count: abs(count - num_images), default=None)
    return {
        "feature_space": reference.feature_space,
        "dimensions": len(reference.statistics.mean),
        "source": reference.source,
        "num_images": reference.statistics.num_images,
        "floor": None if nearest is None else {"num_images": nearest, "fid": reference.floor[nearest]},
    }


def _sampler(view: TeacherView) -> dict[str, object]:
    """The reference sampler, the same for every teacher (`bootcli.sampler.teacher_images`)."""
    return {
        "method": "ddim",
        "eta": 0.0,
        "timestep_spacing": "trailing",
        "use_clipped_model_output": True,
        "threshold": repr(view.teacher.spec.threshold),
        "guidance_scale": view.guidance_scale,
        "precision": "float32",
    }


def _notes(reference: Reference, num_images: int, repeats: int) -> list[str]:
    """What a reader has to know to use the numbers."""
    dimensions = len(reference.statistics.mean)
    notes = []
    if reference.feature_space not in INCEPTION:
        notes.append(f"Distances in {reference.feature_space} features are not comparable with Inception FID.")
    for whose, count in (("the student and teacher", num_images), ("the reference", reference.statistics.num_images)):
        if count is not None and count <= dimensions:
            notes.append(f"{count} images of {whose} are too few: {dimensions} features need more than {dimensions}.")
    if repeats == 1:
        notes.append("The distance moves with the seeds and the number of images: --repeats 3 shows by how much.")
    return notes
