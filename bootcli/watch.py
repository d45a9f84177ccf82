"""Watching a student learn: which state is the best, whether it still improves, whether it goes wrong.

Numbers in, words out: nothing here draws, measures or writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

COLLAPSED = 0.7
"""Diversity below which samples are too much alike. Students of the recipe of `fashion` end between 0.9 and 1.15."""
NOISY = 1.5
"""Diversity above which there is more in the samples than the teacher draws: noise, as a rule."""
RISEN = 4.0
"""How often its lowest value the smoothed residual may be."""
CHANCE = 1.1
"""How often the lowest distance another may be and tell no worse student: with 500 images the ratio of two students'
distances varies by 4 to 6 % with which images those are (measured in `docs/experiments.md`)."""
SMOOTHING = 50
"""How many of the newest updates the smoothed residual is of, or so; before as many there is none to compare with."""


@dataclass(frozen=True)
class Score:
    """What was measured after one update.

    Args:
        step: updates done.
        fid: distance to the reference; None where there is no reference.
        diversity: variance of the student's samples over that of the teacher's, in sample space.
    """

    step: int
    fid: float | None
    diversity: float


@dataclass
class Watch:
    """The scores of a run so far, and what they mean.

    Args:
        scores: earlier ones, of a resumed run.
    """

    scores: list[Score] = field(default_factory=list)
    _followed: int = 0
    _smooth: float = 0.0
    _lowest: float = math.inf
    _told: set[str] = field(default_factory=set)

    @property
    def best(self) -> Score | None:
        """The newest score that is within `CHANCE` of the lowest distance: of students that it does not tell apart, the
        one that learned longest. None where no distance was measured."""
        lowest = self._lowest_score()
        limit = math.inf if lowest is None else CHANCE * (lowest.fid or 0.0)
        return next((score for score in reversed(self._measured()) if (score.fid or 0.0) <= limit), None)

    def add(self, score: Score) -> bool:
        """Take a score; whether it is the best now."""
        self.scores.append(score)
        return self.best is score

    def since_lowest(self) -> int:
        """Scores after the one with the lowest distance."""
        lowest = self._lowest_score()
        return 0 if lowest is None else len(self.scores) - 1 - self.scores.index(lowest)

    def _measured(self) -> list[Score]:
        return [score for score in self.scores if score.fid is not None and math.isfinite(score.fid)]

    def _lowest_score(self) -> Score | None:
        return min(self._measured(), key=lambda score: score.fid or 0.0, default=None)

    def judge(self, diversity: float) -> str | None:
        """A warning where the diversity has left its bounds since the last look."""
        if diversity < COLLAPSED:
            return self._once(
                "collapse",
                f"The samples have {diversity:.2f} of the teacher's variance: they are becoming alike. If it goes on "
                "falling, lower correction.balance, the pull of the adversary or the learning rate.",
            )
        if diversity > NOISY:
            return self._once(
                "noise",
                f"The samples have {diversity:.2f} times the teacher's variance: noise is left in them. If it does not "
                "fall, lower the learning rate.",
            )
        self._told -= {"collapse", "noise"}
        return None

    def follow(self, residual: float) -> str | None:
        """Take the residual of one update; a warning where it has risen far above its lowest."""
        self._followed += 1
        self._smooth += (residual - self._smooth) / min(self._followed, SMOOTHING)
        if self._followed < SMOOTHING:
            return None
        self._lowest = min(self._lowest, self._smooth)
        if self._smooth > RISEN * self._lowest:
            return self._once(
                "residual",
                f"The residual is {self._smooth:.3g}, {self._smooth / self._lowest:.1f} times its lowest: the student "
                "is leaving the teacher's paths. If it goes on rising, lower the learning rate.",
            )
        if self._smooth < RISEN / 2 * self._lowest:
            self._told -= {"residual"}
        return None

    def _once(self, kind: str, text: str) -> str | None:
        """The text the first time; nothing until things were well again."""
        if kind in self._told:
            return None
        self._told.add(kind)
        return text
