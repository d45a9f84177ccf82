"""An exponential moving average of weights: one update rule, one warm-up rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SELDOM = 10
"""Updates between two of an average on another device, once it reaches back over many more."""


class EMA:
    """The moving average of a module's parameters, kept in float32 beside them, or on ``device``.

    The n-th update uses ``min(decay, (1 + n) / (1 + ramp + n))``, so that early weights are forgotten: while the ramp
    rules, the average reaches back over 1 / ramp of the updates so far. On another device it is moved once for a
    hundredth of those, `SELDOM` at most, by the decays of them all: to take all weights there costs more than the
    update itself.
    """

    def __init__(self, module: nn.Module, decay: float, ramp: float = 9.0, device: torch.device | None = None) -> None:
        self.decay = decay
        self.ramp = ramp
        self.away = device is not None
        self.weights = {name: p.detach().to(device, torch.float32, copy=True) for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, n: int) -> None:
        """Move the average towards the module after its n-th update, n = 1, 2, ..."""
        if not self._due(n):
            return
        before = next(m for m in range(n - 1, -1, -1) if self._due(m))
        decay = math.prod(min(self.decay, (1 + m) / (1 + self.ramp + m)) for m in range(before + 1, n + 1))
        averages = list(self.weights.values())
        if self.away:  # one at a time: together they take as much again
            for p, average in zip(module.parameters(), averages, strict=True):
                average.lerp_(p.detach().to(average.device, average.dtype), 1 - decay)
        else:
            current = [p.detach().to(a.dtype) for p, a in zip(module.parameters(), averages, strict=True)]
            torch._foreach_lerp_(averages, current, 1 - decay)

    def _due(self, n: int) -> bool:
        """Whether the average moves after the n-th update; it begins at 0."""
        return n % self.every(n) == 0

    def every(self, n: int) -> int:
        """After how many updates the average moves, about the n-th."""
        return min(SELDOM, max(1, n // 100)) if self.away else 1

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
