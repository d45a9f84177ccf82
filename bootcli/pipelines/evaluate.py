"""`bootcli evaluate`: numbers for the student, and the same numbers for its teacher at a few step counts."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bootcli.config import Device, DistillConfig
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.evaluate import INCEPTION
from bootcli.manifold import MOST_ROWS, NEIGHBOURS, Manifold, manifold_of, some_rows
from bootcli.pipelines.bench import Bench, Progress, own_images
from bootcli.pipelines.defaults import start_time
from bootcli.pipelines.guidance import teacher_view
from bootcli.pipelines.refinement import refinement_starts
from bootcli.pipelines.requests import check_negatives, condition_of, labels_of, prompts_of, sampling_scale, seed_of
from bootcli.prompts import Prompts, read_prompts
from bootcli.reference import OWN_STEPS, Reference, features_for, reference_for, write_reference
from bootcli.sampler import reference_times
from bootcli.store.artifact import load_student
from bootcli.store.files import check_writable, write_json
from bootcli.store.rundir import RunDir
from bootcli.teachers.protocol import Teacher
from bootcli.teachers.registry import load
from bootcli.teachers.view import TeacherView

METRICS = ("fid", "pr", "accuracy", "paired")
"""Frechet distance and precision and recall, both to a reference; share of images of the class that was asked for;
squared error to the teacher from the same noise."""


def evaluate(
    run: Path,
    *,
    metrics: Sequence[str] = ("fid",),
    num_images: int = 5000,
    seed: int = 0,
    repeats: int = 1,
    reference: str | None = None,
    prompts: str | None = None,
    resolution: tuple[int, int] | None = None,
    guidance_scale: float | None = None,
    nfe: Sequence[int] = (1,),
    teacher_steps: tuple[int, ...] = (),
    batch_size: int = 64,
    device: Device = "auto",
    save_reference: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure a student and its teacher with the same seeds, conditions and reference.

    Image i of repeat k has the seed ``seed + k * num_images + i`` and the condition that `bootcli sample` gives that
    seed. Networks compute in float32, whatever the run was trained in, so that devices agree but for rounding: on a GPU
    of NVIDIA's torch rounds what convolutions multiply to TF32.

    Args:
        run: a run folder or a student file.
        metrics: some of `METRICS`; the order is theirs.
        num_images: images of each repeat; drawn once for all metrics but "paired".
        seed: of the first image.
        repeats: how often to draw anew; the mean is reported beside every number.
        reference: see `bootcli.reference.reference_for`; "paired" alone needs none.
        prompts: where the prompts come from that images take in turn, by the seed (`read_prompts`); None: the run.
        resolution: width and height in pixels, where the teacher allows it; None: those of the run.
        guidance_scale: w of both, for a student that takes one; None is the middle of its range.
        nfe: calls of the student for an image; above 1 for one that was trained to refine.
        teacher_steps: numbers of steps of the reference sampler to measure the teacher at.
        batch_size: images drawn at a time; changes the result by rounding at most.
        device: where to compute.
        save_reference: a new .safetensors file to keep the reference in, for later use as ``reference``.
        progress: called after each batch.

    Returns:
        JSON-able facts, also written to ``RUN/evaluations/`` where ``run`` is a folder. ``nfe`` counts the calls of
        the network per image: a guided step has two.

    Raises `UsageError` for impossible arguments, `BootError` for broken files.
    """
    wanted = _wanted(metrics)
    _check(num_images, repeats, (*nfe, *teacher_steps), batch_size)
    _check_reference(wanted, num_images, reference, save_reference)
    asked = None if prompts is None else read_prompts(prompts)
    began = time.perf_counter()
    artifact = load_student(run)
    config, engine = artifact.config, Engine(device, "no")
    if asked is not None:
        check_negatives(asked, config)
    if resolution is not None:
        artifact.student.teacher.use_resolution(*resolution)
        config = dataclasses.replace(config, resolution=resolution)
    scale = sampling_scale(config, guidance_scale)
    teacher = load(config.teacher).teacher
    view = teacher_view(teacher, config, engine, guidance_scale=scale)
    texts = prompts_of(teacher, config, asked)
    starts = [refinement_starts(teacher, config, calls) for calls in dict.fromkeys((1, *nfe))]
    for steps in teacher_steps:
        reference_times(view, steps)  # an impossible number is refused before any image is drawn
    t_max = _path_start(view, config) if "paired" in wanted else None
    cond_of = condition_of(teacher, config, prompts=texts, guidance_scale=scale)
    seeds = [range(seed + k * num_images, seed + (k + 1) * num_images) for k in range(repeats)]
    labels = _labels(teacher, config, reference, texts, seeds) if "accuracy" in wanted else None
    against = None
    if wanted != ("paired",):
        own = partial(own_images, view, cond_of, seeds[0], batch_size, engine, progress)
        against = reference_for(teacher, reference, engine.device, with_features="pr" in wanted, own_images=own)
        if save_reference is not None:
            write_reference(save_reference, against)
    bench = Bench(
        student=artifact.student.to(engine.device),
        view=view,
        cond_of=cond_of,
        seed_of=seed_of(texts),
        repeats=seeds,
        batch_size=batch_size,
        engine=engine,
        reference=against,
        fid="fid" in wanted,
        manifold=_manifold(against, num_images) if against is not None and "pr" in wanted else None,
        labels_of=labels,
        t_max=t_max,
        progress=progress,
    )
    notes = _notes(bench, num_images, asked)
    students = [bench.of_student(times) for times in starts]
    result: dict[str, object] = {
        "metrics": list(wanted),
        "feature_space": None if against is None else against.feature_space,
        "student": students[0],
        "student_in_more_calls": students[1:],
        "teacher": [] if against is None else [bench.of_teacher(steps) for steps in teacher_steps],
        "reference": None if against is None else _facts(against, num_images),
        **bench.facts(),
        "sampler": _sampler(view),
        "resolution": config.resolution,
        "prompts": None if texts is None else {"source": prompts or config.prompts, "count": len(texts)},
        "num_images": num_images,
        "seed": seed,
        "repeats": repeats,
        "run": str(run),
        "training_steps": artifact.step,
        "seconds": round(time.perf_counter() - began, 2),
        "notes": notes,
    }
    if run.is_dir():
        try:
            _keep(RunDir(artifact.home).evaluations, "-".join(wanted), result)
        except OSError as error:  # what took so long to measure is told all the same
            notes.append(f"These numbers were not kept in the run: {error.strerror}.")
    return result


