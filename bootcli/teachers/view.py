"""A teacher as a denoiser: adapter, conversion, guidance and clipping behind one call."""

from __future__ import annotations

import torch
from torch import Tensor

from bootcli.maths.guidance import guide
from bootcli.maths.prediction import to_x0
from bootcli.maths.schedule import Schedule
from bootcli.teachers.protocol import Cond, Teacher


class TeacherView:
    """What objectives and samplers see of a teacher: ``f(x_t, t, c)``, whatever the network predicts.

    Args:
        teacher: on its device, frozen.
        guidance_scale: w; 1 is no guidance.
        negative: the condition of the unconditional branch, one row; needed where w is not 1.
    """

    def __init__(self, teacher: Teacher, guidance_scale: float = 1.0, negative: Cond | None = None) -> None:
        if guidance_scale != 1.0 and negative is None:
            raise ValueError("guidance needs the condition of the unconditional branch")
        self.teacher = teacher
        self.guidance_scale = guidance_scale
        self.negative = negative

    @property
    def schedule(self) -> Schedule:
        """The forward process of the teacher."""
        return self.teacher.spec.schedule

    @torch.no_grad()
    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """f(x_t, t, c): the teacher's x_0, guided and clipped. Shapes (b, ...), t (b,) float64 CPU; float32 out."""
        spec, teacher = self.teacher.spec, self.teacher
        if self.guidance_scale == 1.0 or self.negative is None:
            prediction = teacher.predict(teacher.net, x_t, t, cond)
        else:
            negative = self.negative.rows(torch.zeros(len(x_t), dtype=torch.long))
            both = teacher.predict(teacher.net, torch.cat([x_t, x_t]), torch.cat([t, t]), cond.then(negative))
            conditional, unconditional = both.chunk(2)
            prediction = guide(conditional, unconditional, self.guidance_scale)
        return spec.threshold(to_x0(spec.prediction, prediction, x_t.float(), spec.schedule(t)))
