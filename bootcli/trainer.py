"""The training loop: a generator of step reports that neither prints nor writes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bootcli.config import DistillConfig
from bootcli.ema import EMA
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.objectives.base import Objective, Terms
from bootcli.optimizer import learning_rate, make_optimizer
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


class Trainer:
    """The state of a training run and the loop that advances it.

    Args:
        student: on the engine's device.
        objective: what it is trained on.
        conditions: the pool that every sample draws its condition from, or None for an unconditional teacher.
        config: optimisation settings.
        engine: device, precision, processes.
    """

    def __init__(
        self, student: Student, objective: Objective[Any], conditions: Cond, config: DistillConfig, engine: Engine
    ) -> None:
        shares = config.optimizer.accumulation * engine.num_processes
        if config.batch_size % shares:
            raise UsageError(
                f"batch_size {config.batch_size} cannot be split into {config.optimizer.accumulation} micro-batches "
                f"on {engine.num_processes} processes.",
                "Make it a multiple of their product.",
            )
        self.student = student
        self.objective = objective
        self.conditions = conditions
        self.config = config
        self.engine = engine
        self.step = 0
        self.ema = EMA(student, config.optimizer.ema_decay)
        self._module, self.optimizer = engine.prepare(student, make_optimizer(student, config))

    def run(self) -> Iterator[StepReport]:
        """Advance to ``config.steps``, one report per update.

        Raises `BootError` at a loss or gradient that is not finite, before it touches the weights.
        """
        while self.step < self.config.steps:
            yield self._update(self.step + 1)

    def _update(self, step: int) -> StepReport:
        began = time.perf_counter()
        rate = learning_rate(self.config.optimizer, self.config.learning_rate, step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        terms = self._accumulate(step)
        loss = float(self.engine.mean(sum_loss(terms)))
        if not math.isfinite(loss):
            raise BootError(f"The loss is {loss} at step {step}.", AGAIN)
        norm = self.engine.clip(self.student.parameters(), self.config.optimizer.clip_norm)
        if not math.isfinite(norm) and self.engine.scaler is None:
            raise BootError(f"The gradient is {norm} at step {step}.", AGAIN)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.student, step)
        self.step = step
        return report(step, loss, terms, norm, rate, time.perf_counter() - began)

    def _accumulate(self, step: int) -> list[Terms]:
        """Gradients of this process's share of the batch, in micro-batches."""
        config, engine = self.config, self.engine
        generator = stream(config.seed, step)
        draw = self.objective.draw(generator, config.batch_size)
        pool = next((len(tensor) for tensor in self.conditions.tensors.values()), 1)
        rows = torch.randint(pool, (config.batch_size,), generator=generator)
        parts = config.optimizer.accumulation
        size = config.batch_size // (parts * engine.num_processes)
        terms = []
        for part in range(parts):
            first = (part * engine.num_processes + engine.rank) * size
            share = slice(first, first + size)
            with engine.autocast(), nullcontext() if part == parts - 1 else engine.no_sync(self._module):
                cond = self.conditions.rows(rows[share]).to(engine.device)
                mine = self.objective.take(draw, share, engine.device)
                term = self.objective.loss(self._module, mine, cond)  # type: ignore[arg-type]
            engine.backward(term.loss / parts)
            terms.append(term)
        return terms

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors, and JSON-able facts."""
        tensors = {f"student.{name}": p.detach() for name, p in self.student.state_dict().items()}
        tensors |= {f"ema.{name}": p for name, p in self.ema.weights.items()}
        optimizer = self.optimizer.state_dict()["state"]
        tensors |= {f"optimizer.{i}.{name}": v for i, slots in optimizer.items() for name, v in slots.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.engine.device)
        scaler = self.engine.scaler
        return tensors, {"step": self.step, "scaler": scaler.state_dict() if scaler else None}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from what `state` gave, bit for bit. Raises `KeyError` or `RuntimeError` where it does not fit."""
        self.student.load_state_dict(_below(tensors, "student."))
        averages = _below(tensors, "ema.")
        self.ema.weights = {name: averages[name].to(p.device) for name, p in self.ema.weights.items()}
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(tensors, "optimizer.").items():
            index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.engine.device)
        if self.engine.scaler is not None and facts["scaler"]:
            self.engine.scaler.load_state_dict(facts["scaler"])
        self.step = int(facts["step"])


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
