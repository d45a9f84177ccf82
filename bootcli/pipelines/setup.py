"""From a configuration to the objects of a run: teacher, conditions, student, objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

from bootcli.batch import Work
from bootcli.config import DistillConfig, GuidanceConfig
from bootcli.critic import Critic
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
from bootcli.prompts import Prompt, read_prompts
from bootcli.sampler import CondOf, prior_noise
from bootcli.store.artifact import load_student
from bootcli.student import Student
from bootcli.teachers.guided_pool import LEVELS, GuidedPool
from bootcli.teachers.protocol import Cond, Teacher
from bootcli.teachers.view import TeacherView


@dataclass(frozen=True, kw_only=True)
class Distillation(Work):
    """A run that is set up.

    Args:
        view: the teacher as a guided denoiser.
        shown: the conditions of images that are shown and scored, by their seeds; w is the middle of a range.
        config: with every "auto" resolved.
    """

    view: TeacherView
    shown: CondOf
    config: DistillConfig


def teacher_view(
    teacher: Teacher, config: DistillConfig, engine: Engine, guidance_scale: float | None = None
) -> TeacherView:
    """The frozen teacher on its device, guided as the configuration says. Raises `UsageError`.

    Args:
        teacher: whose weights.
        config: of the run.
        engine: where.
        guidance_scale: w where the student takes one (`sampling_scale`) and conditions say none; None: the middle.
    """
    teacher.net.requires_grad_(False).eval().to(engine.device)
    teacher.use_clock(config.clock)
    if config.negative_prompt is not None and teacher.spec.conditioning != "text":
        raise UsageError(f"--negative-prompt: the teacher {config.teacher} takes no prompts.")
    if not config.guided:
        _check_unguided(config)
        return TeacherView(teacher)
    guidance, scale = config.guidance, sampling_scale(config, guidance_scale)
    if teacher.spec.conditioning == "none":
        flag = "--guidance-scale" if config.guidance_range is None else "--guidance-range"
        raise UsageError(f"{flag}: the teacher {config.teacher} is unconditional.", "Leave it out.")
    return TeacherView(
        teacher,
        config.guidance_scale if scale is None else scale,
        teacher.condition([config.negative_prompt]).to(engine.device),
        guidance.interval,
        rescale=guidance.rescale,
        one_batch=guidance.one_batch,
        levels=1 if config.guidance_range is None else LEVELS,
    )


def _check_unguided(config: DistillConfig) -> None:
    """Raise `UsageError` for settings that have an effect under guidance alone."""
    if config.negative_prompt is not None:
        raise UsageError("--negative-prompt: without guidance nothing leads away from it.", "Add --guidance-scale 7.5.")
    usual = GuidanceConfig()
    for field in dataclasses.fields(usual):
        if getattr(config.guidance, field.name) != getattr(usual, field.name):
            raise UsageError(f"guidance.{field.name}: this run is not guided.", "Add --guidance-scale 3, for example.")


def sampling_scale(config: DistillConfig, wanted: float | None) -> float | None:
    """w of images that are drawn: what is wanted, else the middle of the range that the student takes w from; None
    where w is built in. Raises `UsageError` for a w that it does not take."""
    limits = config.guidance_range
    if limits is None:
        if wanted is None:
            return None
        raise UsageError(
            f"--guidance-scale: guidance w = {config.guidance_scale:g} is part of this student.",
            "Leave it out, or distil a student that takes w, with: --guidance-range 2,8",
        )
    if wanted is None:
        return sum(limits) / 2
    if not limits[0] <= wanted <= limits[1]:
        raise UsageError(
            f"--guidance-scale {wanted:g}: this student takes a w from {limits[0]:g} to {limits[1]:g}.",
            "Take one of these.",
        )
    return wanted


def condition_pool(teacher: Teacher, config: DistillConfig, prompts: Sequence[Prompt] | None = None) -> Cond:
    """All conditions that the run distils. Raises `UsageError` for a flag that the teacher cannot honour.

    Args:
        teacher: whose.
        config: of the run.
        prompts: of a text teacher; None: those that the configuration names.
    """
    _check_requests(teacher, config)
    if teacher.spec.conditioning == "class":
        return teacher.condition(list(config.classes or range(teacher.spec.num_classes)))
    if teacher.spec.conditioning == "text":
        return of_prompts(teacher, config, read_prompts(config.prompts) if prompts is None else prompts)
    return Cond()


def _check_requests(teacher: Teacher, config: DistillConfig) -> None:
    kind = teacher.spec.conditioning
    if config.prompts is not None and kind != "text":
        raise UsageError(f"--prompts: the teacher {config.teacher} takes no prompts.", "Leave it out.")
    if config.classes is not None and kind != "class":
        raise UsageError(f"--classes: the teacher {config.teacher} has no classes.", "Leave it out.")


def condition_of(
    teacher: Teacher,
    config: DistillConfig,
    class_label: int | None = None,
    prompt: str | None = None,
    guidance_scale: float | None = None,
) -> CondOf:
    """The conditions of images by their seeds: the one that is asked for, or all of the run in turn.

    Raises `UsageError` for a request that the teacher cannot honour, a class that the run left out, or a w that the
    student does not take (`sampling_scale`).
    """
    scale = sampling_scale(config, guidance_scale)
    _check_requests(teacher, config)
    kind = teacher.spec.conditioning
    if class_label is not None and kind != "class":
        raise UsageError(f"--class: the teacher {config.teacher} has no classes.", "Leave it out.")
    if class_label is not None and config.classes is not None and class_label not in config.classes:
        raise UsageError(f"--class {class_label} was not distilled.", f"This run has: {list(config.classes)}")
    if prompt is not None and kind != "text":
        raise UsageError(f"--prompt: the teacher {config.teacher} takes no prompts.", "Leave it out.")
    request = prompt if class_label is None else class_label
    if request is None and kind == "text":  # only what is drawn is encoded
        prompts = read_prompts(config.prompts)

        def encoded(seeds: Sequence[int]) -> Cond:
            return of_prompts(teacher, config, [prompts[seed % len(prompts)] for seed in seeds])

        return guided_by(encoded, scale)
    pool = condition_pool(teacher, config) if request is None else teacher.condition([request])
    return guided_by(in_turn(pool), scale)


def request_of(
    teacher: Teacher, config: DistillConfig, class_label: int | None = None, prompt: str | None = None
) -> Callable[[int], dict[str, str]]:
    """What the image of a seed was asked for, in words; as `condition_of` conditions it."""
    if teacher.spec.conditioning == "class":
        labels = [class_label] if class_label is not None else list(config.classes or range(teacher.spec.num_classes))
        return lambda seed: {"class": str(labels[seed % len(labels)])}
    if teacher.spec.conditioning == "text":
        texts = [prompt] if prompt is not None else [each.text for each in read_prompts(config.prompts)]
        return lambda seed: {"prompt": texts[seed % len(texts)]}
    return lambda seed: {}


def in_turn(pool: Cond) -> CondOf:
    """The conditions of a pool, one after the other, by the seed."""
    return lambda seeds: pool.rows(torch.tensor(list(seeds)) % len(pool))


def guided_by(cond_of: CondOf, scale: float | None) -> CondOf:
    """The same conditions, each with that w; without one where there is none."""
    if scale is None:
        return cond_of
    return lambda seeds: dataclasses.replace(cond_of(seeds), guidance=torch.full((len(seeds),), scale))


def labels_of(teacher: Teacher, config: DistillConfig) -> Callable[[Sequence[int]], Tensor]:
    """The class labels of images by their seeds, (b,), as `condition_of` conditions them."""
    pool = torch.tensor(list(config.classes or range(teacher.spec.num_classes)))
    return lambda seeds: pool[torch.tensor(list(seeds)) % len(pool)]


def of_prompts(teacher: Teacher, config: DistillConfig, prompts: Sequence[Prompt]) -> Cond:
    """What prompts condition a text teacher on, with negative ones where any has its own."""
    cond = teacher.condition([prompt.text for prompt in prompts])
    if not config.guided or all(prompt.negative is None for prompt in prompts):
        return cond
    wanted = [config.negative_prompt if prompt.negative is None else prompt.negative for prompt in prompts]
    places = {text: place for place, text in enumerate(dict.fromkeys(wanted))}  # most are the same: encoded once
    return Cond(cond.tensors, teacher.condition(list(places)).rows(torch.tensor([places[text] for text in wanted])))


def set_up(
    teacher: Teacher,
    config: DistillConfig,
    engine: Engine,
    *,
    fresh: bool = True,
    prompts: Sequence[Prompt] | None = None,
) -> Distillation:
    """Build a run. Raises `UsageError` for settings the teacher cannot honour.

    Args:
        teacher: with its weights.
        config: resolved.
        engine: where to.
        fresh: give the student its starting point; False where a checkpoint will replace it.
        prompts: see `condition_pool`.
    """
    if config.watch.patience and not (config.watch.every and (config.watch.reference or teacher.feature_space())):
        raise UsageError("watch.patience counts scores.", "Set watch.every and watch.reference, or leave it out.")
    pool = condition_pool(teacher, config, prompts)
    limits = config.guidance_range
    shown = guided_by(in_turn(pool), sampling_scale(config, None))
    view = teacher_view(teacher, config, engine)
    t_max = start_time(teacher, config)
    head = teacher.head() if config.student.head == "auto" else config.student.head
    weight = config.boot.weight
    if weight == "auto":
        weight = "velocity" if teacher.spec.prediction == "flow" else "uniform"
    config = dataclasses.replace(
        config,
        mixed_precision=engine.mixed_precision,
        student=dataclasses.replace(config.student, head=head),
        boot=dataclasses.replace(config.boot, weight=weight),
        corrector=config.objective == "freeflow" if config.corrector is None else config.corrector,
    )
    torch.manual_seed(config.seed)  # the new layers of the student
    student = Student(teacher, head, config.student.t_min, limits).to(engine.device)
    if config.optimizer.gradient_checkpointing:
        teacher.enable_gradient_checkpointing(student.net)
    if fresh and config.init_from is not None:
        _start_from(student, Path(config.init_from))
    elif fresh and head == "x0":
        start_x0_head(student, view, shown, t_max, config, engine)
    adversary, judge = None, None
    if beside := adversary_beside(config):
        features = Features(teacher)  # before a critic may put its LoRA into the teacher's modules
        balance = (config.kd if beside == "prediction" else config.replay).adversary
        adversary = Adversary(config.adversary, balance, beside, features, t_max)
        first = pool.rows(torch.zeros(1, dtype=torch.long)).to(engine.device)
        judge = make_judge(features, first, config.adversary.width)
    corrector, critic = None, None
    if config.corrector:
        corrector = Corrector(config.correction, view, config.student.t_min, t_max)
        critic = Critic(teacher, config.correction, limits).to(engine.device)
    # The parts beside the prediction weigh their errors as it does, so that shares mean what they say.
    power = {"boot": config.boot.power, "freeflow": config.freeflow.power, "kd": config.kd.power}[config.objective]
    refiner = Refiner(config.refiner, power, view, config.student.t_min, t_max) if config.refiner.share else None
    if config.optimizer.compile:
        student.net.compile()
        teacher.net.compile()
        if critic is not None and critic.net is not teacher.net:
            critic.net.compile()
        if judge is not None:
            judge.compile()
    drawn = pool if limits is None else GuidedPool(pool, *limits)
    objective = make_objective(config, view, drawn, t_max)
    replay = KD(config.replay, power, view, config.student.t_min, t_max, drawn) if config.replay.share else None
    return Distillation(
        view=view,
        shown=shown,
        conditions=drawn,
        student=student,
        objective=objective,
        replay=replay,
        corrector=corrector,
        critic=critic,
        adversary=adversary,
        judge=judge,
        refiner=refiner,
        t_max=t_max,
        config=config,
    )


def adversary_beside(config: DistillConfig) -> Literal["prediction", "replay"] | None:
    """The regression on stored paths that the run's adversary stands beside; None where it has none.

    Raises `UsageError` where there are no such paths, or levels that leave no room.
    """
    beside: Literal["prediction", "replay"] | None = None
    if config.objective == "kd" and config.kd.adversary:
        beside = "prediction"
    if config.replay.adversary:
        if config.objective == "kd":
            raise UsageError("replay.adversary: with --objective kd the adversary is beside kd.", "Set kd.adversary.")
        if not config.replay.share:
            raise UsageError("replay.adversary needs stored paths.", "Set replay.share, to 0.375 for example.")
        beside = "replay"
    low, high = config.adversary.levels
    if beside and not low < high:
        raise UsageError(f"adversary.levels = [{low}, {high}] do not rise.")
    return beside


def make_objective(config: DistillConfig, view: TeacherView, pool: Cond | GuidedPool, t_max: float) -> Objective[Any]:
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


def refinement_starts(teacher: Teacher, config: DistillConfig, nfe: int) -> tuple[float, ...]:
    """The times that a student trained for few steps goes on from, to sample in ``nfe`` calls: nfe - 1 of its times.

    Raises `UsageError` for more calls than it was trained for.
    """
    times = config.refiner.times if config.refiner.share else ()
    if nfe > 1 + len(times):
        trained = f"at most {1 + len(times)}" if times else "one step only"
        raise UsageError(
            f"--nfe {nfe}: this student was trained for {trained}.",
            "" if times else "Distil one for more with: --set refiner.share=0.15",
        )
    t_max, t_min = start_time(teacher, config), config.student.t_min
    # Spread over all trained times; a single one is the middle.
    chosen = (times[(2 * i + 1) * len(times) // (2 * (nfe - 1))] for i in range(nfe - 1))
    return tuple(t_min + share * (t_max - t_min) for share in chosen)


def start_time(teacher: Teacher, config: DistillConfig) -> float:
    """t_max: the largest t at which the teacher's x_0 is not amplified beyond ``student.max_gain``.

    Only eps (and, much less, v) predictions are divided by alpha; other teachers start at t = 1.
    """
    schedule, student = teacher.spec.schedule, config.student
    t_max = schedule.largest_t(student.max_gain) if teacher.spec.prediction == "eps" else 1.0
    if t_max < student.t_min + 0.01:
        raise UsageError(f"student.max_gain {student.max_gain} leaves no time range above t_min {student.t_min}.")
    return t_max


@torch.no_grad()
def start_x0_head(
    student: Student, view: TeacherView, shown: CondOf, t_max: float, config: DistillConfig, engine: Engine
) -> None:
    """Start near the teacher's mean x_0 at the start of the path, per channel, measured on 64 noises."""
    eps = prior_noise(range(config.seed, config.seed + 64), view.teacher.spec.sample_shape).to(engine.device)
    t = torch.full((64,), t_max, dtype=torch.float64)
    cond = shown(range(64)).to(engine.device)
    mean = view.x0(like(view.schedule(t).sigma, eps) * eps, t, cond).mean((0, 2, 3))
    student.start_at(mean, config.student.start_t, eps, cond)


def _start_from(student: Student, run: Path) -> None:
    source = load_student(run).student
    if source.head != student.head:
        raise UsageError(f"--init-from {run}: its head is {source.head}, this run's is {student.head}.")
    if (source.guidance_range is None) != (student.guidance_range is None):
        built_in, takes = "has w built in", "takes w as an input"
        its, ours = (built_in, takes) if source.guidance_range is None else (takes, built_in)
        raise UsageError(f"--init-from {run}: its student {its}, and this run's {ours}.")
    try:
        student.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise BootError(f"--init-from {run}: its network does not fit.", "Use the same teacher.") from error