def _keep(folder: Path, name: str, result: dict[str, object]) -> None:
    """Write a result beside earlier ones."""
    base = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    write_json(next(path for each in names if not (path := folder / f"{each}.json").exists()), result)


def _wanted(metrics: Sequence[str]) -> tuple[str, ...]:
    """Each metric once, in the order of `METRICS`."""
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown or not metrics:
        raise UsageError(f"Unknown metric {', '.join(unknown)!r}.", f"There are: {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in metrics)


def _check(num_images: int, repeats: int, calls: Sequence[int], batch_size: int) -> None:
    if num_images < 2:
        raise UsageError(f"--num-images {num_images}: statistics need at least 2 images.")
    if repeats < 1 or batch_size < 1 or any(count < 1 for count in calls):
        raise UsageError("Repeats, batch size, NFE and teacher steps must be at least 1.")


def _check_reference(
    metrics: tuple[str, ...], num_images: int, reference: str | None, save_reference: Path | None
) -> None:
    if metrics == ("paired",) and (reference is not None or save_reference is not None):
        raise UsageError("--metric paired compares with the teacher alone: no reference is read.", "Add --metric fid.")
    if save_reference is not None and save_reference.suffix != ".safetensors":
        raise UsageError(f"{save_reference}: statistics are kept in a .safetensors file.", "Change the file's ending.")
    if save_reference is not None and save_reference.exists():
        raise UsageError(f"{save_reference} is there already.", "Choose another name for --save-reference.")
    if save_reference is not None:
        check_writable(save_reference)
    if "pr" in metrics and num_images <= NEIGHBOURS:
        raise UsageError(f"--num-images {num_images}: precision and recall need more than {NEIGHBOURS} images.")


def _manifold(reference: Reference, num_images: int) -> Manifold:
    """Of as many features as both sets have, `MOST_ROWS` at most. Raises `BootError` for too few."""
    features = reference.features
    if features is None or len(features) <= NEIGHBOURS:
        raise BootError(f"{reference.source}: precision and recall need more than {NEIGHBOURS} images.")
    return manifold_of(some_rows(features, min(num_images, MOST_ROWS)))


def _labels(
    teacher: Teacher, config: DistillConfig, reference: str | None, prompts: Prompts | None, repeats: Sequence[range]
) -> Callable[[Sequence[int]], Tensor]:
    """The class of each seed's image, -1 where it has none. Raises `UsageError` where a repeat has no image with one,
    or nothing tells them: before anything is drawn."""
    kind, space = teacher.spec.conditioning, features_for(teacher, reference)
    if kind == "none" or (kind == "text" and space is not None and not space.words):
        raise UsageError(f"--metric accuracy: the teacher {config.teacher} has no classes.", "Leave this metric out.")
    if space is None or space.classes_of is None:
        features = "the features of the reference" if space is None else f"{space.name} features"
        raise UsageError(
            f"--metric accuracy: {features} do not tell the teacher's classes.",
            "It takes the feature network of a teacher that brings a classifier, for images of this size.",
        )
    with torch.no_grad():
        told = space.classes_of(torch.zeros(1, len(space.mean))).shape[1]
    has = len(space.words) if kind == "text" else teacher.spec.num_classes
    if told != has:
        raise UsageError(
            f"--metric accuracy: {space.name} tells {told} classes, the teacher has {has}.",
            "Leave this metric out.",
        )
    labels = labels_of(teacher, config, space.words, prompts)
    if not all((labels(seeds) >= 0).any() for seeds in repeats):
        raise UsageError(
            "--metric accuracy: no prompt names one class.", f"It takes one of these words: {', '.join(space.words)}"
        )
    return labels


def _path_start(view: TeacherView, config: DistillConfig) -> float:
    try:
        reference_times(view, OWN_STEPS)
    except UsageError as error:
        raise UsageError(f"--metric paired: {error.message}", "Leave this metric out.") from error
    return start_time(view.teacher, config)


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
    """The reference sampler (`bootcli.sampler.teacher_images`)."""
    spacing = {"eta": 0.0, "timestep_spacing": "trailing", "use_clipped_model_output": True}
    return {
        "method": view.teacher.spec.sampler,
        **(spacing if view.teacher.spec.sampler == "ddim" else {"churn": 0.0}),
        "threshold": repr(view.teacher.spec.threshold),
        "guidance_scale": view.guidance_scale,
        **({"guidance_rescale": view.rescale} if view.rescale else {}),
        **({"guidance_interval": list(view.interval)} if view.interval != (0, 1) else {}),
        "precision": "float32",
    }


def _notes(bench: Bench, num_images: int, prompts: Prompts | None) -> list[str]:
    """What a reader has to know to use the numbers."""
    notes = []
    if bench.fid and bench.reference is not None:
        notes += _distance_notes(bench.reference, num_images)
    if bench.manifold is not None:
        notes.append(
            f"Precision and recall: k = {NEIGHBOURS}, {len(bench.manifold.centres)} images of each set; not comparable "
            "with numbers of other features or of another count."
        )
    if bench.t_max is not None:
        notes.append(f"The paired error is to the teacher's {OWN_STEPS} steps from the same noise, before decoding.")
    if prompts is not None and prompts.own_negatives:
        notes.append(
            "Negative prompts of --prompts lead the teacher alone: a student has those of its training built in."
        )
    if len(bench.repeats) == 1:
        notes.append("The numbers move with the seeds and the number of images: --repeats 3 shows by how much.")
    return notes


def _distance_notes(reference: Reference, num_images: int) -> list[str]:
    dimensions = len(reference.statistics.mean)
    notes = []
    if reference.feature_space not in INCEPTION:
        notes.append(f"Distances in {reference.feature_space} features are not comparable with Inception FID.")
    for whose, count in (("the student and teacher", num_images), ("the reference", reference.statistics.num_images)):
        if count is not None and count <= dimensions:
            notes.append(f"{count} images of {whose} are too few: {dimensions} features need more than {dimensions}.")
    return notes
