"""A teacher as a denoiser: adapter, conversion, guidance and clipping behind one call."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from bootcli.maths.broadcast import like
from bootcli.maths.guidance import guide
from bootcli.maths.prediction import to_x0
from bootcli.maths.schedule import Schedule
from bootcli.maths.signal_ode import to_signal
from bootcli.teachers.protocol import Cond, Teacher

PathStart = Literal["estimate", "noise"]


class TeacherView:
    """What objectives and samplers see of a teacher: ``f(x_t, t, c)``, whatever the network predicts.

    Args:
        teacher: on its device, frozen.
        guidance_scale: w; 1 is no guidance.
        negative: the condition of the unconditional branch, one row; needed where w is not 1.
        interval: levels ``sigma / (alpha + sigma)`` at which it is guided (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        rescale: see `bootcli.maths.guidance.guide`.
        one_batch: both branches in one call of the network, or one after the other.
        path_start: see `start_of_path`.
        levels: of w, that numbers of conditions carry (`bootcli.teachers.guided_pool`); 1: none, w is the same for all.

    A condition that says w is guided by that instead, where there is guidance.
    """

    def __init__(
        self,
        teacher: Teacher,
        guidance_scale: float = 1.0,
        negative: Cond | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        *,
        rescale: float = 0.0,
        one_batch: bool = True,
        path_start: PathStart = "estimate",
        levels: int = 1,
    ) -> None:
        if guidance_scale != 1.0 and negative is None:
            raise ValueError("guidance needs the condition of the unconditional branch")
        self.teacher = teacher
        self.guidance_scale = guidance_scale
        self.negative = negative
        self.interval = interval
        self.rescale = rescale
        self.one_batch = one_batch
        self.path_start = path_start
        self.levels = levels

    def within(self, interval: tuple[float, float]) -> TeacherView:
        """The same teacher, guided only at those of its noise levels that are in ``interval`` too."""
        view = copy.copy(self)
        view.interval = max(self.interval[0], interval[0]), min(self.interval[1], interval[1])
        return view

    @property
    def schedule(self) -> Schedule:
        """The forward process of the teacher."""
        return self.teacher.spec.schedule

    @torch.no_grad()
    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """f(x_t, t, c): the teacher's x_0, guided and clipped. Shapes (b, ...), t (b,) float64 CPU; float32 out."""
        return self.denoise(x_t, t, cond)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """`x0`, with a gradient for x_t where that asks for one."""
        spec, teacher = self.teacher.spec, self.teacher
        if not (inside := self.is_guided(t)).any():
            prediction = teacher.predict(teacher.net, x_t, t, cond)
        else:
            negative = cond.negative
            if negative is None:
                assert self.negative is not None, "guided"
                negative = self.negative.rows(torch.zeros(len(x_t), dtype=torch.long))
            conditional, unconditional = self._branches(x_t, t, cond, negative)
            scale = self.guidance_scale if cond.guidance is None else cond.guidance
            guided = guide(conditional, unconditional, scale, self.rescale)
            prediction = torch.where(like(inside, guided) > 0, guided, conditional)
        return spec.threshold(to_x0(spec.prediction, prediction, x_t.float(), spec.schedule(t)))

    def start_of_path(self, eps: Tensor, cond: Cond, t_max: float) -> Tensor:
        """y(eps, t_max), where every path begins; shape of ``eps``.

        ``estimate`` is BOOT's boundary, f(sigma * eps, t_max) (Gu et al. 2023, section 3.2): right for a path of all
        times that is cut at t_max. ``noise`` is the y of x = prior_scale * eps, as samplers begin. Where
        alpha is 0 both begin the same path; where a schedule keeps some signal at t = 1, as Stable Diffusion's does,
        they differ.
        """
        t = torch.full((len(eps),), t_max, dtype=torch.float64)
        at = self.schedule(t)
        if self.path_start == "noise" and float(at.alpha[0]) > 0:
            return to_signal(self.schedule.prior_scale * eps, eps, at)
        return self.x0(like(at.sigma, eps) * eps, t, cond)

    def _branches(self, x_t: Tensor, t: Tensor, cond: Cond, negative: Cond) -> tuple[Tensor, Tensor]:
        """The raw predictions with and without the condition, each (b, ...)."""
        predict, net = self.teacher.predict, self.teacher.net
        if not self.one_batch:
            return predict(net, x_t, t, cond), predict(net, x_t, t, negative)
        both = predict(net, torch.cat([x_t, x_t]), torch.cat([t, t]), cond.then(negative))
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    def is_guided(self, t: Tensor) -> Tensor:
        """Whether there is guidance at the times t, which costs a second prediction; (b,), bool on the CPU."""
        if self.negative is None:
            return torch.zeros_like(t, dtype=torch.bool)
        alpha, sigma = self.schedule(t)
        level = sigma / (alpha + sigma)
        low, high = self.interval
        return (level >= low) & (level <= high)
