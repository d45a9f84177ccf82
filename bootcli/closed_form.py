"""Teachers whose denoiser is known exactly, so that objectives and samplers can be tested without training anything.

| code | meaning |
|---|---|
| means, stds, weights | component k of the data: N(means_k, stds_k^2 I) with probability weights_k; std 0 is a point |
| var_k | alpha^2 * stds_k^2 + sigma^2, the variance of x_t within component k |

The denoiser is the posterior mean of that mixture (for example Karras et al. 2022, arXiv 2206.00364, appendix B.3):
``f = sum_k p(k | x_t) * (means_k + alpha * stds_k^2 / var_k * (x_t - alpha * means_k))``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bootcli.errors import UsageError
from bootcli.maths.broadcast import like
from bootcli.maths.prediction import PredictionType, from_x0
from bootcli.maths.schedule import Coefficients, CosineVP, DiscreteVP, LinearPath, Schedule, VarianceExploding
from bootcli.teachers.protocol import Cond, Teacher, TeacherSpec

_SCHEDULES = {schedule.__name__: schedule for schedule in (LinearPath, CosineVP, DiscreteVP, VarianceExploding)}


class MixtureNet(nn.Module):
    """The exact denoiser as a network that can be trained: its first and last layers start as the identity.

    The time embedding is the pair (alpha, sigma). Shifting it makes the network the denoiser of another time, which is
    all that a one-step student of a Gaussian needs.
    """

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor, prediction: PredictionType) -> None:
        super().__init__()
        channels = means.shape[1]
        self.prediction: PredictionType = prediction
        self.means = nn.Parameter(means.clone())
        self.stds = nn.Parameter(stds.to(means))
        self.log_weights = nn.Parameter(weights.to(means).log())
        self.embedding = nn.Linear(2, 2, dtype=means.dtype)
        nn.init.eye_(self.embedding.weight)
        self.output = nn.Conv2d(channels, channels, 1, dtype=means.dtype)
        nn.init.dirac_(self.output.weight)
        for layer in (self.embedding, self.output):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def posterior_mean(self, x_t: Tensor, coefficients: Tensor, label: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t].

        Args:
            x_t: shape (b, c, h, w).
            coefficients: alpha and sigma, shape (b, 2).
            label: the component that x_0 is known to come from, shape (b,); -1 or no tensor where it is not known.

        Returns:
            Shape (b, c, h, w).
        """
        alpha, sigma = coefficients[:, :1], coefficients[:, 1:]
        var = alpha**2 * self.stds**2 + sigma**2  # (b, k)
        away = x_t[:, None] - alpha[..., None, None, None] * self.means  # (b, k, c, h, w)
        squared = away.square().flatten(2).sum(2)
        logits = self.log_weights - squared / (2 * var) - var.log() * (away[0, 0].numel() / 2)
        if label is not None:
            known = (label[:, None] >= 0) & (label[:, None] != torch.arange(len(self.means), device=label.device))
            logits = logits.masked_fill(known, -torch.inf)
        shrink = alpha * self.stds**2 / var
        means = self.means + shrink[..., None, None, None] * away
        return (logits.softmax(1)[..., None, None, None] * means).sum(1)

    def forward(self, x_t: Tensor, coefficients: Tensor, label: Tensor | None = None) -> Tensor:
        """The raw prediction; arguments as in `posterior_mean`. Needs sigma > 0."""
        coefficients = self.embedding(coefficients)
        x_0 = self.posterior_mean(x_t, coefficients, label)
        raw: Tensor = self.output(from_x0(self.prediction, x_0, x_t, Coefficients(*coefficients.unbind(1))))
        return raw


