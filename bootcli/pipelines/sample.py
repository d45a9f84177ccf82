"""`bootcli sample`: seeds in, PNG files out."""

from __future__ import annotations

import dataclasses
import math
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bootcli import __version__
from bootcli.config import Device
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.images import GAP, GRID, enlarge, grid, save_png
from bootcli.pipelines.guidance import teacher_view
from bootcli.pipelines.refinement import refinement_starts
from bootcli.pipelines.requests import (
    check_negatives,
    condition_of,
    prompts_of,
    request_of,
    sampling_scale,
    seed_of,
)
from bootcli.prompts import Prompt, Prompts
from bootcli.sampler import SeedOf, reference_calls, student_images, teacher_images
from bootcli.store.artifact import Artifact, load_student
from bootcli.store.files import check_free
from bootcli.teachers.registry import load

GRID_SIDE = 4096
"""Largest side of a grid in image pixels; images that do not fit are left out of it."""
FEW = 16
"""Images that are drawn where nobody says how many, or what of."""
VISIBLE = 64
"""Pixels an image is wide in the grid, if it has fewer."""


@dataclass(frozen=True)
class Sampled:
    """What was drawn.

    Args:
        output: the folder.
        files: one PNG per image, in order of seed.
        grid: the images in one PNG.
        nfe: network evaluations per image.
        seconds: drawing, from seeds to uint8 images in memory.
        write_seconds: making and writing PNG files.
        source: who drew them: "student", or "teacher, 50 steps".
        guidance_scale: w, where the student takes one; None where it is built in.
    """

    output: Path
    files: tuple[Path, ...]
    grid: Path
    nfe: int
    seconds: float
    write_seconds: float
    source: str
    guidance_scale: float | None


