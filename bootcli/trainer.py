"""The training loop: a generator of step reports that neither prints nor writes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bootcli.companion import Balance, Companion
from bootcli.config import DistillConfig
from bootcli.critic import Critic
from bootcli.ema import EMA
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.judge import Judge
from bootcli.objectives.adversary import Adversary, AdversaryDraw
from bootcli.objectives.base import Objective, Terms
from bootcli.objectives.corrector import Corrector, CorrectorDraw
from bootcli.objectives.kd import KD, KDDraw
from bootcli.objectives.refiner import Refiner, RefinerDraw
from bootcli.optimizer import learning_rate, load_optimizer, make_optimizer, optimizer_tensors
from bootcli.student import Student
from bootcli.teachers.protocol import Cond

RESIDUAL_BINS = 5
AGAIN = "Start again with a lower --learning-rate, or a larger boot.delta."


@dataclass(frozen=True)
class StepReport:
    """One finished update.

    Args:
        step: updates done, from 1.
        loss, parts: of this update's batch.
        residual: mean square of R over the batch.
        residual_bins: the same in five equal bins of t, clean first; NaN where a bin is empty.
        grad_norm: before clipping.
        learning_rate: of this update.
        seconds: this update took.
        images: samples in the batch.
    """

    step: int
    loss: float
    parts: Mapping[str, float]
    residual: float
    residual_bins: tuple[float, ...]
    grad_norm: float
    learning_rate: float
    seconds: float
    images: int


def stream(seed: int, *place: int) -> torch.Generator:
    """A CPU generator for one place (step, ...) of the training stream of ``seed``.

    Each update has its own, so nothing has to be stored to resume, and the draws are apart from image seeds.
    """
    digest = hashlib.blake2b(repr(("train", seed, *place)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Work:
    """What a trainer trains, on the engine's device.

    Args:
        student: the network.
        objective: what it is trained on.
        conditions: the pool that every sample draws its condition from, or none for an unconditional teacher.
        corrector, critic: what corrects its samples, where the run has that.
        adversary, judge: what makes them look like the teacher's, where the run has that.
        refiner: what teaches it to go on from its own samples, where the run has that.
        replay: what grounds it on stored teacher paths, where the run has that.
    """

    student: Student
    objective: Objective[Any]
    conditions: Cond
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
        return cls(prediction, correction, refinement, replay)

    def without_correction(self) -> Parts:
        """The same batch before there is a critic."""
        return Parts(self.prediction + self.correction, 0, self.refinement, self.replay)


@dataclass(frozen=True)
class Draws:
    """The randomness of one update."""

    prediction: Any
    correction: CorrectorDraw | None
    adversary: AdversaryDraw | None
    refinement: RefinerDraw | None
    replay: KDDraw | None


class Trainer:
    """The state of a training run and the loop that advances it.

    Args:
        work: networks and objectives, on the engine's device.
        config: optimisation settings.
        engine: device, precision, processes.
    """

    def __init__(self, work: Work, config: DistillConfig, engine: Engine) -> None:
        shares = config.optimizer.accumulation * engine.num_processes
        if config.batch_size % shares:
            raise UsageError(
                f"batch_size {config.batch_size} cannot be split into {config.optimizer.accumulation} micro-batches "
                f"on {engine.num_processes} processes.",
                "Make it a multiple of their product.",
            )
        self.work = work
        self.config = config
        self.engine = engine
        self.step = 0
        self.seconds = 0.0
        self.parts = Parts.of(config, config.batch_size // shares)
        student = work.student
        self.ema = EMA(student, config.optimizer.ema_decay, config.optimizer.ema_ramp)
        self._module, self.optimizer = engine.prepare(student, make_optimizer(student, config))
        self.companions: dict[str, Companion] = {}
        if work.critic is not None:
            self.companions["critic"] = Companion(work.critic, config.correction, config, engine)
        if work.judge is not None:
            self.companions["judge"] = Companion(work.judge, config.adversary, config, engine)

    def run(self) -> Iterator[StepReport]:
        """Advance to ``config.steps``, one report per update.

        Raises `BootError` at a loss or gradient that is not finite, before it touches the weights.
        """
        while self.step < self.config.steps:
            yield self._update(self.step + 1)

    def _update(self, step: int) -> StepReport:
        began = time.perf_counter()
        config, engine = self.config, self.engine
        rate = learning_rate(config.optimizer, config.learning_rate, step, config.steps, self._time_used())
        terms = self._accumulate(step)
        loss = float(engine.mean(sum_loss(terms)))
        if not math.isfinite(loss):
            raise BootError(f"The loss is {loss} at step {step}.", AGAIN)
        trained: list[tuple[nn.Module, torch.optim.Optimizer, float]] = [(self.work.student, self.optimizer, rate)]
        for companion in self._present(step).values():
            scale = companion.settings.learning_rate_scale
            trained.append((companion.network, companion.optimizer, rate * scale))
        norms = engine.clip([module for module, _, _ in trained], config.optimizer.clip_norm)
        if not all(math.isfinite(norm) for norm in norms) and engine.scaler is None:
            raise BootError(f"The gradient is {norms[0]} at step {step}.", AGAIN)
        for _, optimizer, each in trained:
            for group in optimizer.param_groups:
                group["lr"] = each
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.work.student, step)
        self.step = step
        seconds = time.perf_counter() - began
        self.seconds += seconds
        return report(step, loss, terms, norms[0], rate, seconds)

    def _time_used(self) -> float:
        """The share of the time limit that is used, the same in all processes; 0 where there is none."""
        if self.config.max_minutes is None:
            return 0.0
        share = self.seconds / (60 * self.config.max_minutes)
        return share if self.engine.num_processes == 1 else float(self.engine.mean(torch.tensor(share)))

    def _present(self, step: int) -> dict[str, Companion]:
        """The companions that learn in this update."""
        return {name: companion for name, companion in self.companions.items() if companion.learns(step)}

    def _accumulate(self, step: int) -> list[Terms]:
        """Gradients of this process's share of the batch, in micro-batches."""
        config, engine, work = self.config, self.engine, self.work
        generator = stream(config.seed, step)
        for shared in filter(None, (work.objective, work.replay)):
            shared.renew(generator, config.batch_size, step, engine)
        micro = config.optimizer.accumulation
        present = self._present(step)
        sizes = self.parts if "critic" in present else self.parts.without_correction()
        draws = self._draw(generator, sizes, micro * engine.num_processes, step)
        terms = []
        for part in range(micro):
            index = part * engine.num_processes + engine.rank
            with ExitStack() as context:
                context.enter_context(engine.autocast())
                if part < micro - 1:
                    for module in (self._module, *(companion.prepared for companion in present.values())):
                        context.enter_context(engine.no_sync(module))
                term = self._micro_batch(draws, sizes, index, step)
            engine.backward(term.loss / micro)
            terms.append(term)
        self._balance(terms)
        return terms

    def _draw(self, generator: torch.Generator, sizes: Parts, shares: int, step: int) -> Draws:
        """The randomness of the whole global batch."""
        work, pool, progress = self.work, len(self.work.conditions), (step - 1) / self.config.steps
        prediction = work.objective.draw(generator, sizes.prediction * shares, pool, progress)
        correction = adversary = refinement = replay = None
        if work.corrector is not None and sizes.correction:
            correction = work.corrector.draw(generator, sizes.correction * shares, pool)
        if work.refiner is not None and sizes.refinement:
            refinement = work.refiner.draw(generator, sizes.refinement * shares, pool)
        if work.replay is not None:
            replay = work.replay.draw(generator, sizes.replay * shares, pool, progress)
        if work.adversary is not None and "judge" in self._present(step):
            adversary = work.adversary.draw(generator, self._judged(sizes) * shares)
        return Draws(prediction, correction, adversary, refinement, replay)

    def _judged(self, sizes: Parts) -> int:
        """How many samples of a micro-batch the judge sees: those that are regressed on stored paths."""
        return sizes.prediction if isinstance(self.work.objective, KD) else sizes.replay

    def _micro_batch(self, draws: Draws, sizes: Parts, index: int, step: int) -> Terms:
        """The terms of one micro-batch; the loss is the mean over its samples, and beside it the companions' own."""
        work, device = self.work, self.engine.device
        student: Any = self._module
        pulls: dict[str, tuple[Tensor, Tensor]] = {}

        def rows(count: int) -> slice:
            return slice(index * count, (index + 1) * count)

        def cond_of(draw: Any) -> Cond:
            return work.conditions.rows(draw.rows).to(device)

        mine = work.objective.take(draws.prediction, rows(sizes.prediction), device)
        terms = work.objective.loss(student, mine, cond_of(mine))
        loss, parts = terms.loss * sizes.prediction / sizes.whole, dict(terms.parts)
        grounded, grounded_cond = terms, cond_of(mine)
        if draws.correction is not None and work.corrector is not None:
            critic = self.companions["critic"]
            listens = critic.is_heard(step)
            corrected = work.corrector.take(draws.correction, rows(sizes.correction), device)
            correction = work.corrector.loss(student, critic.prepared, corrected, cond_of(corrected), listens=listens)
            loss = loss + correction.critic
            parts |= {"critic": correction.critic.detach(), "gap": correction.gap.mean()}
            if listens:
                kappa = self.config.correction.balance * critic.balance.ratio
                loss = loss + kappa * correction.student * sizes.correction / sizes.whole
            pulls["critic"] = terms.pull, correction.pull
        if draws.refinement is not None and work.refiner is not None:
            refined = work.refiner.take(draws.refinement, rows(sizes.refinement), device)
            refinement = work.refiner.loss(student, refined, cond_of(refined))
            loss = loss + refinement * sizes.refinement / sizes.whole
            parts["refinement"] = refinement.detach()
        if draws.replay is not None and work.replay is not None:
            stored = work.replay.take(draws.replay, rows(sizes.replay), device)
            replayed = work.replay.loss(student, stored, cond_of(stored))
            loss = loss + replayed.loss * sizes.replay / sizes.whole
            parts["replay"] = replayed.loss.detach()
            if terms.pairs is None:
                grounded, grounded_cond = replayed, cond_of(stored)
        if draws.adversary is not None and work.adversary is not None and grounded.pairs is not None:
            judge, judged = self.companions["judge"], self._judged(sizes)
            listens = judge.is_heard(step)
            noised = work.adversary.take(draws.adversary, rows(judged), device)
            verdict = work.adversary.loss(judge.prepared, grounded.pairs, noised, grounded_cond, listens=listens)
            loss = loss + verdict.judge
            parts["judge"] = verdict.judge.detach()
            if listens:
                kappa = work.adversary.balance * judge.balance.ratio
                loss = loss + kappa * verdict.student * judged / sizes.whole
                pulls["judge"] = grounded.pull, verdict.pull
        return dataclasses.replace(terms, loss=loss, parts=parts, other_pulls=pulls)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors, and JSON-able facts."""
        tensors = {f"student.{name}": p.detach() for name, p in self.work.student.state_dict().items()}
        tensors |= {f"ema.{name}": p for name, p in self.ema.weights.items()}
        tensors |= optimizer_tensors("optimizer", self.optimizer)
        for name, companion in self.companions.items():
            tensors |= companion.state(name)
        tensors |= {f"objective.{name}": tensor for name, tensor in self.work.objective.state().items()}
        if self.work.replay is not None:
            tensors |= {f"replay.{name}": tensor for name, tensor in self.work.replay.state().items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.engine.device)
        scaler = self.engine.scaler
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "balance": {name: dataclasses.asdict(each.balance) for name, each in self.companions.items()},
            "scaler": scaler.state_dict() if scaler else None,
        }
        return tensors, facts

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from what `state` gave, bit for bit. Raises `KeyError` or `RuntimeError` where it does not fit."""
        self.work.student.load_state_dict(_below(tensors, "student."))
        averages = _below(tensors, "ema.")
        self.ema.weights = {name: averages[name].to(p.device) for name, p in self.ema.weights.items()}
        load_optimizer("optimizer", self.optimizer, tensors)
        for name, companion in self.companions.items():
            companion.load_state(name, tensors)
            companion.balance = Balance(**facts["balance"][name])
        self.work.objective.load_state(_below(tensors, "objective."))
        if self.work.replay is not None:
            self.work.replay.load_state(_below(tensors, "replay."))
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.engine.device)
        if self.engine.scaler is not None and facts["scaler"]:
            self.engine.scaler.load_state_dict(facts["scaler"])
        self.step, self.seconds = int(facts["step"]), float(facts["seconds"])

    def _balance(self, terms: list[Terms]) -> None:
        """Take the pulls of this update into the balances of the next ones."""
        for name in terms[0].other_pulls:
            pairs = zip(*(term.other_pulls[name] for term in terms), strict=True)
            both = self.engine.mean(torch.stack([torch.cat(pulls).mean() for pulls in pairs]))
            self.companions[name].balance = self.companions[name].balance.updated(float(both[0]), float(both[1]))


def sum_loss(terms: list[Terms]) -> Tensor:
    """The mean loss of the micro-batches, detached."""
    return torch.stack([term.loss.detach() for term in terms]).mean()


def report(step: int, loss: float, terms: list[Terms], norm: float, rate: float, seconds: float) -> StepReport:
    """The report of one update from this process's terms."""
    residual = torch.cat([term.residual for term in terms]).double().cpu()
    t = torch.cat([term.t for term in terms]).double().cpu()
    bins = (t * RESIDUAL_BINS / max(float(t.max()), 1e-9)).long().clamp(max=RESIDUAL_BINS - 1)
    return StepReport(
        step=step,
        loss=loss,
        parts={name: float(torch.stack([term.parts[name] for term in terms]).mean()) for name in terms[0].parts},
        residual=float(residual.mean()),
        residual_bins=tuple(float(residual[bins == i].mean()) for i in range(RESIDUAL_BINS)),
        grad_norm=norm,
        learning_rate=rate,
        seconds=seconds,
        images=len(residual),
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
