"""One batch: what shares it, its randomness, and the loss of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bootcli.companion import Companion
from bootcli.config import DistillConfig
from bootcli.critic import Critic
from bootcli.errors import UsageError
from bootcli.judge import Judge
from bootcli.objectives.adversary import Adversary, AdversaryDraw
from bootcli.objectives.base import Objective, Terms
from bootcli.objectives.corrector import Corrector, CorrectorDraw
from bootcli.objectives.kd import KD, KDDraw
from bootcli.objectives.refiner import Refiner, RefinerDraw
from bootcli.student import Student
from bootcli.teachers.guided_pool import GuidedPool
from bootcli.teachers.protocol import Cond


@dataclass(frozen=True)
class Work:
    """What a trainer trains, on the engine's device.

    Args:
        student: the network.
        objective: what it is trained on.
        conditions: the pool that every sample draws its condition from, or none for an unconditional teacher.
        t_max: where the path starts.
        corrector, critic: what corrects its samples, where the run has that.
        adversary, judge: what makes them look like the teacher's, where the run has that.
        refiner: what teaches it to go on from its own samples, where the run has that.
        replay: what grounds it on stored teacher paths, where the run has that.
    """

    student: Student
    objective: Objective[Any]
    conditions: Cond | GuidedPool
    t_max: float
    corrector: Corrector | None = None
    critic: Critic | None = None
    adversary: Adversary | None = None
    judge: Judge | None = None
    refiner: Refiner | None = None
    replay: KD | None = None


@dataclass(frozen=True)
class Parts:
    """How many samples of a micro-batch each objective takes."""

    prediction: int
    correction: int
    refinement: int
    replay: int

    @property
    def whole(self) -> int:
        """Samples in the micro-batch."""
        return self.prediction + self.correction + self.refinement + self.replay

    @classmethod
    def of(cls, config: DistillConfig, size: int) -> Parts:
        """The configured shares of ``size`` samples, at least one where there is any. Raises `UsageError`."""
        correction = max(1, round(config.correction.share * size)) if config.corrector else 0
        refinement = max(1, round(config.refiner.share * size)) if config.refiner.share else 0
        replay = max(1, round(config.replay.share * size)) if config.replay.share else 0
        prediction = size - correction - refinement - replay
        if prediction < 1:
            raise UsageError(
                f"{size} samples in a micro-batch leave none to predict beside {correction} that correct, {refinement} "
                f"that refine and {replay} that are replayed.",
                "Take a larger --batch-size, or smaller shares.",
            )
        sizes = {"kd": (prediction, config.kd), "replay": (replay, config.replay)}
        for name, (taken, paths) in sizes.items():
            if paths.adversary and taken < paths.points:
                raise UsageError(
                    f"{taken} samples in a micro-batch learn {paths.points} points of stored paths: an adversary needs "
                    "an end among them.",
                    f"Take a larger --batch-size or share of them, or fewer {name}.points.",
                )
        return cls(prediction, correction, refinement, replay)

    def without_correction(self) -> Parts:
        """The same batch before there is a critic."""
        return Parts(self.prediction + self.correction, 0, self.refinement, self.replay)


@dataclass(frozen=True)
class Draws:
    """The randomness of one update."""

    prediction: Any
    correction: CorrectorDraw | None
    refinement: RefinerDraw | None
    replay: KDDraw | None
    adversary: AdversaryDraw | None


@dataclass
class MicroBatch:
    """The value of a micro-batch.

    Args:
        terms: of the prediction.
        loss: scalar, with gradient: the mean over all samples, and beside it the companions' own.
        parts: named detached scalars worth watching.
        pulls: of each companion: the pull of what it is balanced against, and its own.
    """

    terms: Terms
    loss: Tensor
    parts: dict[str, Tensor]
    pulls: dict[str, tuple[Tensor, Tensor]]


class Batch:
    """The batch of one update, over all processes and micro-batches.

    Args:
        work: what is trained.
        config: of the run.
        companions: those that learn in this update.
        sizes: in each micro-batch.
        shares: number of micro-batches.
        step: the update, from 1.
        progress: share of the training that is done, in [0, 1].
        generator: of this update.
    """

    def __init__(
        self,
        work: Work,
        config: DistillConfig,
        companions: Mapping[str, Companion],
        sizes: Parts,
        shares: int,
        step: int,
        progress: float,
        generator: torch.Generator,
    ) -> None:
        self.work, self.config, self.companions, self.sizes, self.step = work, config, companions, sizes, step
        pool = len(work.conditions)
        prediction = work.objective.draw(generator, sizes.prediction * shares, pool, progress)
        correction = refinement = replay = adversary = None
        if work.corrector is not None and sizes.correction:
            correction = work.corrector.draw(generator, sizes.correction * shares, pool)
        if work.refiner is not None:
            refinement = work.refiner.draw(generator, sizes.refinement * shares, pool)
        if work.replay is not None:
            replay = work.replay.draw(generator, sizes.replay * shares, pool, progress)
        if work.adversary is not None and "judge" in companions:
            adversary = work.adversary.draw(generator, self._judged * shares)
        self.draws = Draws(prediction, correction, refinement, replay, adversary)

    @property
    def _judged(self) -> int:
        """How many samples of a micro-batch are regressed on the paths whose ends are judged."""
        replayed = self.work.adversary is not None and self.work.adversary.beside == "replay"
        return self.sizes.replay if replayed else self.sizes.prediction

    def micro_batch(self, student: Any, index: int, device: torch.device) -> MicroBatch:
        """Micro-batch ``index`` of all, on a device; ``student`` as the engine prepared it."""
        work, draws, sizes = self.work, self.draws, self.sizes

        def mine(part: Any, draw: Any, size: int) -> tuple[Any, Cond]:
            """Its rows of a draw, and their conditions."""
            taken = part.take(draw, slice(index * size, (index + 1) * size), device)
            return taken, work.conditions.rows(taken.rows).to(device)

        predicted, cond = mine(work.objective, draws.prediction, sizes.prediction)
        terms = work.objective.loss(student, predicted, cond)
        batch = MicroBatch(terms, terms.loss * sizes.prediction / sizes.whole, dict(terms.parts), {})
        regression = terms
        if work.corrector is not None and draws.correction is not None:
            self._correct(batch, work.corrector, student, *mine(work.corrector, draws.correction, sizes.correction))
        if work.refiner is not None:
            refinement = work.refiner.loss(student, *mine(work.refiner, draws.refinement, sizes.refinement))
            batch.loss = batch.loss + refinement * sizes.refinement / sizes.whole
            batch.parts["refinement"] = refinement.detach()
        if work.replay is not None:
            replayed, replayed_cond = mine(work.replay, draws.replay, sizes.replay)
            replay = work.replay.loss(student, replayed, replayed_cond)
            batch.loss = batch.loss + replay.loss * sizes.replay / sizes.whole
            batch.parts["replay"] = replay.loss.detach()
            if work.adversary is not None and work.adversary.beside == "replay":
                regression, cond = replay, replayed_cond
        if work.adversary is not None and draws.adversary is not None:
            rows = slice(index * self._judged, (index + 1) * self._judged)
            self._judge(batch, work.adversary, regression, work.adversary.take(draws.adversary, rows, device), cond)
        return batch

    def _correct(self, batch: MicroBatch, corrector: Corrector, student: Any, draw: CorrectorDraw, cond: Cond) -> None:
        """Add the corrector's loss."""
        critic = self.companions["critic"]
        listens = critic.is_heard(self.step)
        correction = corrector.loss(student, critic.prepared, draw, cond, listens=listens)
        batch.loss = batch.loss + correction.critic
        batch.parts |= {"critic": correction.critic.detach(), "gap": correction.gap.mean()}
        batch.pulls["critic"] = batch.terms.pull, correction.pull
        if listens:
            kappa = self.config.correction.balance * critic.balance.ratio
            batch.loss = batch.loss + kappa * correction.student * self.sizes.correction / self.sizes.whole

    def _judge(
        self, batch: MicroBatch, adversary: Adversary, regression: Terms, draw: AdversaryDraw, cond: Cond
    ) -> None:
        """Add the adversary's loss."""
        assert regression.ends is not None, "it stands beside a regression on stored paths"
        judge = self.companions["judge"]
        listens = judge.is_heard(self.step)
        verdict = adversary.loss(judge.prepared, regression.ends, draw, cond, listens=listens)
        batch.loss = batch.loss + verdict.judge
        batch.parts["judge"] = verdict.judge.detach()
        if listens:
            kappa = adversary.balance * judge.balance.ratio
            batch.loss = batch.loss + kappa * verdict.student * regression.ends.count / self.sizes.whole
            batch.pulls["judge"] = regression.pull, verdict.pull
