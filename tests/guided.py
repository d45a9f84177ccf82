"""A teacher whose guided paths are known, and whose students can take w."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bootcli.closed_form import GaussianMixtureTeacher
from bootcli.maths.broadcast import like
from bootcli.maths.prediction import PredictionType
from bootcli.maths.schedule import Schedule
from bootcli.teachers.protocol import Cond


class GuidedTeacher(GaussianMixtureTeacher):
    """N(m, s^2) for class 0 and N(0, s^2) without a class: guided by w, it is the exact teacher of N(w m, s^2).

    Both denoisers are ``a (x_t - alpha mean) + mean`` with the same a, which is linear in the mean.
    """

    def __init__(
        self, mean: Tensor, std: float, schedule: Schedule | None = None, prediction: PredictionType = "x0"
    ) -> None:
        means, stds = torch.stack([mean, torch.zeros_like(mean)]), torch.full((2,), std)
        super().__init__(means, stds, torch.ones(2), schedule, prediction, "class")

    def condition(self, requests: Sequence[int | str | None]) -> Cond:
        return super().condition([1 if request is None else request for request in requests])

    def add_guidance_input(self, net: nn.Module, guidance_range: tuple[float, float]) -> None:
        net.register_parameter("guidance", nn.Parameter(torch.zeros_like(net.get_parameter("means")[0])))

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        prediction = super().predict(net, x_t, t, cond)
        if cond.guidance is None or "guidance" not in dict(net.named_parameters()):
            return prediction
        return prediction + like(cond.guidance - 1, prediction) * net.get_parameter("guidance")
