"""An exponential moving average of weights: one update rule, one warm-up rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The moving average of a module's parameters, kept in float32 beside them, or on ``device``.

    The n-th update uses ``min(decay, (1 + n) / (1 + ramp + n))``, so that early weights are forgotten: while the ramp
    rules, the average reaches back over 1 / ramp of the updates so far.
    """

    def __init__(self, module: nn.Module, decay: float, ramp: float = 9.0, device: torch.device | None = None) -> None:
        self.decay = decay
        self.ramp = ramp
        self.weights = {name: p.detach().to(device, torch.float32, copy=True) for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, n: int) -> None:
        """Move the average towards the module after its n-th update, n = 1, 2, ..."""
        decay = min(self.decay, (1 + n) / (1 + self.ramp + n))
        averages = list(self.weights.values())
        current = [p.detach().to(a.device, a.dtype) for p, a in zip(module.parameters(), averages, strict=True)]
        torch._foreach_lerp_(averages, current, 1 - decay)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Lend the averaged weights to the module; its own come back at the end."""
        parameters = dict(module.named_parameters())
        own = {name: p.detach().clone() for name, p in parameters.items()}
        _copy(self.weights, parameters)
        try:
            yield
        finally:
            _copy(own, parameters)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, nn.Parameter]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name])
