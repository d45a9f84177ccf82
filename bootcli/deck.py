"""The order that the prompts of a run are drawn in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Deck:
    """Prompts in shuffled epochs: each is drawn once, in an order of the epoch's own, before any comes again.

    The rows of a draw depend on its place in that stream alone.

    Args:
        size: number of prompts.
        generator_of: epoch -> the generator of its order.
    """

    drawn: int = 0
    """How many draws there were: the place of the next one."""

    def __init__(self, size: int, generator_of: Callable[[int], torch.Generator]) -> None:
        self.size = size
        self.generator_of = generator_of
        self._orders: dict[int, Tensor] = {}

    def take(self, n: int) -> Tensor:
        """The rows of the next n draws, (n,), int64."""
        rows = self._at(self.drawn, n)
        self.drawn += n
        return rows

    def upcoming(self, first: int, n: int) -> Tensor:
        """Which rows there are among n draws from place ``first``, each once, rising."""
        return torch.arange(self.size) if n >= 2 * self.size else torch.unique(self._at(first, n))

    def _at(self, place: int, n: int) -> Tensor:
        rows = torch.empty(n, dtype=torch.long)
        done = 0
        while done < n:
            epoch, start = divmod(place + done, self.size)
            part = self._order(epoch)[start : start + n - done]
            rows[done : done + len(part)] = part
            done += len(part)
        return rows

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            near = {other: order for other, order in self._orders.items() if abs(other - epoch) == 1}
            self._orders = near | {epoch: torch.randperm(self.size, generator=self.generator_of(epoch))}
        return self._orders[epoch]


Pool = int | Deck
"""What conditions are drawn from: so many of them, uniformly, or a deck."""
