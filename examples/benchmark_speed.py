"""How much bootcli adds to the networks it calls, in time. Prints JSON.

    python examples/benchmark_speed.py --repeats 20

Two ratios, each from interleaved repetitions in one process, so that a busy machine slows both sides alike:

- ``sampling``: images per second of one-step sampling, from seeds to uint8 images in memory, divided by those of a
  bare loop that calls the student's network on ready noise;
- ``training``: seconds of a whole training step divided by the sum of its network calls, each timed alone: forward
  where no gradient is taken, forward and backward where one is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bootcli.config import resolve
from bootcli.engine import Engine
from bootcli.pipelines.requests import condition_of
from bootcli.pipelines.setup import Distillation, set_up
from bootcli.sampler import student_images
from bootcli.teachers.registry import load
from bootcli.trainer import Trainer


@dataclass(frozen=True)
class Call:
    """One call of a network, as it was seen, to be made again."""

    net: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    with_gradient: bool

    def again(self, engine: Engine) -> None:
        with torch.set_grad_enabled(self.with_gradient), engine.autocast():
            output = self.net(*self.args, **self.kwargs)
        if self.with_gradient:
            tensor = output[0] if not isinstance(output, torch.Tensor) else output
            tensor.float().square().mean().backward()


@contextmanager
def watching(*nets: nn.Module) -> Iterator[list[Call]]:
    """The calls of these networks within the block."""
    calls: list[Call] = []

    def see(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(net, args, kwargs, torch.is_grad_enabled()))

    handles = [net.register_forward_pre_hook(see, with_kwargs=True) for net in nets]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def alternate(
    first: Callable[[], object], second: Callable[[], object], repeats: int, engine: Engine
) -> list[Sequence[float]]:
    """Seconds of both, in turn, after one repetition that does not count."""
    times = [(seconds(first, engine.device), seconds(second, engine.device)) for _ in range(repeats + 1)]
    return times[1:]


def sampling(work: Distillation, engine: Engine, batch_size: int, batches: int, repeats: int) -> dict[str, float]:
    student = work.student.eval()
    cond_of, seeds = condition_of(student.teacher, work.config), range(batch_size * batches)

    def sample(seeds: Sequence[int]) -> list[torch.Tensor]:
        return list(student_images(student, cond_of, seeds, batch_size, engine))

    with watching(student.net) as calls:
        sample(seeds)

    def bare() -> None:
        for call in calls:
            call.again(engine)

    times = alternate(lambda: sample(seeds), bare, repeats, engine)
    ratios = [theirs / ours for ours, theirs in times]
    rate = len(seeds) / statistics.median(ours for ours, _ in times)
    return {"ratio": statistics.median(ratios), "at_least": 0.9, "images_per_second": rate}


def training(work: Distillation, engine: Engine, repeats: int) -> dict[str, float]:
    student = work.student.train()
    trainer = Trainer(work, work.config, engine)
    reports = trainer.run()
    with watching(student.net, work.view.teacher.net) as calls:
        next(reports)

    def alone() -> None:
        for call in calls:
            call.again(engine)
        trainer.optimizer.zero_grad()

    times = alternate(lambda: next(reports), alone, repeats, engine)
    ratios = [ours / theirs for ours, theirs in times]
    step = statistics.median(ours for ours, _ in times)
    return {"ratio": statistics.median(ratios), "at_most": 1.1, "seconds_per_step": step, "network_calls": len(calls)}


def main() -> None:
    parser = argparse.ArgumentParser(description="How much bootcli adds to the networks it calls.")
    parser.add_argument("--teacher", default="fashion")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2, help="batches of one sampling repetition")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves them alone")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = resolve({"teacher": options.teacher, "device": options.device, "batch_size": options.batch_size})
    engine = Engine(config.device, config.mixed_precision)
    work = set_up(load(config.teacher).teacher, config, engine)
    result = {
        "sampling": sampling(work, engine, options.batch_size, options.batches, options.repeats),
        "training": training(work, engine, options.repeats),
        "teacher": options.teacher,
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "device": str(engine.device),
        "precision": engine.mixed_precision,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
