"""Optimisers, and the learning rate they follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor, nn

from bootcli.config import DistillConfig, OptimizerConfig
from bootcli.muon import Muon


def make_optimizer(module: nn.Module, config: DistillConfig) -> torch.optim.Optimizer:
    """The optimiser of all parameters of a module that need gradients.

    Both names take the same learning rate.
    """
    settings = config.optimizer
    parameters = [p for p in module.parameters() if p.requires_grad]
    match settings.name:
        case "muon":
            return Muon(parameters, config.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
        case "adamw":
            return torch.optim.AdamW(
                parameters,
                lr=config.learning_rate,
                weight_decay=settings.weight_decay,
                betas=settings.betas,
                fused=parameters[0].device.type in ("cpu", "cuda"),
            )
        case _:
            assert_never(settings.name)


def learning_rate(config: OptimizerConfig, peak: float, step: int, steps: int, time_used: float = 0.0) -> float:
    """The learning rate of update ``step`` (from 1) of ``steps``: a linear warm-up, then what ``config.decay`` says.

    ``inverse-sqrt`` is the schedule of EDM2 (Karras et al. 2024, arXiv 2312.02696): with a long weight
    average it makes a student good at any time, without an end to plan for.

    Args:
        config: warm-up and decay.
        peak: after the warm-up.
        step, steps: where in the training.
        time_used: share of a time limit, in [0, 1]; the training is as far as the further of both.
    """
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    progress = min(1.0, max((step - config.warmup_steps) / max(1, steps - config.warmup_steps), time_used))
    factor = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "inverse-sqrt": 1 / math.sqrt(max(1.0, step / config.decay_after)),
    }
    return peak * factor[config.decay]


def optimizer_tensors(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser for a checkpoint: ``name.parameter.slot`` to tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{name}.{i}.{slot}": value for i, slots in state.items() for slot, value in slots.items()}


def load_optimizer(name: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take back what `optimizer_tensors` gave, among other tensors. Raises `ValueError` where it does not fit."""
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{name}."):
            index, slot = key.removeprefix(f"{name}.").split(".")
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
