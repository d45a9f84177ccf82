"""One batch: what shares it, its randomness, and the loss of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bootcli.companion import Companion
from bootcli.config import DistillConfig
from bootcli.critic import Critic
from bootcli.deck import Pool
from bootcli.errors import UsageError
from bootcli.judge import Judge
from bootcli.objectives.adversary import Adversary, AdversaryDraw, Judged
from bootcli.objectives.base import Objective, Terms
from bootcli.objectives.corrector import Corrector, CorrectorDraw
from bootcli.objectives.kd import KD, KDDraw
from bootcli.objectives.refiner import Refiner, RefinerDraw
from bootcli.student import Student
from bootcli.teachers.protocol import Cond, Conditions


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
        offload_teacher: sends the teacher away until it is asked again, where the run does that.
    """

    student: Student
    objective: Objective[Any]
    conditions: Conditions
    t_max: float
    corrector: Corrector | None = None
    critic: Critic | None = None
    adversary: Adversary | None = None
    judge: Judge | None = None
    refiner: Refiner | None = None
    replay: KD | None = None
    offload_teacher: Callable[[], None] | None = None


@dataclass(frozen=True)
class Parts:
    """How many samples of a batch each objective takes, and how it is split.

    Args:
        prediction, correction, refinement, replay: samples in the batch.
        shares: micro-batches, over all processes; they are equally large.
    """

    prediction: int
    correction: int
    refinement: int
    replay: int
    shares: int = 1

    @property
    def whole(self) -> int:
        """Samples in the batch."""
        return self.prediction + self.correction + self.refinement + self.replay

    def rows(self, index: int) -> dict[str, slice]:
        """The rows of each objective's draw that micro-batch ``index`` has.

        Each objective's samples lie evenly along the batch: however small a micro-batch is, they have their shares of
        the whole, and some micro-batches have none of a rare one.
        """
        counts = {name: getattr(self, name) for name in PARTS}
        places = sorted(((place + 0.5) / count, name) for name, count in counts.items() for place in range(count))
        size = self.whole // self.shares
        before, after = ([name for _, name in places[: end * size]] for end in (index, index + 1))
        return {name: slice(before.count(name), after.count(name)) for name in PARTS}

    @classmethod
    def of(cls, config: DistillConfig, accumulation: int, processes: int = 1) -> Parts:
        """The configured shares of the batch, at least one sample where there is any. Raises `UsageError`.

        Args:
            config: of the run.
            accumulation: micro-batches of each process.
            processes: how many there are; where there are several, each of their micro-batches has something for every
                network, since they exchange its gradients.
        """
        size, shares = config.batch_size, accumulation * processes
        if size % shares:
            raise UsageError(
                f"batch_size {size} cannot be split into {accumulation} micro-batches on {processes} processes.",
                "Make it a multiple of their product.",
            )
        correction = max(1, round(config.correction.share * size)) if config.corrector else 0
        refinement = max(1, round(config.refiner.share * size)) if config.refiner.share else 0
        replay = max(1, round(config.replay.share * size)) if config.replay.share else 0
        prediction = size - correction - refinement - replay
        if prediction < 1:
            raise UsageError(
                f"A batch of {size} samples leaves none to predict beside {correction} that correct, {refinement} that "
                f"refine and {replay} that are replayed.",
                "Take a larger --batch-size, or smaller shares.",
            )
        parts = cls(prediction, correction, refinement, replay, shares)
        parts._check_companions(config, processes)
        return parts

    def _check_companions(self, config: DistillConfig, processes: int) -> None:
        """Raise `UsageError` where a companion has nothing to learn from."""
        splits = [self.rows(index) for index in range(self.shares)] if processes > 1 else [self.joined.rows(0)]
        needed = {"prediction": "predicts"} | ({"correction": "corrects"} if config.corrector else {})
        for part, what in needed.items():
            if any(_length(rows[part]) < 1 for rows in splits):
                raise UsageError(
                    f"A micro-batch has no sample that {what}, and processes learn from all of theirs together.",
                    "Take a larger --batch-size or share of them, or a smaller optimizer.accumulation.",
                )
        for name, part, paths in (("kd", "prediction", config.kd), ("replay", "replay", config.replay)):
            taken = min(_length(rows[part]) for rows in splits)
            if paths in config.path_stores and paths.adversary and taken < paths.points:
                raise UsageError(
                    f"{taken} samples together learn {paths.points} points of stored paths: an adversary needs an end "
                    "among them.",
                    f"Take a larger --batch-size or share of them, or fewer {name}.points.",
                )

    @property
    def joined(self) -> Parts:
        """The same batch in one piece."""
        return replace(self, shares=1)

    def without_correction(self) -> Parts:
        """The same batch before there is a critic."""
        return replace(self, prediction=self.prediction + self.correction, correction=0)


