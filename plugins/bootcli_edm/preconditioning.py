"""From a network's output to its denoiser ``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)`` (Karras et al. 2022,
arXiv 2206.00364, table 1).

| code | paper | meaning |
|---|---|---|
| sigma | sigma | noise level; x = x_0 + sigma eps |
| c_skip, c_out, c_in, c_noise | the same | scalings, each of the shape of sigma |
| F | F_theta | the network |

All is computed in float32, as the networks were trained: at small sigma the roundings of VP's c_noise are its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Scalings(NamedTuple):
    """Of some noise levels, each of the shape of sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioning(ABC):
    """One column of EDM's table 1."""

    predicts_noise = True
    """Whether the network's output is the noise of x, but for its sign; else it is mixed with x by the level."""

    @property
    @abstractmethod
    def levels(self) -> tuple[float, float]:
        """The least and the greatest sigma that the network knows."""

    @abstractmethod
    def scalings(self, sigma: Tensor, table: Tensor) -> Scalings:
        """At noise levels (b,), float32.

        Args:
            sigma: above 0.
            table: of the levels the network was trained on, as the checkpoint keeps it; see `table`.
        """

    def table(self) -> Tensor:
        """The levels that the network was trained on, falling, where they are a list; else empty."""
        return torch.empty(0)


@dataclass(frozen=True)
class EDM(Preconditioning):
    """Input and target of unit variance at every level.

    Args:
        sigma_data: standard deviation of the data.
        noise_scale: c_noise is this times log(sigma): 1/4, and 250 in consistency_models.
    """

    sigma_min: float = 0.0
    sigma_max: float = math.inf
    sigma_data: float = 0.5
    noise_scale: float = 0.25
    predicts_noise = False

    @property
    def levels(self) -> tuple[float, float]:
        """As given."""
        return self.sigma_min, self.sigma_max

    def scalings(self, sigma: Tensor, table: Tensor) -> Scalings:
        """See `Preconditioning`."""
        data = self.sigma_data
        total = sigma**2 + data**2
        return Scalings(data**2 / total, sigma * data / total.sqrt(), 1 / total.sqrt(), sigma.log() * self.noise_scale)


@dataclass(frozen=True)
class VP(Preconditioning):
    """The continuous variance preserving process of Song et al. 2021, read in sigma.

    Args:
        beta_d, beta_min: extent and least value of its noise rate.
        timesteps: M, of the network.
        epsilon_t: its shortest time.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    timesteps: float = 1000
    epsilon_t: float = 1e-5

    @property
    def levels(self) -> tuple[float, float]:
        """At ``epsilon_t`` and at t = 1."""
        return self._sigma(self.epsilon_t), self._sigma(1.0)

    def _sigma(self, t: float) -> float:
        return math.sqrt(math.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))

    def scalings(self, sigma: Tensor, table: Tensor) -> Scalings:
        """See `Preconditioning`."""
        t = ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d
        return Scalings(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), (self.timesteps - 1) * t)


@dataclass(frozen=True)
class VE(Preconditioning):
    """The variance exploding process of Song et al. 2021."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    @property
    def levels(self) -> tuple[float, float]:
        """As given."""
        return self.sigma_min, self.sigma_max

    def scalings(self, sigma: Tensor, table: Tensor) -> Scalings:
        """See `Preconditioning`."""
        one = torch.ones_like(sigma)
        return Scalings(one, sigma, one, (0.5 * sigma).log())


@dataclass(frozen=True)
class IDDPM(Preconditioning):
    """The cosine table of Nichol and Dhariwal 2021 (arXiv 2102.09672), read in sigma; the network knows its entries.

    Args:
        C_1, C_2: least step and offset of the table.
        timesteps: M, entries of the table.

    EDM's own sampler rounds its levels to the table; here they stay, and the network is told the nearest entry.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    timesteps: int = 1000

    def table(self) -> Tensor:
        """u_0 > ... > u_M = 0, float32 (M + 1,)."""
        alpha_bar = [
            math.sin(0.5 * math.pi * j / self.timesteps / (self.C_2 + 1)) ** 2 for j in range(self.timesteps + 1)
        ]
        u = [0.0]
        for j in range(self.timesteps, 0, -1):
            u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], self.C_1) - 1))
        return torch.tensor(u[::-1])

    @property
    def levels(self) -> tuple[float, float]:
        """The last entry above 0, and the first."""
        table = self.table()
        return float(table[-2]), float(table[0])

    def scalings(self, sigma: Tensor, table: Tensor) -> Scalings:
        """See `Preconditioning`; c_noise is that of the nearest entry."""
        nearest = (sigma[:, None] - table).abs().argmin(1)
        c_noise = (self.timesteps - 1 - nearest).float()
        return Scalings(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise)


class Preconditioned(nn.Module):
    """A network as a denoiser; its ``model`` is what the checkpoint calls so.

    Args:
        model: (x, noise labels, class labels) -> output.
        preconditioning: its scalings.
        channels: of the image; what the network gives beyond them (iDDPM's variance) is cut off.
        label_dim: classes; no labels are rows of zeros.
    """

    u: Tensor

    def __init__(self, model: nn.Module, preconditioning: Preconditioning, channels: int, label_dim: int = 0) -> None:
        super().__init__()
        self.model = model
        self.preconditioning = preconditioning
        self.channels, self.label_dim = channels, label_dim
        table = preconditioning.table()
        self.register_buffer("u", table, persistent=table.numel() > 0)

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, as_noise: bool = False
    ) -> Tensor:
        """D(x; sigma), or the noise in x, float32.

        Args:
            x: (b, c, h, w).
            sigma: noise levels, (b,).
            class_labels: (b, label_dim); None: no labels.
            as_noise: for a network that predicts noise: eps in ``x = x_0 + sigma eps``, which is its output, or for VE
                the negative. Taken from D it would be a small difference of large numbers.
        """
        if class_labels is None:
            class_labels = x.new_zeros(len(x), self.label_dim)
        levels = self.preconditioning.scalings(sigma, self.u)
        c_skip, c_out, c_in = (_wide(each) for each in (levels.c_skip, levels.c_out, levels.c_in))
        inputs = (c_in * x).to(next(self.parameters()).dtype)
        drawn = self.model(inputs, levels.c_noise, class_labels)[:, : self.channels].float()
        denoised: Tensor = c_skip * x + c_out * drawn
        return -(c_out / _wide(sigma)) * drawn if as_noise else denoised


def _wide(scaling: Tensor) -> Tensor:
    """(b,) -> (b, 1, 1, 1)."""
    return scaling[:, None, None, None]
