"""From a configuration to the objects of a run: teacher, conditions, student, objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import torch

from bootcli.batch import Work
from bootcli.conditions import PromptPool
from bootcli.config import DistillConfig
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.judge import Features, make_judge
from bootcli.maths.broadcast import like
from bootcli.objectives.adversary import Adversary
from bootcli.objectives.base import Objective
from bootcli.objectives.boot import Boot
from bootcli.objectives.corrector import Corrector
from bootcli.objectives.freeflow import FreeFlow
from bootcli.objectives.kd import KD
from bootcli.objectives.refiner import Refiner
from bootcli.pipelines.defaults import start_time, without_auto
from bootcli.pipelines.guidance import be_as_configured, guidance_of, teacher_view
from bootcli.pipelines.networks import adversary_beside, check_lora, check_memory, make_networks, try_half
from bootcli.pipelines.refinement import refiner_times
from bootcli.pipelines.requests import (
    check_negatives,
    check_requests,
    class_pool,
    guided_by,
    in_turn,
    prompts_of,
    sampling_scale,
)
from bootcli.prompts import Prompts
from bootcli.reference import check_reference
from bootcli.sampler import CondOf, prior_noise, reference_times
from bootcli.store.artifact import load_student
from bootcli.student import Student
from bootcli.teachers.guided_pool import GuidedPool
from bootcli.teachers.protocol import Conditions, Teacher
from bootcli.teachers.view import TeacherView

RECOMPILE_LIMIT = 64
"""Networks of one class share it, and past it run uncompiled. Each needs a graph for every gradient mode and shape."""


@dataclass(frozen=True, kw_only=True)
class Distillation(Work):
    """A run that is set up.

    Args:
        view: the teacher as a guided denoiser.
        shown: the conditions of images that are shown and scored, by their seeds; w is the middle of a range.
        config: with every "auto" resolved.
        prompts: of a text teacher, with their embeddings.
    """

    view: TeacherView
    shown: CondOf
    config: DistillConfig
    prompts: PromptPool | None


def set_up(
    teacher: Teacher,
    config: DistillConfig,
    engine: Engine,
    *,
    fresh: bool = True,
    prompts: Prompts | None = None,
) -> Distillation:
    """Build a run. Raises `UsageError` for settings the teacher cannot honour.

    Args:
        teacher: with its weights.
        config: resolved.
        engine: where to.
        fresh: give the student its starting point; False where a checkpoint will replace it.
        prompts: of a text teacher; None: those that the configuration names.
    """
    be_as_configured(teacher, config)
    if config.watch.patience and not (config.watch.every and (config.watch.reference or teacher.feature_space())):
        raise UsageError("watch.patience counts scores.", "Set watch.every and watch.reference, or leave it out.")
    if config.watch.every and config.watch.reference is not None:
        check_reference(teacher, config.watch.reference, "watch.reference")
    check_requests(teacher, config)
    texts, negative = None, None
    if (wanted := prompts_of(teacher, config, prompts)) is not None:
        if fresh:  # an earlier run goes on as it began
            check_negatives(wanted, config)
        texts = PromptPool(teacher, wanted, config.negative_prompt, guided=config.guided)
        negative = texts.negative()
    pool: Conditions = class_pool(teacher, config) if texts is None else texts
    shown = guided_by(in_turn(pool), sampling_scale(config, None))
    view = teacher_view(teacher, config, engine, negative=negative)
    _check_previews(view, config.preview_teacher_steps)
    t_max = start_time(teacher, config)
    config = without_auto(teacher, config, engine)
    beside = adversary_beside(config)
    check_lora(config)
    check_memory(config)
    features = Features(teacher) if beside else None  # before a LoRA goes into the teacher's modules
    student, critic = make_networks(teacher, config, engine)
    if config.memory.half_teacher:
        try_half(teacher, pool, engine)
    if fresh and config.init_from is not None:
        _start_from(student, Path(config.init_from))
    elif fresh:
        start(student, view, shown, t_max, config, engine)
    adversary, judge = None, None
    if beside and features is not None:
        balance = (config.kd if beside == "prediction" else config.replay).adversary
        adversary = Adversary(config.adversary, balance, beside, features)
        first = pool.rows(torch.zeros(1, dtype=torch.long)).to(engine.device)
        judge = make_judge(features, first, config.adversary.width)
    corrector = Corrector(config.correction, view, config.student.t_min, t_max) if config.corrector else None
    # The parts beside the prediction weigh their errors as it does, so that shares mean what they say.
    power = {"boot": config.boot.power, "freeflow": config.freeflow.power, "kd": config.kd.power}[config.objective]
    times = refiner_times(teacher, config)
    refiner = Refiner(config.refiner, power, view, config.student.t_min, times) if times else None
    if config.optimizer.compile:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        owners = [student.net, teacher.net, *([] if critic is None else [critic.net])]
        for module in dict.fromkeys([*owners, *([] if judge is None else [judge])]):  # a LoRA's is the teacher's
            module.compile()
    offload = None
    if config.memory.offload_teacher:
        offload = engine.offload(teacher.net)
        student.net.register_forward_pre_hook(lambda module, args: offload() if torch.is_grad_enabled() else None)
    drawn = pool if config.guidance_range is None else GuidedPool(pool, *config.guidance_range)
    objective = make_objective(config, view, drawn, t_max)
    replay = KD(config.replay, power, view, config.student.t_min, t_max, drawn) if config.replay.share else None
    teacher.release()  # what encoded the first conditions
    return Distillation(
        view=view,
        shown=shown,
        conditions=drawn,
        prompts=texts,
        student=student,
        objective=objective,
        replay=replay,
        corrector=corrector,
        critic=critic,
        adversary=adversary,
        judge=judge,
        refiner=refiner,
        offload_teacher=offload,
        t_max=t_max,
        config=config,
    )


def _check_previews(view: TeacherView, steps: int) -> None:
    """Raise `UsageError` for previews of more steps than the teacher has timesteps."""
    try:
        reference_times(view, steps)
    except UsageError as error:
        raise UsageError(f"preview_teacher_steps = {steps}: {error.message}", error.hint) from error


def facts_of(work: Distillation, origin: str, engine: Engine) -> dict[str, str]:
    """What the user is told of a run."""
    config, spec = work.config, work.view.teacher.spec
    parameters = sum(p.numel() for p in work.student.parameters())
    lora = f"LoRA of rank {config.student.lora_rank}, " if config.student.lora_rank else ""
    return {
        "teacher": f"{config.teacher} ({origin})",
        "samples": "x".join(str(n) for n in spec.sample_shape),
        "student": f"{lora}{parameters / 1e6:.2f}M parameters, {config.student.head} head",
        "objective": f"{config.objective}, t from {work.t_max:.3f} to {config.student.t_min:.3f}",
        **({"guidance": guidance_of(config)} if config.guided else {}),
        "device": f"{engine.device}, mixed precision {engine.mixed_precision}",
    }


def make_objective(config: DistillConfig, view: TeacherView, pool: Conditions, t_max: float) -> Objective[Any]:
    """The prediction objective that the configuration names."""
    t_min = config.student.t_min
    match config.objective:
        case "boot":
            return Boot(config.boot, view, t_min, t_max)
        case "freeflow":
            return FreeFlow(config.freeflow, view, t_min, t_max)
        case "kd":
            return KD(config.kd, config.kd.power, view, t_min, t_max, pool)
        case _:
            assert_never(config.objective)


@torch.no_grad()
def start(
    student: Student, view: TeacherView, shown: CondOf, t_max: float, config: DistillConfig, engine: Engine
) -> None:
    """Start an ``x0`` head near the teacher's mean x_0 at the start of the path, per channel, measured on 64 noises;
    and with the features of the time that the configuration says."""
    start_t = config.student.start_t
    assert start_t is not None, "resolved"
    if student.head == "native" and start_t == 1.0:
        return
    eps = prior_noise(range(config.seed, config.seed + 64), view.teacher.spec.sample_shape).to(engine.device)
    cond = shown(range(64)).to(engine.device)
    if student.head == "x0":
        t = torch.full((64,), t_max, dtype=torch.float64)
        mean = view.x0(like(view.schedule(t).sigma, eps) * eps, t, cond).mean((0, 2, 3))
        student.start_at(mean, eps, cond)
    student.borrow_features(start_t, eps, cond)


def _start_from(student: Student, run: Path) -> None:
    artifact = load_student(run)
    source, lora = artifact.student, artifact.lora
    if student.lora is not None:
        ours = student.lora.exported({})
        if lora is None or replace(lora, tensors={}) != ours:
            what = "a whole network" if lora is None else f"a LoRA of rank {lora.rank}"
            raise UsageError(
                f"--init-from {run}: it holds {what}, and a LoRA of rank {ours.rank} begins as its teacher.",
                "Start from a LoRA of this rank and teacher, or train the whole network without --lora-rank.",
            )
        student.lora.take(lora)
        student.time_branch.load_state_dict(source.time_branch.state_dict())
        return
    if source.head != student.head:
        raise UsageError(f"--init-from {run}: its head is {source.head}, this run's is {student.head}.")
    if (source.guidance_range is None) != (student.guidance_range is None):
        built_in, takes = "has w built in", "takes w as an input"
        its, own = (built_in, takes) if source.guidance_range is None else (takes, built_in)
        raise UsageError(f"--init-from {run}: its student {its}, and this run's {own}.")
    try:
        student.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise BootError(f"--init-from {run}: its network does not fit.", "Use the same teacher.") from error