PARTS = ("prediction", "correction", "refinement", "replay")


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


@dataclass(frozen=True)
class Draws:
    """The randomness of one update."""

    prediction: Any
    correction: CorrectorDraw | None
    refinement: RefinerDraw | None
    replay: KDDraw | None
    adversary: Mapping[str, AdversaryDraw]


@dataclass
class MicroBatch:
    """The value of a micro-batch.

    Args:
        terms: of the prediction; empty where it has no sample here.
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
        sizes: of its parts, and how it is split.
        step: the update, from 1.
        progress: share of the training that is done, in [0, 1].
        generator: of this update.
        pool: what conditions are drawn from.
    """

    def __init__(
        self,
        work: Work,
        config: DistillConfig,
        companions: Mapping[str, Companion],
        sizes: Parts,
        step: int,
        progress: float,
        generator: torch.Generator,
        pool: Pool,
    ) -> None:
        self.work, self.config, self.companions, self.sizes, self.step = work, config, companions, sizes, step
        prediction = work.objective.draw(generator, sizes.prediction, pool, progress)
        correction = refinement = replay = None
        if work.corrector is not None and sizes.correction:
            correction = work.corrector.draw(generator, sizes.correction, pool)
        if work.refiner is not None:
            refinement = work.refiner.draw(generator, sizes.refinement, pool)
        if work.replay is not None:
            replay = work.replay.draw(generator, sizes.replay, pool, progress)
        adversary = {}
        if work.adversary is not None and "judge" in companions:
            judged = {part: getattr(sizes, part) for part in (work.adversary.beside, "refinement")}
            adversary = {part: work.adversary.draw(generator, size) for part, size in judged.items() if size}
        self.draws = Draws(prediction, correction, refinement, replay, adversary)

    def micro_batch(self, student: Any, index: int, device: torch.device) -> MicroBatch:
        """Micro-batch ``index`` of all, on a device; ``student`` as the engine prepared it."""
        work, draws, all_rows = self.work, self.draws, self.sizes.rows(index)

        def mine(part: Any, draw: Any, name: str) -> tuple[Any, Cond] | None:
            """Its rows of a draw, and their conditions; None where it has none."""
            if part is None or draw is None or not _length(all_rows[name]):
                return None
            taken = part.take(draw, all_rows[name], device)
            return taken, work.conditions.rows(taken.rows).to(device)

        none = torch.zeros(0, device=device)
        batch = MicroBatch(Terms(none.sum(), {}, none, none.cpu().double(), none), none.sum(), {}, {})
        regressed: dict[str, tuple[Terms, Cond]] = {}
        if (given := mine(work.objective, draws.prediction, "prediction")) is not None:
            batch.terms = work.objective.loss(student, *given)
            batch.loss = batch.terms.loss * self._weight("prediction", all_rows)
            batch.parts |= batch.terms.parts
            regressed["prediction"] = batch.terms, given[1]
        if work.corrector is not None and draws.correction is not None:
            given = mine(work.corrector, draws.correction, "correction")
            self._correct(batch, work.corrector, student, given, all_rows)
        if work.refiner is not None and (given := mine(work.refiner, draws.refinement, "refinement")) is not None:
            refinement = work.refiner.loss(student, *given)
            batch.loss = batch.loss + refinement.loss * self._weight("refinement", all_rows)
            batch.parts |= refinement.parts
            regressed["refinement"] = refinement, given[1]
        if work.replay is not None and (given := mine(work.replay, draws.replay, "replay")) is not None:
            replay = work.replay.loss(student, *given)
            batch.loss = batch.loss + replay.loss * self._weight("replay", all_rows)
            batch.parts["replay"] = replay.loss.detach()
            regressed["replay"] = replay, given[1]
        if work.adversary is not None:
            taken = {name: work.adversary.take(draw, all_rows[name], device) for name, draw in draws.adversary.items()}
            judged = [(*regressed[name], draw) for name, draw in taken.items() if name in regressed]
            if judged:
                self._judge(batch, work.adversary, judged)
        return batch

    def _weight(self, part: str, rows: Mapping[str, slice], *, of_all: bool = True) -> float:
        """What the mean over a part's samples here weighs in the mean over micro-batches: then that is the mean over
        all samples of the batch, or, unless ``of_all``, over those of the part."""
        whole = self.sizes.whole if of_all else getattr(self.sizes, part)
        return _length(rows[part]) * self.sizes.shares / whole

    def _correct(
        self,
        batch: MicroBatch,
        corrector: Corrector,
        student: Any,
        given: tuple[CorrectorDraw, Cond] | None,
        rows: Mapping[str, slice],
    ) -> None:
        """Add the corrector's loss."""
        if given is None:
            batch.pulls["critic"] = batch.terms.pull, batch.terms.pull[:0]
            return
        critic = self.companions["critic"]
        listens = critic.is_heard(self.step)
        correction = corrector.loss(student, critic.prepared, *given, listens=listens)
        batch.loss = batch.loss + correction.critic * self._weight("correction", rows, of_all=False)
        batch.parts |= {"critic": correction.critic.detach(), "gap": correction.gap.mean()}
        batch.pulls["critic"] = batch.terms.pull, correction.pull
        if listens:
            kappa = self.config.correction.balance * critic.balance.ratio
            batch.loss = batch.loss + kappa * correction.student * self._weight("correction", rows)

    def _judge(
        self, batch: MicroBatch, adversary: Adversary, parts: Sequence[tuple[Terms, Cond, AdversaryDraw]]
    ) -> None:
        """Add the adversary's loss: of the ends of stored paths, and of what is refined."""
        judge = self.companions["judge"]
        listens = judge.is_heard(self.step)
        pull = torch.cat([terms.pull for terms, _, _ in parts])
        judged = [Judged(terms.ends, draw, cond) for terms, cond, draw in parts if terms.ends is not None]
        if not any(len(each.ends.rows) for each in judged):
            batch.pulls |= {"judge": (pull, pull[:0])} if listens else {}
            return
        verdict = adversary.loss(judge.prepared, judged, listens=listens)
        count = sum(each.ends.count for each in judged) * self.sizes.shares
        batch.loss = batch.loss + verdict.judge * count / self._ends(adversary)
        batch.parts["judge"] = verdict.judge.detach()
        if listens:
            kappa = adversary.balance * judge.balance.ratio
            batch.loss = batch.loss + kappa * verdict.student * count / self.sizes.whole
            batch.pulls["judge"] = pull, verdict.pull

    def _ends(self, adversary: Adversary) -> float:
        """How many samples of the whole batch are judged, on average."""
        paths = self.config.kd if adversary.beside == "prediction" else self.config.replay
        beside: int = getattr(self.sizes, adversary.beside)
        return beside / paths.points + self.sizes.refinement
