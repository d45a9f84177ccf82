"""The teacher, guided as a configuration says."""

from __future__ import annotations

from bootcli.config import DistillConfig, differences
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.pipelines.defaults import path_start_of
from bootcli.pipelines.requests import sampling_scale
from bootcli.teachers.guided_pool import LEVELS
from bootcli.teachers.protocol import Cond, Teacher
from bootcli.teachers.view import TeacherView


def be_as_configured(teacher: Teacher, config: DistillConfig) -> None:
    """Have the teacher tell time and draw sizes as the run does, before it is asked for what depends on them.

    Raises `UsageError` where it draws one size.
    """
    teacher.use_clock(config.clock)
    if config.resolution is not None:
        teacher.use_resolution(*config.resolution)


def teacher_view(
    teacher: Teacher,
    config: DistillConfig,
    engine: Engine,
    *,
    guidance_scale: float | None = None,
    negative: Cond | None = None,
) -> TeacherView:
    """The frozen teacher on its device, guided as the configuration says. Raises `UsageError`.

    Args:
        teacher: with its weights.
        config: of the run.
        engine: where to.
        guidance_scale: w where the student takes one (`sampling_scale`) and conditions say none; None: the middle.
        negative: what guidance leads away from, where that is known; None: the teacher is asked.
    """
    teacher.net.requires_grad_(False).eval().to(engine.device)
    be_as_configured(teacher, config)
    if config.negative_prompt is not None and teacher.spec.conditioning != "text":
        raise UsageError(f"--negative-prompt: the teacher {config.teacher} takes no prompts.")
    if not config.guided:
        _check_unguided(config)
        return TeacherView(teacher, path_start=path_start_of(teacher, config))
    guidance, scale = config.guidance, sampling_scale(config, guidance_scale)
    if teacher.spec.conditioning == "none":
        flag = "--guidance-scale" if config.guidance_range is None else "--guidance-range"
        raise UsageError(f"{flag}: the teacher {config.teacher} is unconditional.", "Leave it out.")
    if negative is None:
        negative = teacher.condition([config.negative_prompt])
    return TeacherView(
        teacher,
        config.guidance_scale if scale is None else scale,
        negative.to(engine.device),
        guidance.interval,
        rescale=guidance.rescale,
        one_batch=guidance.one_batch,
        path_start=path_start_of(teacher, config),
        levels=1 if config.guidance_range is None else LEVELS,
    )


def _check_unguided(config: DistillConfig) -> None:
    """Raise `UsageError` for settings that have an effect under guidance alone."""
    if config.negative_prompt is not None:
        raise UsageError("--negative-prompt: without guidance nothing leads away from it.", "Add --guidance-scale 7.5.")
    for name in differences(DistillConfig(), config):
        if name.startswith("guidance.") or name == "correction.guidance_interval":
            raise UsageError(f"{name}: this run is not guided.", "Add --guidance-scale 3, for example.")


def guidance_of(config: DistillConfig) -> str:
    """How a guided run's teacher is guided, in words."""
    guidance, (low, high) = config.guidance, config.guidance.interval
    if config.guidance_range is None:
        words = f"w = {config.guidance_scale:g}"
    else:
        words = "w from {:g} to {:g}, which the student takes".format(*config.guidance_range)
    words += f", rescaled by {guidance.rescale:g}" if guidance.rescale else ""
    return words + (f", at noise levels {low:g} to {high:g}" if (low, high) != (0, 1) else "")
