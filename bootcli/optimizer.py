"""Optimisers, and the learning rate they follow."""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import nn

from bootcli.config import DistillConfig, OptimizerConfig


def make_optimizer(student: nn.Module, config: DistillConfig) -> torch.optim.Optimizer:
    """The optimiser of all the student's parameters.

    ``muon`` (Jordan et al. 2024) makes the update of every matrix and convolution orthogonal; biases, norms and layers
    that are hardly matrices take AdamW steps with Nesterov momentum. Its steps are scaled to the size of AdamW's (Liu
    et al. 2025, arXiv 2502.16982), so both names take the same learning rate.
    """
    settings = config.optimizer
    match settings.name:
        case "muon":
            from timm.optim.muon import Muon  # here, because timm takes two seconds to import

            return Muon(
                student.parameters(),
                lr=config.learning_rate,
                weight_decay=settings.weight_decay,
                nesterov=True,
                adjust_lr_fn="match_rms_adamw",
                betas=settings.betas,
            )
        case "adamw":
            return torch.optim.AdamW(
                student.parameters(),
                lr=config.learning_rate,
                weight_decay=settings.weight_decay,
                betas=settings.betas,
                fused=next(student.parameters()).device.type in ("cpu", "cuda"),
            )
        case _:
            assert_never(settings.name)


def learning_rate(config: OptimizerConfig, peak: float, step: int, steps: int) -> float:
    """The learning rate of update ``step`` (from 1) of ``steps``: linear warm-up, then constant, cosine or linear."""
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}
    return peak * factor[config.decay]