def sample(
    run: Path,
    *,
    num_images: int | None = None,
    seed: int = 0,
    output: Path | None = None,
    class_label: int | None = None,
    prompts: Prompts | None = None,
    resolution: tuple[int, int] | None = None,
    guidance_scale: float | None = None,
    nfe: int = 1,
    teacher_steps: int | None = None,
    batch_size: int = 64,
    device: Device = "auto",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Sampled:
    """Draw images into ``<seed>.png`` files and one ``grid.png``.

    Image i depends on ``seed + i`` alone, whatever the batch size, and networks compute in float32. So a file of the
    default folder always means the same: what a request changes beside the seed gets a folder of its own below
    ``RUN/samples/`` (``class-3/``, ``teacher-50-steps/``), and drawing a seed again writes its file again. (After the
    run went on, that is another student's image: the metadata has its training steps.) A folder that the caller names
    has to be empty, unless ``overwrite`` lets files of the same names be replaced. No file is ever deleted. Where a
    prompt brings a seed of its own, the noise of its images is drawn from that; their metadata says so.

    Args:
        run: a run folder, its student folder or a student file.
        num_images: how many; None: one for each of ``prompts``, or `FEW`.
        seed: of the first image.
        output: the folder; None is ``RUN/samples/``, ``RUN/samples/best/`` for the best so far of a run that goes on,
            and for a file ``mine.safetensors`` outside a run ``samples/mine/`` beside it.
        class_label: class of every image; None takes the classes of the run in turn, by the seed.
        prompts: that images take in turn, by the seed; None: those of the run. Negative ones are the teacher's alone.
        resolution: width and height in pixels, where the teacher allows it; None: those of the run.
        guidance_scale: w, for a student that takes one; None is the middle of its range.
        nfe: calls of the student for each image; more than one needs a student that was trained to refine.
        teacher_steps: draw the teacher with that many steps of the reference sampler instead.
        batch_size: images at a time.
        device: where to compute.
        overwrite: write into a folder that is not empty.
        progress: called with (images done, images in all) after each batch.

    Raises `UsageError` for a request that the teacher cannot honour or a folder in use, `BootError` for broken files.
    """
    count = num_images if num_images is not None else FEW if prompts is None else len(prompts)
    if min(count, batch_size, nfe, 1 if teacher_steps is None else teacher_steps) < 1:
        raise UsageError("Number of images, batch size, NFE and teacher steps must be at least 1.")
    if teacher_steps is not None and nfe > 1:
        raise UsageError("--nfe is of the student and --teacher-steps of the teacher.", "Give one of them.")
    if output is not None:
        check_free(output, overwrite=overwrite)
    if prompts is not None and prompts.own_negatives and teacher_steps is None:  # a student has them built in
        prompts = Prompts(dataclasses.replace(prompt, negative=None) for prompt in prompts)
    artifact = load_student(run)
    if prompts is not None:
        check_negatives(prompts, artifact.config)
    if resolution is not None:
        artifact.student.teacher.use_resolution(*resolution)
        artifact = dataclasses.replace(artifact, config=dataclasses.replace(artifact.config, resolution=resolution))
    seeds = range(seed, seed + count)
    drawing = _draw(
        artifact, seeds, class_label, prompts, guidance_scale, nfe, teacher_steps, batch_size, Engine(device, "no")
    )
    settings = _settings(class_label, prompts, resolution, guidance_scale, nfe, teacher_steps)
    folder = output or artifact.samples.joinpath(*settings)
    return _write(drawing, folder, seeds, progress)


@dataclass(frozen=True)
class _Drawing:
    """Images still to be drawn, as uint8 batches, how, and what each seed is asked for and drawn from."""

    batches: Iterator[Tensor]
    nfe: int
    source: str
    training_steps: int | None
    guidance_scale: float | None
    request: Callable[[int], dict[str, str]]
    seed_of: SeedOf


def _draw(
    artifact: Artifact,
    seeds: range,
    class_label: int | None,
    wanted: Prompts | None,
    guidance_scale: float | None,
    nfe: int,
    teacher_steps: int | None,
    batch_size: int,
    engine: Engine,
) -> _Drawing:
    config, scale = artifact.config, sampling_scale(artifact.config, guidance_scale)
    teacher = artifact.student.teacher if teacher_steps is None else load(config.teacher).teacher
    prompts = prompts_of(teacher, config, wanted)
    cond_of = condition_of(teacher, config, class_label, prompts, scale)
    seed, request = seed_of(prompts), request_of(teacher, config, class_label, prompts)
    if teacher_steps is None:
        student = artifact.student.to(engine.device)
        starts = refinement_starts(teacher, config, nfe)
        batches = student_images(student, cond_of, seeds, batch_size, engine, starts, seed)
        return _Drawing(batches, nfe, "student", artifact.step, scale, request, seed)
    view = teacher_view(teacher, config, engine, guidance_scale=scale)
    batches = teacher_images(view, teacher_steps, cond_of, seeds, batch_size, engine, seed)
    source = f"teacher, {teacher_steps} step{'s' if teacher_steps > 1 else ''}"
    return _Drawing(batches, reference_calls(view, teacher_steps), source, None, scale, request, seed)


def _write(drawing: _Drawing, folder: Path, seeds: range, progress: Callable[[int, int], None] | None) -> Sampled:
    began, drawn = time.perf_counter(), 0.0
    files: list[Path] = []
    tiles: list[Tensor] = []
    for batch, seconds in _timed(drawing.batches):
        drawn += seconds
        for image in batch:
            seed = seeds[len(files)]
            files.append(folder / f"{seed:06d}.png")
            asked = {"seed": str(drawing.seed_of(seed)), **drawing.request(seed)}
            save_png(image, files[-1], _facts(drawing) | asked)
            if len(tiles) < math.prod(_room(image)):
                tiles.append(image)
        if progress is not None:
            progress(len(files), len(seeds))
    picture = grid(torch.stack(tiles), columns=_columns(tiles[0], len(tiles)))
    picture = enlarge(picture, max(1, min(VISIBLE // tiles[0].shape[-1], GRID_SIDE // max(picture.shape[-2:]))))
    save_png(picture, folder / GRID, _facts(drawing))
    total = time.perf_counter() - began
    return Sampled(
        output=folder,
        files=tuple(files),
        grid=folder / GRID,
        nfe=drawing.nfe,
        seconds=drawn,
        write_seconds=total - drawn,
        source=drawing.source,
        guidance_scale=drawing.guidance_scale,
    )


def _timed(batches: Iterator[Tensor]) -> Iterator[tuple[Tensor, float]]:
    """Each batch with the seconds it took to make, without what its receiver did."""
    began = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - began
        began = time.perf_counter()


def _facts(drawing: _Drawing) -> dict[str, str]:
    facts = {"Software": f"bootcli {__version__}", "source": drawing.source, "nfe": str(drawing.nfe)}
    known = {"training_steps": drawing.training_steps, "guidance_scale": drawing.guidance_scale}
    return facts | {name: str(value) for name, value in known.items() if value is not None}


def _columns(image: Tensor, count: int) -> int:
    """How many of ``count`` images lie side by side: a square of them, where the grid has room for it."""
    columns, rows = _room(image)
    return min(columns, max(math.ceil(math.sqrt(count)), math.ceil(count / rows)))


def _room(image: Tensor) -> tuple[int, int]:
    """How many images of this size a grid holds side by side, and one above the other."""
    _, height, width = image.shape
    return max(1, (GRID_SIDE - GAP) // (width + GAP)), max(1, (GRID_SIDE - GAP) // (height + GAP))


def _settings(
    class_label: int | None,
    prompts: Prompts | None,
    resolution: tuple[int, int] | None,
    guidance_scale: float | None,
    nfe: int,
    teacher_steps: int | None,
) -> Iterator[str]:
    """The folders below ``samples/`` that keep different requests apart."""
    if nfe > 1:
        yield f"nfe-{nfe}"
    if teacher_steps is not None:
        yield f"teacher-{teacher_steps}-steps"
    if resolution is not None:
        yield "{}x{}".format(*resolution)
    if guidance_scale is not None:
        yield f"guidance-{guidance_scale:.9g}"  # all digits that the network sees
    if class_label is not None:
        yield f"class-{class_label}"
    if prompts is not None:
        only = prompts[0] if len(prompts) == 1 else None
        words = re.sub(r"\W+", "-", only.text.lower()).strip("-") if only else f"{len(prompts)}-prompts"
        check = 0
        for prompt in prompts:
            check = zlib.crc32((prompt.text if only == Prompt(prompt.text) else f"{prompt.line}\n").encode(), check)
        yield f"{words[:40]}-{check:08x}"
