"""Conditions that are guided by a w of their own, drawn for each sample.

A number that names a condition also carries its w, in its low digits. So an objective draws and stores numbers as
without guidance, and a path that is kept for later updates keeps its w.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from bootcli.teachers.protocol import Cond, Conditions

LEVELS = 2**20
"""Levels of w, evenly from the least to the greatest: a millionth of the range apart."""


class GuidedPool:
    """A pool of conditions, each at every level of w.

    Args:
        pool: of the conditions alone.
        low, high: least and greatest w.
    """

    def __init__(self, pool: Conditions, low: float, high: float) -> None:
        self.pool = pool
        self.low = low
        self.high = high

    def __len__(self) -> int:
        """The number of conditions, whatever their w."""
        return len(self.pool)

    def rows(self, index: Tensor) -> Cond:
        """The conditions at ``index``, shape (b,): ``LEVELS`` times the place in the pool, and the level of w."""
        share = (index % LEVELS).double() / (LEVELS - 1)
        guidance = (self.low + share * (self.high - self.low)).float()
        return dataclasses.replace(self.pool.rows(index // LEVELS), guidance=guidance)
