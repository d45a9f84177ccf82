"""The networks that learn in a run: copies of the teacher's, or LoRAs in it, and what of that goes together."""

from __future__ import annotations

from typing import Literal

import torch

from bootcli.config import DistillConfig
from bootcli.critic import Critic
from bootcli.engine import Engine, is_out_of_memory
from bootcli.errors import UsageError
from bootcli.lora import Lora, fingerprint
from bootcli.student import Student
from bootcli.teachers.protocol import Conditions, Head, Teacher


def head_of(teacher: Teacher, config: DistillConfig) -> Head:
    """The student's head. Raises `UsageError` for one that a LoRA cannot have."""
    head, lora = config.student.head, config.student.lora_rank > 0
    if lora and head == "x0":
        raise UsageError(
            "--lora-rank: an x0 head makes the last layer anew, which a LoRA shares with its teacher.",
            "Leave student.head out, or train the whole network without --lora-rank.",
        )
    advice = teacher.head()
    if lora and head == "auto" and advice == "x0":
        alpha, sigma = teacher.spec.schedule(torch.ones(1, dtype=torch.float64))
        raise UsageError(
            "--lora-rank: a LoRA keeps its teacher's prediction type, and where this teacher's paths start, "
            f"an error of that is {float(sigma / alpha):.0f} times as large in the image.",
            "Train the whole network, which gets a last layer of its own: leave --lora-rank out.",
        )
    return advice if head == "auto" else head


def check_lora(config: DistillConfig) -> None:
    """Raise `UsageError` for a LoRA that would have to take w; ``config`` without "auto"."""
    if config.guidance_range is None:
        return
    if config.student.lora_rank:
        raise UsageError(
            "--lora-rank: a LoRA shares the teacher's network, which has no input for a guidance scale.",
            "Build one w in, with --guidance-scale 3 for example, or train the whole network without --lora-rank.",
        )
    if config.corrector and config.correction.critic == "lora":
        raise UsageError(
            "correction.critic = lora shares the teacher's network, which has no input for a guidance scale.",
            "With --guidance-range use --set correction.critic=full.",
        )


def check_memory(config: DistillConfig) -> None:
    """Raise `UsageError` for what cannot be held as ``memory`` says; ``config`` without "auto"."""
    memory, lora = config.memory, config.student.lora_rank or (config.corrector and config.correction.critic == "lora")
    if memory.half_teacher and config.mixed_precision == "no":
        raise UsageError(
            "memory.half_teacher: this run computes in float32.", "Leave it out, or add --mixed-precision bf16."
        )
    if memory.offload_teacher and lora:
        raise UsageError(
            "memory.offload_teacher: a LoRA learns in the teacher's own network, which has to stay.", "Leave it out."
        )
    if memory.offload_teacher and adversary_beside(config):
        raise UsageError("memory.offload_teacher: an adversary looks through the teacher's layers.", "Leave it out.")
    if config.optimizer.compile and memory.offload_teacher:
        raise UsageError(
            "optimizer.compile: memory.offload_teacher moves a compiled network.", "Leave one of them out."
        )
    if config.optimizer.compile and config.optimizer.gradient_checkpointing and lora:
        raise UsageError(
            "optimizer.compile: parts that are called again in the backward pass need the LoRA that they had, which a "
            "compiled network does not keep.",
            "Leave it out, or optimizer.gradient_checkpointing.",
        )


def make_networks(teacher: Teacher, config: DistillConfig, engine: Engine) -> tuple[Student, Critic | None]:
    """The student, and the critic where there is one.

    Whole networks are copied first: after that the teacher's weights may be halved, and a LoRA may go into its modules.
    """
    settings, limits, critic, student = config.student, config.guidance_range, None, None
    if config.corrector and config.correction.critic == "full":
        critic = Critic(teacher, config.correction, limits)
    torch.manual_seed(config.seed)  # the new layers of the student
    if not settings.lora_rank:
        student = Student(teacher, head_of(teacher, config), settings.t_min, guidance_range=limits)
    base = fingerprint(teacher.net) if settings.lora_rank else ""
    if config.memory.half_teacher:
        for parameter in teacher.net.parameters():  # not its tables of frequencies and filters, which are small
            parameter.data = parameter.data.to(engine.half)
    if student is None:
        lora = Lora(teacher, "student", settings.lora_rank, base)
        student = Student(teacher, head_of(teacher, config), settings.t_min, lora)
    if config.corrector and critic is None:
        critic = Critic(teacher, config.correction)
    for owner in (student, critic):
        if owner is not None:
            owner.to(engine.device)
            if config.optimizer.gradient_checkpointing:
                how = () if owner.lora is None else (owner.lora.checkpoint,)
                teacher.enable_gradient_checkpointing(owner.net, *how)
    return student, critic


@torch.no_grad()
def try_half(teacher: Teacher, pool: Conditions, engine: Engine) -> None:
    """Raise `UsageError` where the network does not run with half-precision weights outside of mixed precision."""
    x = torch.zeros(1, *teacher.spec.sample_shape, device=engine.device)
    cond = pool.rows(torch.zeros(1, dtype=torch.long)).to(engine.device)
    try:
        teacher.predict(teacher.net, x, torch.full((1,), 0.5, dtype=torch.float64), cond)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"memory.half_teacher: this teacher's network takes float32 weights only ({error!s:.100}).", "Leave it out."
        ) from None


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
    low, high = config.adversary.sigmas
    if beside and not low < high:
        raise UsageError(f"adversary.sigmas = [{low}, {high}] do not rise.")
    return beside
