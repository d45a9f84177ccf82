"""`bootcli distill --dry-run`: what a run will take, computed from its shapes and measured on a few updates."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bootcli.config import DistillConfig, to_dict
from bootcli.engine import Engine, is_out_of_memory
from bootcli.memory import TIGHT, Need, Switch, main_memory, need_of, switches
from bootcli.objectives.kd import FIRST_BATCHES
from bootcli.pipelines.defaults import without_auto
from bootcli.pipelines.distill import Session
from bootcli.pipelines.guidance import be_as_configured
from bootcli.pipelines.setup import facts_of, set_up
from bootcli.store.rundir import RunDir
from bootcli.teachers.registry import load
from bootcli.trainer import Trainer


@dataclass(frozen=True)
class Estimate:
    """What `--dry-run` shows.

    Args:
        config: resolved, nested.
        facts: as at the start of a run.
        seconds_per_step, total_seconds: measured on updates after a warm-up, without pictures and scores; None where
            memory ran out.
        memory_bytes: measured peak of the device, on a CPU of the process; where memory ran out, what is computed.
        parameters: of the student, that learn.
        needs: bytes of each part (`bootcli.memory.Need`), computed, and measured ``activations``: what an update takes
            beside them, None where memory ran out. On a CPU ``other`` is all the rest of the process.
        main_memory: bytes of the CPU's memory that come on top (`bootcli.memory.main_memory`).
        capacity_bytes: of the device.
        ran: whether memory was enough for the updates.
        switches: what would make it smaller, where it does not fit or only just.
    """

    config: Mapping[str, object]
    facts: Mapping[str, str]
    seconds_per_step: float | None
    total_seconds: float | None
    memory_bytes: int
    parameters: int
    needs: Mapping[str, int | None]
    main_memory: Mapping[str, int]
    capacity_bytes: int
    ran: bool
    switches: tuple[Switch, ...]


def dry_run(config: DistillConfig) -> Estimate:
    """Set the run up, take three updates, write nothing but text embeddings, which the run will find.

    Where memory runs out, what can be computed is told all the same.
    """
    engine = Engine(config.device, config.mixed_precision)
    loaded = load(config.teacher)
    teacher, device = loaded.teacher, engine.device
    be_as_configured(teacher, config)  # how many paths fit depends on it
    resolved = without_auto(teacher, config, engine)
    facts = {"teacher": f"{config.teacher} ({loaded.origin})", "device": str(device)}
    need, judge, cost, measured = need_of(teacher, resolved, device), None, None, None
    try:
        work = set_up(teacher, _soon(config), engine)
        resolved, judge, facts = _later(work.config, resolved), work.judge, facts_of(work, loaded.origin, engine)
        need = need_of(teacher, resolved, device, judge)
        trainer = Trainer(work, work.config, engine)
        for _ in Session(RunDir(Path()), work, trainer, loaded.family.name, engine).encode():
            pass
        resolved = _later(trainer.config, resolved)
        cost, measured = _measure(trainer, resolved, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    needs, capacity = _needs(need, measured, device), _capacity(device)
    total = need.total if measured is None else measured.peak
    roomy = measured is not None and total <= TIGHT * capacity
    return Estimate(
        config=to_dict(resolved),
        facts=facts,
        seconds_per_step=None if cost is None else cost.update,
        total_seconds=None if cost is None else cost.total(config),
        memory_bytes=total,
        parameters=need.student // 4,
        needs=needs,
        main_memory=main_memory(teacher, resolved, device),
        capacity_bytes=capacity,
        ran=measured is not None,
        switches=() if roomy else switches(teacher, resolved, device, needs["activations"], judge),
    )


def _soon(config: DistillConfig) -> DistillConfig:
    """Three updates in which everybody learns at once; the second makes teacher paths, where the run stores any, and
    the third does not: a buffer of one is full, however small a part of the batch the paths are."""
    soon, paths = {"start": 0, "warmup": 0}, {"reuse": 2, "buffer": 1}
    return dataclasses.replace(
        config,
        steps=3,
        correction=dataclasses.replace(config.correction, **soon),  # type: ignore[arg-type]
        adversary=dataclasses.replace(config.adversary, **soon),  # type: ignore[arg-type]
        kd=dataclasses.replace(config.kd, **paths),  # type: ignore[arg-type]
        replay=dataclasses.replace(config.replay, **paths),  # type: ignore[arg-type]
    )


def _later(found: DistillConfig, config: DistillConfig) -> DistillConfig:
    """What was found for `_soon`, in the run as it will be."""
    parts = {name: getattr(config, name) for name in ("steps", "correction", "adversary", "kd", "replay")}
    return dataclasses.replace(found, **parts)


@dataclass(frozen=True)
class _Cost:
    """Seconds of a usual update, and of the teacher paths that the first ones make more of."""

    update: float
    first_paths: float

    def total(self, config: DistillConfig) -> float:
        return min(self.first_paths + self.update * config.steps, 60 * (config.max_minutes or math.inf))


@dataclass(frozen=True)
class _Measured:
    """Bytes: the peak of the device, and on a CPU what the process held before the last update."""

    peak: int
    before: int


def _measure(trainer: Trainer, config: DistillConfig, device: torch.device) -> tuple[_Cost, _Measured]:
    """Time, and memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # larger sizes were tried before
    reports = trainer.run()
    next(reports)
    with_paths, before = next(reports), _held()
    with _PeakOfProcess() as process:
        without = next(reports)
    reuse = [store.reuse for store in config.path_stores]
    paths = max(0.0, with_paths.seconds - without.seconds) if reuse else 0.0  # of a batch
    of_paths = paths / min(reuse, default=1)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process.most
    update = max(0.0, without.seconds + of_paths - _of_average(trainer, config.steps))
    return _Cost(update, min(FIRST_BATCHES, config.steps) * paths), _Measured(peak, before)


def _of_average(trainer: Trainer, steps: int) -> float:
    """Seconds that an average on the CPU, which moves in each of the first updates, saves one of most in so many."""
    every = trainer.ema.every(steps)
    if every == 1:
        return 0.0
    began = time.perf_counter()
    trainer.ema.update(trainer.work.student, 1)
    return (time.perf_counter() - began) * (1 - 1 / every)


def _needs(need: Need, measured: _Measured | None, device: torch.device) -> dict[str, int | None]:
    """The parts of the memory by name, with what an update takes beside them."""
    needs: dict[str, int | None] = dataclasses.asdict(need)
    if measured is None:
        return needs | {"activations": None}
    if device.type == "cuda":
        return needs | {"activations": max(0, measured.peak - need.total)}
    # Gradients and half-precision copies come and go with the update, too.
    activations = max(0, measured.peak - measured.before - need.gradients - need.casts)
    rest = max(0, measured.peak - activations - (need.total - need.other))
    return needs | {"activations": activations, "other": rest}


class _PeakOfProcess:
    """The most that the process held inside, looked at every few milliseconds."""

    def __enter__(self) -> _PeakOfProcess:
        self.most, self._done = _held(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, _held())

    def __exit__(self, *args: object) -> None:
        self._done.set()
        self._watcher.join()


def _held() -> int:
    return int(psutil.Process().memory_info().rss)


def _capacity(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
