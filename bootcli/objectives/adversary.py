"""The adversary: it moves the student's samples to where a judge takes them for the teacher's.

Regression on stored paths averages over what the student cannot tell apart, and its samples are smoother than the
teacher's. A judge sees that, and it needs no images: what is real here are the ends of the teacher's own paths
(Diffusion2GAN, Kang et al. 2024, arXiv 2405.05967). It looks at both through the same little noise, with the teacher's
own features (LADD, Sauer et al. 2024, arXiv 2403.12015).

| code | paper | meaning |
|---|---|---|
| samples, points | G(z), x | the student's, and the teacher's from the same noise |
| tau, noise | t, eps | what both are noised with |
| logits | D | how sure the judge is that a sample is the teacher's |

The loss is that of the non-saturating GAN (Goodfellow et al. 2014, arXiv 1406.2661), averaged over places and summed
over maps of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from bootcli.config import AdversaryConfig
from bootcli.judge import Features
from bootcli.maths.signal_ode import from_signal
from bootcli.objectives.base import Pairs, stratified
from bootcli.teachers.protocol import Cond


@dataclass(frozen=True)
class AdversaryDraw:
    """What one batch of pairs is noised with; on the CPU until `Adversary.take`.

    Args:
        tau: noise levels as times of the teacher, (b,), float64.
        noise: (b, c, h, w).
    """

    tau: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Verdict:
    """The value of the adversary on one batch.

    Args:
        student: scalar, with gradient for the student; not yet balanced.
        judge: scalar, with gradient for the judge.
        pull: as in `bootcli.objectives.base.Terms`, (b,).
    """

    student: Tensor
    judge: Tensor
    pull: Tensor


class Adversary:
    """The adversarial objective.

    Args:
        config: noise levels.
        balance: its pull, in units of that of the regression whose pairs it looks at.
        features: of the teacher.
        t_max: the end of the time range.
    """

    def __init__(self, config: AdversaryConfig, balance: float, features: Features, t_max: float) -> None:
        self.config = config
        self.balance = balance
        self.features = features
        self.t_max = t_max

    def draw(self, generator: torch.Generator, batch_size: int) -> AdversaryDraw:
        """Noise levels, stratified over the batch."""
        low, high = (level * self.t_max for level in self.config.levels)
        noise = torch.randn(batch_size, *self.features.teacher.spec.sample_shape, generator=generator)
        return AdversaryDraw(stratified(generator, batch_size, low, high), noise)

    def take(self, draw: AdversaryDraw, rows: slice, device: torch.device) -> AdversaryDraw:
        """The rows of a draw, with the noise on a device."""
        return AdversaryDraw(draw.tau[rows], draw.noise[rows].to(device))

    def loss(self, judge: nn.Module, pairs: Pairs, draw: AdversaryDraw, cond: Cond, *, listens: bool) -> Verdict:
        """Both losses; neither network gets a gradient from the other's.

        The judge is called once, on both halves of the pairs.

        Args:
            judge: logits (b, places) of each map of features.
            pairs: b of them.
            draw: from `draw`, for b pairs.
            cond: conditions of the b pairs.
            listens: whether the student needs a gradient.
        """
        b, tau, at = len(pairs.samples), draw.tau, self.features.teacher.spec.schedule(draw.tau)
        samples = pairs.samples.detach().requires_grad_(listens)
        with torch.no_grad():
            real = self.features(from_signal(pairs.points, draw.noise, at), tau, cond)
        fake = self.features(from_signal(samples, draw.noise, at), tau, cond)
        # New leaves: the judge's loss stops at the features, the student's goes on from there to its samples.
        seen = [each.detach().requires_grad_(listens) for each in fake]
        logits: Sequence[Tensor] = judge([torch.cat(both) for both in zip(real, seen, strict=True)])

        loss, persuasion = samples.new_zeros(()), samples.new_zeros(b)
        for each in logits:
            of_real, of_fake = each[:b].float(), each[b:].float()
            loss = loss + softplus(-of_real).mean() + softplus(of_fake).mean()
            persuasion = persuasion + softplus(-of_fake).mean(1)
        gradient = torch.zeros_like(samples)
        if listens:
            onto = torch.autograd.grad(persuasion.sum(), seen, retain_graph=True)
            (gradient,) = torch.autograd.grad(fake, samples, onto)
        along = (pairs.samples * gradient).flatten(1).sum(1).mean()  # has the gradient, as a direction for the student
        student = persuasion.mean().detach() + along - along.detach()
        return Verdict(student, loss, gradient.square().flatten(1).mean(1).sqrt() * gradient[0].numel())
