"""The student that training should reach, for a Gaussian teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bootcli.closed_form import GaussianTeacher
from bootcli.maths.schedule import CosineVP, LinearPath, VarianceExploding, vp_table
from bootcli.teachers.protocol import Cond

DDPM = vp_table(torch.linspace(1e-4, 0.02, 1000))
SCHEDULES = [LinearPath(), CosineVP(), DDPM, VarianceExploding()]
MEAN = torch.tensor([[[0.5, -0.3], [0.0, 0.8]]])


class Exact(nn.Module):
    """The signal of the exact paths, shifted by a constant."""

    def __init__(self, teacher: GaussianTeacher, t_max: float, shift: float = 0.0) -> None:
        super().__init__()
        self.teacher, self.t_max = teacher, t_max
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.teacher.exact_signal(eps, t, self.t_max).float() + self.shift


def noise(n: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