class GaussianMixtureTeacher(Teacher):
    """The exact denoiser of a mixture of isotropic Gaussians.

    Args:
        means: shape (k, c, h, w); its dtype is the network's.
        stds: shape (k,), 0 for a point.
        weights: shape (k,), positive; scaled to sum to 1.
        schedule: any; ``prediction="eps"`` needs alpha > 0 at t = 1.
        prediction: what the network predicts.
        conditioning: "class" makes the component the label.
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor,
        weights: Tensor,
        schedule: Schedule | None = None,
        prediction: PredictionType = "x0",
        conditioning: Literal["none", "class"] = "none",
    ) -> None:
        channels, height, width = means.shape[1:]
        self.spec = TeacherSpec(
            sample_shape=(channels, height, width),
            prediction=prediction,
            schedule=schedule or CosineVP(),
            conditioning=conditioning,
            num_classes=len(means) if conditioning == "class" else 0,
        )
        self.net = MixtureNet(means, stds, weights / weights.sum(), prediction).eval()

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The raw prediction, in the network's dtype; see `Teacher.predict`."""
        x_t = x_t.to(next(net.parameters()).dtype)
        coefficients = torch.stack(self.spec.schedule(t), dim=1).to(x_t)
        prediction: Tensor = net(x_t, coefficients, cond.tensors.get("label"))
        return prediction

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """f(x_t, t) without a way through the prediction type: x_t (b, c, h, w), t (b,); defined at sigma = 0 as well
        unless a component is a point."""
        net = self.net
        assert isinstance(net, MixtureNet)
        with torch.no_grad():
            return net.posterior_mean(x_t, torch.stack(self.spec.schedule(t), dim=1).to(x_t))

    def condition(self, requests: Sequence[int | str | None]) -> Cond:
        """One component per sample, None for the whole mixture; see `Teacher.condition`."""
        if self.spec.conditioning == "none":
            return super().condition(requests)
        classes = range(self.spec.num_classes)
        for request in requests:
            if request is not None and request not in classes:
                raise UsageError(f"{request!r} is not a class of this teacher.", f"Use 0 to {classes[-1]}.")
        return Cond({"label": torch.tensor([-1 if request is None else int(request) for request in requests])})

    def embedding_site(self, net: nn.Module) -> tuple[nn.Module, int]:
        """Where (alpha, sigma) enters."""
        return net.get_submodule("embedding"), 2

    def output_layer(self, net: nn.Module) -> nn.Module:
        """A 1x1 convolution, the identity in the teacher."""
        return net.get_submodule("output")

    def config(self) -> dict[str, object]:
        """What `build` needs."""
        schedule = self.spec.schedule
        assert dataclasses.is_dataclass(schedule)
        return {
            "components": len(self.net.get_parameter("stds")),
            "sample_shape": list(self.spec.sample_shape),
            "schedule": {"name": type(schedule).__name__, **dataclasses.asdict(schedule)},
            "prediction": self.spec.prediction,
            "conditioning": self.spec.conditioning,
        }


class GaussianTeacher(GaussianMixtureTeacher):
    """The exact denoiser of one isotropic Gaussian, whose probability-flow paths are known too.

    Args:
        mean: shape (c, h, w).
        std: s, the same in every pixel; 0 makes the data one point.
        schedule: as in `GaussianMixtureTeacher`.
        prediction: as in `GaussianMixtureTeacher`.
    """

    def __init__(
        self, mean: Tensor, std: float, schedule: Schedule | None = None, prediction: PredictionType = "x0"
    ) -> None:
        super().__init__(mean[None], torch.tensor([std], dtype=torch.float64), torch.ones(1), schedule, prediction)
        self.mean, self.std = mean.double(), std

    def exact_signal(self, eps: Tensor, t: Tensor, t_start: float = 1.0) -> Tensor:
        """The solution y_t of the Signal-ODE that starts at T = ``t_start`` with y_T = f(sigma_T * eps, T).

        With u = x / alpha the probability flow is ``du / drho = (u - f) / rho``, and here
        ``f = m + s^2 / (s^2 + rho^2) * (u - m)``, so u - m grows as sqrt(s^2 + rho^2). That is x_t = alpha_t m + S_t z,
        with S = sqrt(alpha^2 s^2 + sigma^2) and z = (alpha_T (y_T - m) + sigma_T eps) / S_T the same along a path.
        Then y_t = (x_t - sigma_t eps) / alpha_t; with S_t - sigma_t = alpha_t^2 s^2 / (S_t + sigma_t) in it, nothing
        is divided by a small alpha.

        Args:
            eps: shape (b, c, h, w).
            t: shape (b,), at most ``t_start``.
            t_start: T, where x_T is taken to be pure noise.

        Returns:
            Shape (b, c, h, w), float64.
        """
        eps, s2 = eps.double(), self.std**2
        at_t, at_start = self.spec.schedule(t), self.spec.schedule(torch.full_like(t, t_start))
        alpha, sigma = (like(v, eps) for v in at_t)
        alpha_start, sigma_start = (like(v, eps) for v in at_start)
        scale, scale_start = ((a**2 * s2 + b**2).sqrt() for a, b in ((alpha, sigma), (alpha_start, sigma_start)))

        start = alpha_start * s2 / scale_start**2 * (sigma_start * eps - alpha_start * self.mean)  # y_T - m
        z = (alpha_start * start + sigma_start * eps) / scale_start
        z_less_eps = (start - alpha_start * s2 / (scale_start + sigma_start) * eps) / scale_start  # over alpha_T
        ratio = torch.where(alpha > 0, alpha_start / alpha, 1.0)
        widest = (scale + sigma).clamp(min=1e-300)  # 0 for a point at t = 0
        return self.mean + alpha * s2 / widest * z + sigma * ratio * z_less_eps


def build(config: Mapping[str, Any]) -> GaussianMixtureTeacher:
    """A teacher from `GaussianMixtureTeacher.config` with untrained numbers: standard normal components."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config["schedule"].items()
    }
    schedule: type[Any] = _SCHEDULES[fields.pop("name")]
    components = config["components"]
    return GaussianMixtureTeacher(
        torch.zeros(components, *config["sample_shape"]),
        torch.ones(components),
        torch.ones(components),
        schedule=schedule(**fields),
        prediction=config["prediction"],
        conditioning=config["conditioning"],
    )
