"""The corrector: it moves the student's samples to where the teacher finds them likelier than the critic does.

The direction of VSD and DMD (Wang et al. 2023, arXiv 2305.16213; Yin et al. 2024, arXiv 2311.18828) as the second half
of FreeFlow (Tong et al. 2025, arXiv 2511.19428). A prediction objective inherits its own errors along the path; this
one looks at the samples alone.

| code | paper | meaning |
|---|---|---|
| x | | the student's sample y(eps, t_min) |
| x_tau | | x noised to a level tau |
| f_g, f | mu_fake, mu_real | what the critic and the teacher take x_tau for |
| direction | | the student moves against it; of each sample, divided by ``mean |x - f|`` as DMD does |

There are two directions. ``score`` is ``f_g - f``, VSD's and DMD's: the gradient of a KL divergence. ``identity`` is
the gradient of ``(f - f_g) . ((f - x) - alpha (f - f_g))``, SiD's estimate of a Fisher divergence (Zhou et al. 2024,
arXiv 2404.04057, section 4). It goes back through both denoisers, which costs more, and disturbs the prediction less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bootcli.config import CorrectionConfig
from bootcli.deck import Pool
from bootcli.maths.broadcast import like
from bootcli.maths.prediction import PredictionType, from_x0, to_x0
from bootcli.maths.schedule import Coefficients
from bootcli.maths.signal_ode import from_signal
from bootcli.objectives.base import conditions, stratified
from bootcli.student import Student
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView

FIRST = 1e-2
"""Smallest noise level, as a share of t_max: below it both denoisers return their input."""
SIGMA_DATA = 0.5
"""Standard deviation of images in [-1, 1], as EDM has it."""


@dataclass(frozen=True)
class CorrectorDraw:
    """One batch of n samples at m noise levels each; the noise is on the CPU until `Corrector.take`.

    Args:
        eps: prior noise, (n, c, h, w).
        rows: conditions, (n,), int64.
        tau: noise levels as times of the teacher, (n, m), float64.
        noise: what the samples are noised with, (n, m, c, h, w).
    """

    eps: Tensor
    rows: Tensor
    tau: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Correction:
    """The value of the corrector on one batch.

    Args:
        student: scalar, with gradient for the student; not yet balanced.
        critic: scalar, with gradient for the critic: the usual training loss of its kind (`own_weight`).
        gap: mean square of ``f_g - f`` per sample, (n,), detached: 0 where the student draws as the teacher does.
        pull: as in `bootcli.objectives.base.Terms`, (n,).
    """

    student: Tensor
    critic: Tensor
    gap: Tensor
    pull: Tensor


class Corrector:
    """The correction objective.

    Args:
        config: noise levels, balance.
        teacher: the denoiser f, guided where the run is.
        t_min: target time of a sample.
        t_max: the highest noise level.
    """

    def __init__(self, config: CorrectionConfig, teacher: TeacherView, t_min: float, t_max: float) -> None:
        self.config = config
        self.teacher = teacher.within(config.guidance_interval)
        self.t_min = t_min
        self.t_max = t_max

    def draw(self, generator: torch.Generator, batch_size: int, pool: Pool) -> CorrectorDraw:
        """Noise levels stratified over the batch, crowded towards high noise for ``tau_power`` below 1."""
        m, shape = self.config.levels, self.teacher.teacher.spec.sample_shape
        eps = torch.randn(batch_size, *shape, generator=generator)
        low = FIRST * self.t_max
        tau = stratified(generator, batch_size * m, low, self.t_max, self.config.tau_power).reshape(batch_size, m)
        noise = torch.randn(batch_size, m, *shape, generator=generator)
        rows = conditions(generator, batch_size, pool, self.teacher.levels)
        return CorrectorDraw(eps, rows, tau, noise)

    def take(self, draw: CorrectorDraw, rows: slice, device: torch.device) -> CorrectorDraw:
        """The rows of a draw, with the noise on a device."""
        return CorrectorDraw(
            draw.eps[rows].to(device), draw.rows[rows], draw.tau[rows], draw.noise[rows].to(device)
        )  # fmt: skip

    def loss(
        self, student: Student, critic: nn.Module, draw: CorrectorDraw, cond: Cond, *, listens: bool
    ) -> Correction:
        """Both losses; neither network gets a gradient from the other's.

        The critic is called once: what it takes x_tau for is its own training loss and the student's direction.

        Args:
            student: y(eps, t, c), gradient at t_min.
            critic: g's raw prediction of (x_tau, tau, c).
            draw: from `draw`, n samples.
            cond: conditions of the n samples.
            listens: whether the student needs a gradient.
        """
        spec, (n, m) = self.teacher.teacher.spec, draw.tau.shape
        with torch.set_grad_enabled(listens):
            x = student(draw.eps, torch.full((n,), self.t_min, dtype=torch.float64), cond)
        # A new leaf: what goes back through the denoisers stops here, as a direction for the student.
        samples = x.detach().repeat_interleave(m, 0).requires_grad_(self.config.direction == "identity")
        tau, noise = draw.tau.flatten(), draw.noise.flatten(0, 1)
        at, each = spec.schedule(tau), cond.rows(torch.arange(n).repeat_interleave(m))
        x_tau = from_signal(samples, noise, at)

        prediction = critic(x_tau, tau, each).float()
        target = from_x0(spec.prediction, samples, x_tau, at).detach()
        error = (prediction - target).square().flatten(1).mean(1)
        critic_loss = (error * own_weight(spec.prediction, at).to(error)).mean()

        f = self.teacher.denoise(x_tau, tau, each)
        f_g = spec.threshold(to_x0(spec.prediction, prediction, x_tau, at))
        direction = self._direction(samples, f, f_g).reshape(n, m, *spec.sample_shape).mean(1)
        square = (x - (x.detach() - direction)).square().flatten(1).mean(1)
        gap = (f_g - f).detach().square().flatten(1).mean(1).reshape(n, m).mean(1)
        return Correction(square.mean(), critic_loss, gap, 2 * square.detach().sqrt())

    def _direction(self, samples: Tensor, f: Tensor, f_g: Tensor) -> Tensor:
        """What each sample moves against, (b, ...), without gradient; the arguments have one where it is needed."""
        scale = like((samples - f).detach().abs().flatten(1).mean(1) + 1e-4, f)
        if not samples.requires_grad:
            return (f_g - f).detach() / scale
        difference = f - f_g
        loss = difference * (f - samples - self.config.alpha * difference) / scale
        return torch.autograd.grad(loss.sum(), samples, retain_graph=True)[0]


def own_weight(kind: PredictionType, at: Coefficients) -> Tensor:
    """What square errors of a raw prediction weigh in the training of a denoiser, (b,), float64.

    Those of x_0 shrink with the noise, by which EDM divides them (Karras et al. 2022, arXiv 2206.00364, table 1:
    lambda, with sigma_data 1/2); all others count as they are.
    """
    if kind != "x0":
        return torch.ones_like(at.sigma)
    return (at.sigma**2 + at.alpha**2 * SIGMA_DATA**2) / (at.sigma * SIGMA_DATA) ** 2
