"""The adversary: it moves the student's samples to where a judge takes them for the teacher's.

Regression on stored paths averages over what the student cannot tell apart. A judge sees that, and it needs no images:
what is real here are the ends of the teacher's own paths, as in Diffusion2GAN (Kang et al. 2024, arXiv 2405.05967),
whose judge also sees the noise that they come from. It looks at both through the same little noise, with the teacher's
own features, as in LADD (Sauer et al. 2024, arXiv 2403.12015), whose heads also see the noise level and the prompt.

| code | paper | meaning |
|---|---|---|
| samples, points | G(z), x | the student's, and the teacher's from the same start |
| tau, noise | t, eps | what both are noised with |
| logits | D | how sure the judge is that a sample is the teacher's |

The loss is that of the non-saturating GAN (Goodfellow et al. 2014, arXiv 1406.2661), averaged over places and summed
over maps of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from bootcli.config import AdversaryConfig
from bootcli.errors import UsageError
from bootcli.judge import Features
from bootcli.maths.signal_ode import from_signal
from bootcli.objectives.base import Ends, stratified
from bootcli.teachers.protocol import Cond


@dataclass(frozen=True)
class AdversaryDraw:
    """What one batch is noised with; on the CPU until `Adversary.take`.

    Args:
        tau: noise levels as times of the teacher, (b,), float64.
        noise: (b, c, h, w).
    """

    tau: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Judged:
    """Samples to judge.

    Args:
        ends: k of b samples.
        draw: for all b.
        cond: conditions of all b.
    """

    ends: Ends
    draw: AdversaryDraw
    cond: Cond


@dataclass(frozen=True)
class Verdict:
    """The value of the adversary on one batch.

    Args:
        student: scalar, with gradient for the student; not yet balanced.
        judge: scalar, with gradient for the judge.
        pull: as in `bootcli.objectives.base.Terms`, of each end, (k,).
    """

    student: Tensor
    judge: Tensor
    pull: Tensor


class Adversary:
    """The adversarial objective.

    Args:
        config: noise levels.
        balance: its pull, in units of that of the regression whose ends it looks at.
        beside: which regression that is.
        features: of the teacher.

    Raises `UsageError` for noise levels that the teacher does not have.
    """

    def __init__(
        self,
        config: AdversaryConfig,
        balance: float,
        beside: Literal["prediction", "replay"],
        features: Features,
    ) -> None:
        self.config = config
        self.balance = balance
        self.beside = beside
        self.features = features
        self._range = tuple(features.teacher.spec.schedule.time_of(sigma) for sigma in config.sigmas)
        if not self._range[0] < self._range[1]:
            raise UsageError(f"adversary.sigmas = {list(config.sigmas)} are below all noise levels of this teacher.")

    def draw(self, generator: torch.Generator, batch_size: int) -> AdversaryDraw:
        """Noise levels, stratified over the batch."""
        low, high = self._range
        noise = torch.randn(batch_size, *self.features.teacher.spec.sample_shape, generator=generator)
        return AdversaryDraw(stratified(generator, batch_size, low, high), noise)

    def take(self, draw: AdversaryDraw, rows: slice, device: torch.device) -> AdversaryDraw:
        """The rows of a draw, with the noise on a device."""
        return AdversaryDraw(draw.tau[rows], draw.noise[rows].to(device))

    def loss(self, judge: nn.Module, judged: Sequence[Judged], *, listens: bool) -> Verdict:
        """Both losses; neither network gets a gradient from the other's.

        The judge is called once, on the student's and the teacher's ends.

        Args:
            judge: logits (b, places) of each map of features.
            judged: samples of one or more parts of a batch.
            listens: whether the student needs a gradient.
        """
        count, own = sum(each.ends.count for each in judged), torch.cat([each.ends.samples for each in judged])
        tau = torch.cat([each.draw.tau[each.ends.rows] for each in judged])
        noise = torch.cat([each.draw.noise[each.ends.rows] for each in judged])
        cond = reduce(Cond.then, (each.cond.rows(each.ends.rows) for each in judged))
        k, at, samples = len(own), self.features.teacher.spec.schedule(tau), own.detach().requires_grad_(listens)
        with torch.no_grad():
            real = self.features(from_signal(torch.cat([each.ends.points for each in judged]), noise, at), tau, cond)
        fake = self.features(from_signal(samples, noise, at), tau, cond)
        # New leaves: the judge's loss stops at the features, the student's goes on from there to its samples.
        seen = [each.detach().requires_grad_(listens) for each in fake]
        logits: Sequence[Tensor] = judge([torch.cat(both) for both in zip(real, seen, strict=True)])

        told, persuasion = samples.new_zeros(k), samples.new_zeros(k)
        for each in logits:
            of_real, of_fake = each[:k].float(), each[k:].float()
            told = told + softplus(-of_real).mean(1) + softplus(of_fake).mean(1)
            persuasion = persuasion + softplus(-of_fake).mean(1)
        gradient = torch.zeros_like(samples)
        if listens:
            # Times the number of values, which the mean over them below divides by: half precision needs the room.
            onto = torch.autograd.grad(persuasion.sum() * samples[0].numel(), seen, retain_graph=True)
            (gradient,) = torch.autograd.grad(fake, samples, onto)
        along = (own * gradient).flatten(1).mean(1)  # has the gradient, as a direction for the student
        student = (persuasion.detach() + along - along.detach()).sum() / count
        return Verdict(student, told.sum() / count, gradient.square().flatten(1).mean(1).sqrt())
