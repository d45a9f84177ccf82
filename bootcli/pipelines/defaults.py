"""What a configuration leaves open, for a teacher: where paths begin, how they are made and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from bootcli.config import OWN_IMAGES, DistillConfig, PathsConfig, Solver
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.memory import bytes_of_path
from bootcli.pipelines.networks import head_of
from bootcli.teachers.protocol import Teacher
from bootcli.teachers.view import PathStart

P = TypeVar("P", bound=PathsConfig)
MAX_GAIN = 20.0
"""sigma / alpha where paths begin, unless it is said."""
LEARNING_RATE, LEARNING_RATE_OF_LORA = 5e-4, 2e-3
"""Unless it is said. A step of a LoRA's thin matrices changes a layer less."""
STORED_PATHS, STORED_BYTES = 16_384, 2**32
"""Paths that are stored, unless it is said: so many, or what they may take."""


def without_auto(teacher: Teacher, config: DistillConfig, engine: Engine) -> DistillConfig:
    """The configuration with what it leaves open; how a batch is split is the trainer's to find."""
    weight = config.boot.weight
    if weight == "auto":
        weight = "velocity" if teacher.spec.prediction == "flow" else "uniform"
    head, start_t = head_of(teacher, config), config.student.start_t
    if start_t is None:
        start_t = 0.5 if head == "x0" else 1.0
    if config.student.lora_rank and start_t != 1.0:
        raise UsageError("student.start_t: a LoRA starts as the teacher, whose weights it shares.", "Leave it out.")
    solver: Solver = "multistep" if config.guided else "unipc"

    def stored(paths: P) -> P:
        return replace(
            paths,
            solver=solver if paths.solver == "auto" else paths.solver,
            buffer=paths.buffer or max(1, min(STORED_PATHS, STORED_BYTES // bytes_of_path(teacher, paths))),
        )

    reference = config.watch.reference
    if reference is None and config.guided and teacher.feature_space() is not None:
        reference = OWN_IMAGES
    return replace(
        config,
        mixed_precision=engine.mixed_precision,
        learning_rate=config.learning_rate or (LEARNING_RATE_OF_LORA if config.student.lora_rank else LEARNING_RATE),
        watch=replace(config.watch, reference=reference),
        student=replace(
            config.student,
            head=head,
            start_t=start_t,
            max_gain=max_gain_of(teacher, config),
            path_start=path_start_of(teacher, config),
        ),
        boot=replace(config.boot, weight=weight),
        kd=stored(config.kd),
        replay=stored(config.replay),
        corrector=config.corrects,
    )


def start_time(teacher: Teacher, config: DistillConfig) -> float:
    """t_max: the largest t with a noise level of at most ``student.max_gain``."""
    student, max_gain = config.student, max_gain_of(teacher, config)
    t_max = 1.0 if max_gain is None else teacher.spec.schedule.time_of(max_gain)
    if t_max < student.t_min + 0.01:
        raise UsageError(f"student.max_gain {max_gain:g} leaves no time range above t_min {student.t_min}.")
    if path_start_of(teacher, config) == "noise" and t_max < 1:
        raise UsageError(
            f"student.path_start=noise: with student.max_gain {max_gain:g} paths begin at t = {t_max:.2f}.",
            "Raise student.max_gain, or take student.path_start=estimate.",
        )
    return t_max


def max_gain_of(teacher: Teacher, config: DistillConfig) -> float | None:
    """``student.max_gain``, or what it is for this teacher where it says nothing."""
    spec, student = teacher.spec, config.student
    explodes = spec.schedule.prior_scale > 1 and student.path_start != "noise"  # noise alone begins at its own level
    return MAX_GAIN if student.max_gain is None and (spec.prediction == "eps" or explodes) else student.max_gain


def path_start_of(teacher: Teacher, config: DistillConfig) -> PathStart:
    """``student.path_start``, or what it is for this teacher where it says nothing.

    Where a schedule keeps some signal at t = 1, guidance adds up with the estimate's.
    """
    if config.student.path_start != "auto":
        return config.student.path_start
    max_gain = max_gain_of(teacher, config)
    whole = max_gain is None or teacher.spec.schedule.time_of(max_gain) == 1
    return "noise" if config.guided and whole else "estimate"
