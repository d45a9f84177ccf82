"""Networks that learn beside the student, on its samples: the critic of a corrector, the judge of an adversary."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bootcli.config import AdversaryConfig, CorrectionConfig, DistillConfig
from bootcli.engine import Engine
from bootcli.optimizer import load_optimizer, make_optimizer, optimizer_tensors

LEAST_PULL = 1e-2
"""Pulls count as at least this: a critic that is still the teacher pulls by 0. Directions of a critic are
divided by the error of the denoiser, so that a pull of 1 is usual, as it is for the judge of `fashion`."""


@dataclass(frozen=True)
class Balance:
    """Running means of how strongly the prediction and what is beside it pull (FreeFlow's kappa, Tong et al. 2025).

    They come from earlier updates, so that an update does not depend on how its batch is split.
    """

    prediction: float = 0.0
    other: float = 0.0
    updates: int = 0

    @property
    def ratio(self) -> float:
        """What makes the other pull as the prediction does."""
        return self.prediction / max(self.other, LEAST_PULL)

    def updated(self, prediction: float, other: float) -> Balance:
        """After another update; the newest 20 or so count."""
        keep = min(0.95, self.updates / (self.updates + 1))
        return Balance(
            keep * self.prediction + (1 - keep) * prediction,
            keep * self.other + (1 - keep) * other,
            self.updates + 1,
        )


class Companion:
    """Such a network with its optimiser, and how strongly it pulls.

    Args:
        network: critic or judge, on the engine's device.
        settings: when it learns and is heard, and how fast.
        config: optimisation settings of the run.
        engine: processes, precision.
    """

    def __init__(
        self, network: nn.Module, settings: CorrectionConfig | AdversaryConfig, config: DistillConfig, engine: Engine
    ) -> None:
        self.network = network
        self.settings = settings
        self.prepared, self.optimizer = engine.prepare(network, make_optimizer(network, config))
        self.balance = Balance()

    def learns(self, step: int) -> bool:
        """Whether it is there at an update."""
        return step > self.settings.start

    def is_heard(self, step: int) -> bool:
        """Whether it knows enough for the student to listen."""
        return step > self.settings.start + self.settings.warmup

    def heard(self) -> Companion:
        """The same, which the student listens to at once, and which learns in this process alone: for a trial."""
        trial = copy.copy(self)
        trial.prepared, trial.settings = self.network, replace(self.settings, start=0, warmup=0)
        return trial

    def state(self, name: str) -> dict[str, Tensor]:
        """What a resumed run needs, beside its balance; below ``name``."""
        learned = {key: p.detach() for key, p in self.network.named_parameters() if p.requires_grad}
        tensors = {f"{name}.{key}": tensor for key, tensor in learned.items()}
        return tensors | optimizer_tensors(f"{name}_optimizer", self.optimizer)

    def load_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state` gave. Raises `KeyError` or `RuntimeError` where it does not fit."""
        with torch.no_grad():
            for key, parameter in self.network.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[f"{name}.{key}"])
        load_optimizer(f"{name}_optimizer", self.optimizer, tensors)
