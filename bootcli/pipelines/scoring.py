"""The score of a student that is still learning: small, cheap, always of the same seeds.

In float32, as `bootcli sample` draws: in bf16 black is not quite black, and the distance tells.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bootcli.engine import Engine
from bootcli.evaluate import frechet, statistics_of
from bootcli.images import to_uint8
from bootcli.pipelines.setup import Distillation
from bootcli.reference import OTHER_NOISE, OWN_STEPS, reference_for
from bootcli.sampler import prior_noise, teacher_endpoint
from bootcli.watch import Score

FIRST_SEED = 2**31
"""Far from the seeds that `bootcli evaluate` draws: what chose the student must not flatter it there."""
TEACHER_STEPS = 10
DIVERSE = 128
"""Images whose variance is compared, of student and teacher from the same seeds."""
BATCH = 250


class Scorer:
    """Measures the student of a run.

    Args:
        work: the run.
        engine: where.

    Raises `UsageError` or `BootError` where the configured reference cannot be used.
    """

    def __init__(self, work: Distillation, engine: Engine) -> None:
        self.work = work
        self.engine = engine
        self.cond_of = work.shown
        teacher, wanted = work.view.teacher, work.config.watch.reference
        known = wanted is not None or teacher.feature_space() is not None
        self.reference = reference_for(teacher, wanted, engine.device, own_images=self._own_images) if known else None
        self._teacher_variance: float | None = None

    @torch.no_grad()
    def score(self, step: int) -> Score:
        """The score of the student as it is, with the averaged weights on."""
        if self._teacher_variance is None:
            ends = self._teacher(self._noise(DIVERSE), TEACHER_STEPS)
            self._teacher_variance = _variance(torch.cat([z.cpu() for z in ends]))
        samples = list(self._student())
        fid = None
        if self.reference is not None:
            images = (to_uint8(self.work.view.teacher.decode(z.to(self.engine.device))) for z in samples)
            found = statistics_of(images, self.reference.network, self.engine.device)
            fid = frechet(found, self.reference.statistics)
        self.work.view.teacher.release()
        return Score(step, fid, _variance(torch.cat(samples)[:DIVERSE]) / max(self._teacher_variance, 1e-12))

    def _student(self) -> Iterator[Tensor]:
        for eps, seeds in self._noise(DIVERSE if self.reference is None else self.work.config.watch.num_images):
            yield self.work.student.sample(eps, self.cond_of(seeds).to(self.engine.device)).cpu()

    def _teacher(self, noise: Iterator[tuple[Tensor, range]], steps: int) -> Iterator[Tensor]:
        work = self.work
        for eps, seeds in noise:
            cond = self.cond_of(seeds).to(self.engine.device)
            yield teacher_endpoint(work.view, eps, cond, work.t_max, steps)

    @torch.no_grad()
    def _own_images(self) -> Iterator[Tensor]:
        noise = self._noise(self.work.config.watch.num_images, OTHER_NOISE)
        for z in self._teacher(noise, OWN_STEPS):
            yield to_uint8(self.work.view.teacher.decode(z))

    def _noise(self, count: int, shift: int = 0) -> Iterator[tuple[Tensor, range]]:
        config = self.work.config
        parts = self.engine.num_processes * (config.optimizer.accumulation or 1)
        size = min(BATCH, max(1, config.batch_size // parts))  # what training has room for
        for first in range(0, count, size):
            seeds = range(FIRST_SEED + first, FIRST_SEED + min(first + size, count))
            eps = prior_noise([seed + shift for seed in seeds], self.work.view.teacher.spec.sample_shape)
            yield eps.to(self.engine.device), seeds


def _variance(samples: Tensor) -> float:
    """Variance of samples (n, c, h, w) about their mean, over all values: half of their mean squared distance."""
    return float(samples.float().var(0).mean())
