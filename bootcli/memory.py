"""What a run holds in memory, computed from the shapes of its networks before it begins.

Parameters that learn, their gradients and averages are float32. Activations are not among it: they are measured.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bootcli.config import DistillConfig, MemoryConfig, PathsConfig
from bootcli.muon import is_hidden
from bootcli.student import TimeBranch
from bootcli.teachers.protocol import Teacher

LORA_RANK = 64
"""That a suggestion names."""
TIGHT = 0.9
"""The share of a device above which a run only just fits."""
_SMALL, _BLOCK = 4096, 256
"""Of bitsandbytes: tensors with fewer values keep float32 moments, the others share a scale among so many."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Need:
    """Bytes on the device.

    Args:
        teacher: its weights; those of a LoRA's base too.
        student: what of it is not the teacher's.
        companions: weights of critic and judge that are not the teacher's.
        gradients, optimizer: of all that learns.
        average: of the student.
        casts: half-precision copies of float32 weights that learn, while a micro-batch is computed.
        other: networks of the teacher's beside that: text encoder, autoencoder.
    """

    teacher: int
    student: int
    companions: int
    gradients: int
    optimizer: int
    average: int
    casts: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.asdict(self).values())


@dataclass(frozen=True)
class Switch:
    """What a run could turn on.

    Args:
        setting: how.
        saves: bytes, each switch alone; None where only a measurement would tell.
        what: what is saved.
    """

    setting: str
    saves: int | None
    what: str


def need_of(teacher: Teacher, config: DistillConfig, device: torch.device, judge: nn.Module | None = None) -> Need:
    """What a run needs; networks may be on the meta device.

    Args:
        teacher: whose.
        config: with every "auto" resolved.
        device: of the run.
        judge: of its adversary.
    """
    half, memory = config.mixed_precision != "no", config.memory
    base = [p for name, p in teacher.net.named_parameters() if ".lora_" not in name]
    width = 2 if half and memory.half_teacher else 4
    held = sum(width * p.numel() for p in base) + _bytes(teacher.net.buffers())
    whole = [tuple(p.shape) for p in base]
    if config.guidance_range is not None:
        whole += _guidance_input(teacher, config.guidance_range)
    student = lora_shapes(teacher, config.student.lora_rank) if config.student.lora_rank else whole
    student = student + _branch(teacher)
    companions: list[Shape] = []
    if config.corrector:
        lora = config.correction.critic == "lora"
        companions += lora_shapes(teacher, config.correction.lora_rank) if lora else whole
    if judge is not None:
        companions += [tuple(p.shape) for p in judge.parameters()]
    learning = student + companions
    away = device.type != "cpu"
    parts = [p for part in teacher.other_parts() for p in part.parameters() if p.device.type == device.type]
    return Need(
        teacher=0 if away and memory.offload_teacher else held,
        student=4 * _count(student),
        companions=4 * _count(companions),
        gradients=4 * _count(learning),
        optimizer=optimizer_bytes(student, config.optimizer.name) + optimizer_bytes(companions, config.optimizer.name),
        average=0 if away and memory.offload_ema else 4 * _count(student),
        casts=2 * _count(shape for shape in learning if len(shape) > 1) if half else 0,
        other=_bytes(parts),
    )


def bytes_of_path(teacher: Teacher, paths: PathsConfig) -> int:
    """What a stored path takes: its noise, its points and the row of its condition."""
    point = torch.float32.itemsize * torch.Size(teacher.spec.sample_shape).numel()
    return (1 + paths.points) * point + torch.long.itemsize


def main_memory(teacher: Teacher, config: DistillConfig, device: torch.device) -> dict[str, int]:
    """Bytes of main memory: at most, of the stored paths, which are made on the way, and of what is kept off a device.

    The arguments are those of `need_of`.
    """
    found = {"stored paths": sum((store.buffer or 0) * bytes_of_path(teacher, store) for store in config.path_stores)}
    if device.type != "cpu":
        on_it = dataclasses.replace(config, memory=MemoryConfig(half_teacher=config.memory.half_teacher))
        there, here = need_of(teacher, on_it, device), need_of(teacher, config, device)
        found |= {"teacher": there.teacher - here.teacher, "average": there.average - here.average}
    return {name: size for name, size in found.items() if size}


