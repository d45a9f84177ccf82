"""Images from seeds: the student in one call, the teacher by its reference sampler.

Image i depends on its own seed alone, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.images import to_uint8
from bootcli.maths.sampling import ddim, heun
from bootcli.maths.signal_ode import from_signal
from bootcli.student import Student
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView

CondOf = Callable[[Sequence[int]], Cond]
"""The conditions of the images with these seeds."""
SeedOf = Callable[[int], int]
"""What the noise of an image is drawn from, by its seed: itself (`int`), unless its prompt brings another."""


def prior_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (b, c, h, w), row i from the generator of ``seeds[i]`` alone; float32 on the CPU."""
    return noises(seeds, 1, shape)[0]


def noises(seeds: Sequence[int], count: int, shape: tuple[int, int, int]) -> Tensor:
    """As `prior_noise`, one after the other from the same generators: (count, b, c, h, w)."""
    generator = torch.Generator()
    noise = torch.empty(count, len(seeds), *shape)
    for i, seed in enumerate(seeds):
        generator.manual_seed(seed)
        for row in noise[:, i]:
            row.normal_(generator=generator)
    return noise


@torch.no_grad()
def student_images(
    student: Student,
    cond_of: CondOf,
    seeds: Sequence[int],
    batch_size: int,
    engine: Engine,
    starts: Sequence[float] = (),
    seed_of: SeedOf = int,
) -> Iterator[Tensor]:
    """Samples in ``1 + len(starts)`` steps as uint8 batches (b, c, H, W) on the CPU.

    Args:
        student: on the engine's device.
        cond_of: conditions by seed.
        seeds: one for each image.
        batch_size: images at a time.
        engine: where and in what precision.
        starts: falling times that the sample is noised to, and drawn again from (`bootcli.objectives.refiner`).
        seed_of: see `SeedOf`.
    """
    for batch in _batches(seeds, batch_size):
        rows = _pair(batch)
        drawn = noises([*map(seed_of, rows)], 1 + len(starts), student.teacher.spec.sample_shape)
        first, *later = drawn.to(engine.device)
        cond = cond_of(rows).to(engine.device)
        with engine.autocast():
            z = student.sample(first, cond)
            for start, noise in zip(starts, later, strict=True):
                t = torch.full((len(z),), start, dtype=torch.float64)
                z = student.sample(from_signal(z, noise, student.teacher.spec.schedule(t)), cond, t)
        yield to_uint8(student.teacher.decode(z))[: len(batch)].cpu()


@torch.no_grad()
def teacher_images(
    view: TeacherView,
    steps: int,
    cond_of: CondOf,
    seeds: Sequence[int],
    batch_size: int,
    engine: Engine,
    seed_of: SeedOf = int,
) -> Iterator[Tensor]:
    """Samples of the reference sampler (DDIM, eta 0, trailing; or Heun) as uint8 batches (b, c, H, W) on the CPU.

    Raises `UsageError` for more steps than the teacher has timesteps.
    """
    times = reference_times(view, steps)
    for batch in _batches(seeds, batch_size):
        rows = _pair(batch)
        eps = prior_noise([*map(seed_of, rows)], view.teacher.spec.sample_shape)
        x = view.schedule.prior_scale * eps.to(engine.device)
        cond = cond_of(rows).to(engine.device)
        with engine.autocast():
            z = _end_of_path(view, x, cond, times)
        yield to_uint8(view.teacher.decode(z))[: len(batch)].cpu()


@torch.no_grad()
def path_ends(
    view: TeacherView,
    t_max: float,
    steps: int,
    cond_of: CondOf,
    seeds: Sequence[int],
    batch_size: int,
    engine: Engine,
    seed_of: SeedOf = int,
) -> Iterator[Tensor]:
    """The ends of the teacher's paths from the noise of seeds (`teacher_endpoint`), batches (b, c, h, w) on the CPU."""
    for batch in _batches(seeds, batch_size):
        rows = _pair(batch)
        eps = prior_noise([*map(seed_of, rows)], view.teacher.spec.sample_shape).to(engine.device)
        with engine.autocast():
            ends = teacher_endpoint(view, eps, cond_of(rows).to(engine.device), t_max, steps)
        yield ends[: len(batch)].cpu()


@torch.no_grad()
def paired_errors(
    student: Student,
    ends: Iterable[Tensor],
    cond_of: CondOf,
    seeds: Sequence[int],
    engine: Engine,
    seed_of: SeedOf = int,
) -> Iterator[Tensor]:
    """Mean squared errors between the student's y(eps, t_min, c) and the end of the teacher's path from the same noise:
    one number per seed, in sample space, as batches (b,) on the CPU, float64.

    Args:
        student: on the engine's device.
        ends: those of the paths (`path_ends`); the student draws as many at a time.
        cond_of, seeds, engine, seed_of: those of the paths.
    """
    left = list(seeds)
    for end in ends:
        batch, left = left[: len(end)], left[len(end) :]
        rows = _pair(batch)
        eps = prior_noise([*map(seed_of, rows)], student.teacher.spec.sample_shape).to(engine.device)
        with engine.autocast():
            drawn = student.sample(eps, cond_of(rows).to(engine.device))
        yield (drawn[: len(batch)].cpu() - end).double().square().flatten(1).mean(1)


def reference_times(view: TeacherView, steps: int) -> Tensor:
    """The times of the reference sampler. Raises `UsageError` for more steps than the teacher has timesteps."""
    times = view.schedule.grid(steps)
    if not (times.diff() < 0).all():
        raise UsageError(f"The teacher has no {steps} timesteps to step through.", "Take fewer teacher steps.")
    return times


@torch.no_grad()
def teacher_endpoint(view: TeacherView, eps: Tensor, cond: Cond, t_max: float, steps: int) -> Tensor:
    """Where the teacher's path from ``eps`` ends: the pair of the student's y(eps, t_min, c).

    It starts where the student's paths do (`TeacherView.start_of_path`).
    """
    at = view.schedule(torch.full((len(eps),), t_max, dtype=torch.float64))
    start = from_signal(view.start_of_path(eps, cond, t_max), eps, at)
    return _end_of_path(view, start, cond, view.schedule.grid(steps) * t_max)


def _end_of_path(view: TeacherView, x: Tensor, cond: Cond, times: Tensor) -> Tensor:
    """Where the reference sampler ends that starts with ``x`` at ``times[0]``."""
    sampler = {"ddim": ddim, "heun": heun}[view.teacher.spec.sampler]
    *_, state = sampler(partial(view.x0, cond=cond), view.schedule, x, times)
    return state


def reference_calls(view: TeacherView, steps: int) -> int:
    """Calls of the network for an image of so many steps of the reference sampler; a guided estimate has two."""
    times = view.schedule.grid(steps)
    heun = view.teacher.spec.sampler == "heun"
    estimates = torch.cat([times[:-1], times[1:-1]]) if heun else times[:-1]
    return len(estimates) + int(view.is_guided(estimates).sum())


def _batches(seeds: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(seeds), batch_size):
        yield seeds[first : first + batch_size]


def _pair(batch: Sequence[int]) -> Sequence[int]:
    """A single seed twice: matrix products of one row take another path, and may round another way."""
    return [*batch, *batch] if len(batch) == 1 else batch
