"""Optimisers, and the learning rate they follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from bootcli.config import DistillConfig, OptimizerConfig
from bootcli.errors import UsageError
from bootcli.muon import Muon


def make_optimizer(module: nn.Module, config: DistillConfig) -> torch.optim.Optimizer:
    """The optimiser of all parameters of a module that need gradients.

    All names take the same learning rate. Raises `UsageError` for one that is not installed, or not for this device.
    """
    settings, rate = config.optimizer, config.learning_rate
    assert rate is not None, "resolved"
    parameters = [p for p in module.parameters() if p.requires_grad]
    match settings.name:
        case "muon":
            return Muon(parameters, rate, betas=settings.betas, weight_decay=settings.weight_decay)
        case "adamw":
            return torch.optim.AdamW(
                parameters,
                lr=rate,
                weight_decay=settings.weight_decay,
                betas=settings.betas,
                fused=parameters[0].device.type in ("cpu", "cuda"),
            )
        case "adamw8bit":
            kind = _eight_bits(parameters[0].device)
            optimizer: torch.optim.Optimizer = kind(
                parameters, lr=rate, weight_decay=settings.weight_decay, betas=settings.betas
            )
            return optimizer
        case _:
            assert_never(settings.name)


def _eight_bits(device: torch.device) -> Any:
    """The class of bitsandbytes."""
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"optimizer.name = adamw8bit does not run on {device.type}.", "Use adamw or muon.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # missing, or without a library for this machine, which it says in many ways
        raise UsageError(
            f"optimizer.name = adamw8bit needs bitsandbytes, which cannot be imported: {error!s:.200}.",
            "Install it with: pip install 'bootcli[8bit]'",
        ) from error
    return AdamW8bit


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
    ramp = min(1.0, step / max(1, config.warmup_steps))
    progress = min(1.0, max(0.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps), time_used))
    factor = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "inverse-sqrt": 1 / math.sqrt(max(1.0, step / config.decay_after)),
    }
    return peak * ramp * factor[config.decay]


def optimizer_tensors(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser for a checkpoint: ``name.parameter.slot`` to tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {  # bitsandbytes counts its steps in plain integers
        f"{name}.{i}.{slot}": torch.as_tensor(value)
        for i, p in enumerate(parameters)
        for slot, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer(name: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take back what `optimizer_tensors` gave, among other tensors. Raises `ValueError` where it does not fit."""
    slots: dict[int, dict[str, Tensor | int]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{name}."):
            index, slot = key.removeprefix(f"{name}.").split(".")
            count = tensor.ndim == 0 and not tensor.is_floating_point()
            slots.setdefault(int(index), {})[slot] = int(tensor) if count else tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