def switches(
    teacher: Teacher, config: DistillConfig, device: torch.device, activations: int | None, judge: nn.Module | None
) -> tuple[Switch, ...]:
    """What would make a run smaller, what costs it least first; the arguments are those of `need_of`.

    Args:
        activations: bytes, measured on one micro-batch; None where it did not get so far.
    """
    now, optimizer, memory = need_of(teacher, config, device, judge).total, config.optimizer, config.memory
    found = []
    if config.guided and config.guidance.one_batch:
        found.append(Switch("--set guidance.one_batch=false", None, "half of the teacher's activations"))
    if not optimizer.gradient_checkpointing:
        found.append(Switch("--set optimizer.gradient_checkpointing=true", None, "most of the activations"))
    micro = optimizer.accumulation or 1
    if config.batch_size % (2 * micro) == 0:
        saved = None if activations is None else activations // 2
        found.append(Switch(f"--set optimizer.accumulation={2 * micro}", saved, "half of the activations"))

    def add(setting: str, what: str, changed: DistillConfig) -> None:
        saved = now - need_of(teacher, changed, device, judge).total
        if saved > 0:
            found.append(Switch(setting, saved, what))

    def with_memory(**change: bool) -> DistillConfig:
        return dataclasses.replace(config, memory=dataclasses.replace(memory, **change))

    if config.mixed_precision != "no":
        add("--set memory.half_teacher=true", "half of the teacher", with_memory(half_teacher=True))
    add("--set memory.offload_ema=true", "the weight average", with_memory(offload_ema=True))
    eight = dataclasses.replace(optimizer, name="adamw8bit")
    add("--set optimizer.name=adamw8bit", "of the optimiser", dataclasses.replace(config, optimizer=eight))
    if not config.student.lora_rank:
        if judge is None:
            add("--set memory.offload_teacher=true", "the teacher", with_memory(offload_teacher=True))
        if teacher.lora_targets() and teacher.head() == "native" and config.guidance_range is None:
            lora = dataclasses.replace(config.student, lora_rank=LORA_RANK)
            add(f"--lora-rank {LORA_RANK}", "a second network", dataclasses.replace(config, student=lora))
    return tuple(found)


def lora_shapes(teacher: Teacher, rank: int) -> list[Shape]:
    """The parameters of a LoRA on a teacher's network, which may have one already."""
    shapes: list[Shape] = []
    for name, module in teacher.net.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in teacher.lora_targets()):
            weight = getattr(module, "base_layer", module).weight
            shapes += [(rank, *weight.shape[1:]), (weight.shape[0], rank, *(1 for _ in weight.shape[2:]))]
    return shapes


def learned(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimiser steps."""
    return [p for p in module.parameters() if p.requires_grad]


def optimizer_bytes(shapes: Iterable[Sequence[int]], name: str) -> int:
    """The state of an optimiser of parameters of these shapes."""
    return sum(_state_bytes(tuple(shape), name) for shape in shapes)


def _state_bytes(shape: Shape, name: str) -> int:
    count = _count([shape])
    if name == "adamw8bit":
        return 8 * count if count < _SMALL else 2 * count + 2 * 4 * -(-count // _BLOCK)
    moments = 1 if name == "muon" and is_hidden(torch.empty(shape, device="meta")) else 2
    return 4 * moments * count + 4  # and the number of its steps


def _branch(teacher: Teacher) -> list[Shape]:
    _, width = teacher.embedding_site(teacher.net)
    with torch.device("meta"):
        return [tuple(p.shape) for p in TimeBranch(width, 0.0).parameters()]


def _guidance_input(teacher: Teacher, limits: tuple[float, float]) -> list[Shape]:
    """The parameters that w enters a copy of the teacher's network by."""
    own = dict(teacher.net.named_parameters())
    with torch.device("meta"):
        net = copy.deepcopy(teacher.net, {id(p): nn.Parameter(p.to("meta")) for p in own.values()})
        teacher.add_guidance_input(net, limits)
    return [tuple(p.shape) for name, p in net.named_parameters() if name not in own]


def _count(shapes: Iterable[Shape]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
