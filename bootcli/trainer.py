"""The training loop: a generator of step reports that neither prints nor writes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bootcli.batch import Batch, MicroBatch, Parts, Work
from bootcli.companion import Balance, Companion
from bootcli.config import DistillConfig
from bootcli.deck import Deck, Pool
from bootcli.ema import EMA
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.memory import learned, optimizer_bytes
from bootcli.optimizer import learning_rate, load_optimizer, make_optimizer, optimizer_tensors

RESIDUAL_BINS = 5
AGAIN = "Start again with a lower --learning-rate, or, with boot, a larger boot.delta."


@dataclass(frozen=True)
class StepReport:
    """One finished update.

    Args:
        step: updates done, from 1.
        loss: of this update's batch.
        parts: of the same; means over this process's micro-batches.
        residual: mean square of R over this process's part of the prediction.
        residual_bins: the same in five equal bins of t up to t_max, clean first; NaN where a bin is empty.
        grad_norm: before clipping.
        learning_rate: of this update.
        seconds: this update took.
        images: samples in the batch, of all parts and processes.
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


class Trainer:
    """The state of a training run and the loop that advances it.

    Args:
        work: networks and objectives, on the engine's device.
        config: optimisation settings; where it leaves open how a batch is split, that is found here.
        engine: device, precision, processes.
    """

    def __init__(self, work: Work, config: DistillConfig, engine: Engine) -> None:
        self.work = work
        self.config = config
        self.engine = engine
        self.step = 0
        self.drawn = 0  # conditions, from the deck
        text = work.student.teacher.spec.conditioning == "text"
        self.deck = Deck(len(work.conditions), lambda epoch: stream(config.seed, 0, epoch)) if text else None
        self.seconds = 0.0
        self.parts = Parts.of(config, config.optimizer.accumulation or 1, engine.num_processes)
        student = work.student
        where = torch.device("cpu") if config.memory.offload_ema else None
        self.ema = EMA(student, config.optimizer.ema_decay, config.optimizer.ema_ramp, where)
        self._module, self.optimizer = engine.prepare(student, make_optimizer(student, config))
        self.companions: dict[str, Companion] = {}
        if work.critic is not None:
            self.companions["critic"] = Companion(work.critic, config.correction, config, engine)
        if work.judge is not None:
            self.companions["judge"] = Companion(work.judge, config.adversary, config, engine)
        if config.optimizer.accumulation is None:
            self.split(self.fitting() if engine.device.type == "cuda" else 1)

    def split(self, accumulation: int) -> None:
        """Take so many micro-batches for each update."""
        optimizer = dataclasses.replace(self.config.optimizer, accumulation=accumulation)
        self.config = dataclasses.replace(self.config, optimizer=optimizer)
        self.parts = Parts.of(self.config, accumulation, self.engine.num_processes)

    def fitting(self) -> int:
        """Micro-batches of an update, as few as fit into the memory; found by trying, and the same in all processes.

        Raises `DoesNotFit` where the smallest does not.
        """
        # All conditions of a trial are the first; what encodes it has to make room, as it does in a run.
        self.work.conditions.rows(torch.zeros(1, dtype=torch.long))
        self.work.student.teacher.release()
        mine = self.config.batch_size // self.engine.num_processes
        splits: dict[int, Parts] = {}
        size = mine
        while size:
            with suppress(UsageError):  # too small for what has to be in it
                splits[size] = Parts.of(self.config, mine // size, self.engine.num_processes)
            size = max((n for n in range(1, size // 2 + 1) if mine % n == 0), default=0)
        fits = self.engine.largest_that_fits(lambda size: self._try(splits[size]), list(splits))
        return self.engine.largest(mine // fits)

    def _try(self, sizes: Parts) -> None:
        """Gradients of one micro-batch of each composition, with everything there may be in an update; nothing is
        learned. No process waits for another: one may run out of memory alone."""
        work, engine, config = self.work, self.engine, self.config
        keepers = [part for part in (work.objective, work.replay) if part is not None]
        kept = [part.state() for part in keepers]
        owners = [work.student, *(each.network for each in self.companions.values())]
        room = sum(optimizer_bytes([p.shape for p in learned(owner)], config.optimizer.name) for owner in owners)
        compositions = {
            tuple(rows.stop - rows.start for rows in sizes.rows(index).values()): index for index in range(sizes.shares)
        }
        later = torch.empty(room, dtype=torch.uint8, device=engine.device)  # what the optimisers will hold
        try:
            for part in keepers:
                part.load_state(part.stand_in())
            companions = {name: each.heard() for name, each in self.companions.items()}
            for index in compositions.values():
                batch = Batch(work, config, companions, sizes, 1, 0.0, stream(config.seed, 0), 1)
                with engine.autocast():
                    loss = batch.micro_batch(work.student, index, engine.device).loss
                engine.backward(loss)
        finally:
            del later
            for owner in owners:
                owner.zero_grad()
            for part, state in zip(keepers, kept, strict=True):
                part.load_state(state)

    def run(self) -> Iterator[StepReport]:
        """Advance to ``config.steps``, one report per update.

        Raises `BootError` at a loss or gradient that is not finite, before it touches the weights.
        """
        while self.step < self.config.steps:
            yield self._update(self.step + 1)

    def _update(self, step: int) -> StepReport:
        began = time.perf_counter()
        config, engine = self.config, self.engine
        time_used = self._time_used()
        assert config.learning_rate is not None, "resolved"
        rate = learning_rate(config.optimizer, config.learning_rate, step, config.steps, time_used)
        batches = self._accumulate(step, max((step - 1) / config.steps, time_used))
        loss = float(engine.mean(torch.stack([each.loss.detach() for each in batches]).mean()))
        if not math.isfinite(loss):
            raise self._undone(f"The loss is {loss} at step {step}.")
        present = self._present(step)
        norms = engine.clip(
            [self.work.student, *(each.network for each in present.values())], config.optimizer.clip_norm
        )
        for name, norm in zip(("student", *present), norms, strict=True):
            if not math.isfinite(norm) and engine.scaler is None:
                raise self._undone(f"The {name}'s gradient is {norm} at step {step}.")
        rates = [rate, *(rate * each.settings.learning_rate_scale for each in present.values())]
        engine.step([self.optimizer, *(each.optimizer for each in present.values())], rates)
        self.ema.update(self.work.student, step)
        self._balance(batches)
        self.step = step
        if self.deck is not None:
            self.drawn = self.deck.drawn
        seconds = time.perf_counter() - began
        self.seconds += seconds
        return report(step, loss, batches, self.work.t_max, norms[0], rate, seconds, self.config.batch_size)

    def _time_used(self) -> float:
        """The share of the time limit that is used, the same in all processes; 0 where there is none."""
        if self.config.max_minutes is None:
            return 0.0
        share = self.seconds / (60 * self.config.max_minutes)
        return float(self.engine.mean(torch.tensor(share, device=self.engine.device)))

    def _pool(self) -> Pool:
        """Where the next update draws its conditions from."""
        if self.deck is None:
            return len(self.work.conditions)
        self.deck.drawn = self.drawn
        return self.deck

    def _present(self, step: int) -> dict[str, Companion]:
        """The companions that learn in this update."""
        return {name: companion for name, companion in self.companions.items() if companion.learns(step)}

    def _accumulate(self, step: int, progress: float) -> list[MicroBatch]:
        """Gradients of this process's share of the batch, in micro-batches."""
        config, engine, work = self.config, self.engine, self.work
        generator = stream(config.seed, step)
        present = self._present(step)
        sizes = self.parts if "critic" in present else self.parts.without_correction()
        micro = sizes.shares // engine.num_processes
        at_once = sizes.whole // sizes.shares
        pool = self._pool()
        work.objective.renew(generator, sizes.prediction, pool, step, engine, min(at_once, sizes.prediction))
        if work.replay is not None:
            work.replay.renew(generator, sizes.replay, pool, step, engine, min(at_once, sizes.replay))
        batch = Batch(work, config, present, sizes, step, progress, generator, pool)
        done = []
        for part in range(micro):
            index = part * engine.num_processes + engine.rank
            with ExitStack() as context:
                context.enter_context(engine.autocast())
                if part < micro - 1:
                    for module in (self._module, *(companion.prepared for companion in present.values())):
                        context.enter_context(engine.no_sync(module))
                each = batch.micro_batch(self._module, index, engine.device)
            if work.offload_teacher is not None:
                work.offload_teacher()
            engine.backward(each.loss / micro)
            done.append(each)
        return done

    def _undone(self, message: str) -> BootError:
        """The error of an update that comes to nothing; the state is that of the one before."""
        for part in (self.work.objective, self.work.replay):
            if part is not None:
                part.take_back()
        return BootError(message, AGAIN)

    @property
    def _base(self) -> str | None:
        """The fingerprint of what a LoRA is trained on."""
        return None if self.work.student.lora is None else self.work.student.lora.base

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
            "drawn": self.drawn,
            "balance": {name: dataclasses.asdict(each.balance) for name, each in self.companions.items()},
            "scaler": scaler.state_dict() if scaler else None,
            "base": self._base,
        }
        return tensors, facts

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from what `state` gave, bit for bit.

        Raises `KeyError`, `RuntimeError` or `ValueError` where it does not fit.
        """
        if facts.get("base") != self._base:
            raise ValueError("its LoRA was trained on other weights of the teacher")
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
        self.drawn = int(facts.get("drawn", 0))  # an older state has none

    def _balance(self, batches: list[MicroBatch]) -> None:
        """Take the pulls of this update into the balances of the next ones."""
        for name in {name: None for each in batches for name in each.pulls}:
            pairs = zip(*(each.pulls[name] for each in batches if name in each.pulls), strict=True)
            pulls = [torch.cat(each) for each in pairs]
            totals = self.engine.mean(torch.stack([each.sum() for each in pulls]))
            counts = self.engine.mean(torch.tensor([float(len(each)) for each in pulls], device=self.engine.device))
            prediction, other = (totals / counts).tolist()
            if math.isfinite(prediction + other):  # a loss scaler passes over an update that is not
                self.companions[name].balance = self.companions[name].balance.updated(prediction, other)


def report(
    step: int,
    loss: float,
    batches: list[MicroBatch],
    t_max: float,
    norm: float,
    rate: float,
    seconds: float,
    images: int,
) -> StepReport:
    """The report of one update from this process's micro-batches."""
    residual = torch.cat([each.terms.residual for each in batches]).cpu().double()
    t = torch.cat([each.terms.t for each in batches]).cpu().double()
    bins = (t * RESIDUAL_BINS / t_max).long().clamp(max=RESIDUAL_BINS - 1)
    parts: dict[str, list[Tensor]] = {}
    for each in batches:
        for name, value in each.parts.items():
            parts.setdefault(name, []).append(value)
    return StepReport(
        step=step,
        loss=loss,
        parts={name: float(torch.stack(values).mean()) for name, values in parts.items()},
        residual=float(residual.mean()),
        residual_bins=tuple(float(residual[bins == i].mean()) for i in range(RESIDUAL_BINS)),
        grad_norm=norm,
        learning_rate=rate,
        seconds=seconds,
        images=images,
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
