"""The parts of EDM's networks (Karras et al. 2022, arXiv 2206.00364, appendix F.1), named as in its checkpoints.

A U-Net of residual blocks that a noise embedding conditions. DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456) and
ADM (Dhariwal and Nichol 2021, arXiv 2105.05233) differ in the options of the same blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Way = Literal["down", "up"]
Resample = Literal["keep"] | Way


class PositionalEmbedding(nn.Module):
    """Cosines and sines of a noise label, at frequencies that fall geometrically from 1 to 1 / 10,000.

    Args:
        channels: width, even.
        endpoint: whether the last frequency is 1 / 10,000 itself (DDPM++) or would be the next one (ADM).
    """

    def __init__(self, channels: int, *, endpoint: bool = False) -> None:
        super().__init__()
        self.pairs = channels // 2
        self.last = self.pairs - endpoint

    def forward(self, labels: Tensor) -> Tensor:
        """(b,) -> (b, channels)."""
        ladder = torch.arange(self.pairs, dtype=torch.float32, device=labels.device) / self.last
        angles = labels[:, None] * (1 / 10_000) ** ladder
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Cosines and sines of a noise label at random frequencies, which the checkpoint keeps (NCSN++).

    Args:
        channels: width, even.
    """

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, labels: Tensor) -> Tensor:
        """(b,) -> (b, channels)."""
        angles = labels[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResampleConv2d(nn.Module):
    """A convolution that halves or doubles its image with a separable low-pass filter.

    Args:
        inputs, outputs: channels.
        kernel: side of the convolution, odd; 0: the image is resampled and nothing else.
        resample: which way.
        taps: of the filter in one dimension; it is normalised.
        fused: convolve first, and pad for both at once (NCSN++'s residual inputs, which go down).
    """

    resample_filter: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, inputs: int, outputs: int, kernel: int, resample: Way, taps: Sequence[float], *, fused: bool = False
    ) -> None:
        super().__init__()
        self.resample, self.fused, self.pad = resample, fused, kernel // 2
        if kernel:
            like = nn.Conv2d(inputs, outputs, kernel)
            self.weight, self.bias = nn.Parameter(like.weight), nn.Parameter(like.bias)  # type: ignore[arg-type]
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        line = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", torch.outer(line, line)[None, None] / line.sum() ** 2)
        self._is_box = len(taps) == 2 and taps[0] == taps[1]

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h / 2, w / 2) or (b, outputs, 2 h, 2 w)."""
        border = (self.resample_filter.shape[-1] - 1) // 2
        if self.weight is None:
            return self._resampled(x, border)
        weight = self.weight.to(x.dtype)
        if not self.fused:
            return F.conv2d(self._resampled(x, border), weight, self._bias(x), padding=self.pad)
        x = self._resampled(F.conv2d(x, weight, padding=self.pad + border), 0)
        bias = self._bias(x)
        return x if bias is None else x + bias[:, None, None]

    def _bias(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _resampled(self, x: Tensor, padding: int) -> Tensor:
        if self._is_box:  # (1, 1): the same, without a convolution of each channel, which is slow, most in bf16
            return F.interpolate(x, scale_factor=2) if self.resample == "up" else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        kernel = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.resample == "up":  # each pixel is spread: four times the weight keeps its brightness
            return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


def convolution(inputs: int, outputs: int, kernel: int, resample: Resample, taps: Sequence[float]) -> nn.Module:
    """A plain convolution where nothing is resampled."""
    if resample == "keep":
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return ResampleConv2d(inputs, outputs, kernel, resample, taps)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """32 groups, or as many as leave four channels to each."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


class UNetBlock(nn.Module):
    """Two convolutions beside a skip, conditioned on an embedding, and perhaps self-attention.

    Args:
        inputs, outputs: channels.
        embedding: width of the embedding.
        resample: whether the image is halved or doubled.
        heads: of the attention; 0: there is none.
        taps: of the resampling filter.
        adaptive_scale: the embedding scales and shifts (ADM), or only shifts before the norm (DDPM++, NCSN++).
        skip_scale: of the sum with the skip; sqrt(1/2) keeps its variance.
        project: whether a skip that is resampled is convolved too where its channels stay.
        eps: of the norms.
        dropout: probability, in training.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        resample: Resample = "keep",
        heads: int = 0,
        taps: Sequence[float] = (1, 1),
        adaptive_scale: bool = True,
        skip_scale: float = 1.0,
        project: bool = False,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.heads = inputs, heads
        self.adaptive_scale, self.skip_scale, self.dropout = adaptive_scale, skip_scale, dropout
        self.checkpoint: Callable[..., Any] | None = None
        self.norm0 = group_norm(inputs, eps)
        self.conv0 = convolution(inputs, outputs, 3, resample, taps)
        self.affine = nn.Linear(embedding, outputs * (2 if adaptive_scale else 1))
        self.norm1 = group_norm(outputs, eps)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip: nn.Module | None = None
        if inputs != outputs or resample != "keep":
            kernel = 1 if project or inputs != outputs else 0
            self.skip = convolution(inputs, outputs, kernel, resample, taps)
        if heads:
            self.norm2 = group_norm(outputs, eps)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (b, inputs, h, w), embedding (b, embedding) -> (b, outputs, h', w')."""
        if self.checkpoint is not None and torch.is_grad_enabled():
            drawn: Tensor = self.checkpoint(self._forward, x, embedding)
            return drawn
        return self._forward(x, embedding)

    def _forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        shift = self.affine(embedding)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = shift.chunk(2, dim=1)
            h = F.silu(shift + self.norm1(h) * (scale + 1))
        else:
            h = F.silu(self.norm1(h + shift))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (self._attention(x) + x) * self.skip_scale if self.heads else x

    def _attention(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        # Of each head, a channel's query, key and value lie side by side.
        qkv = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, height * width)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(3))
        attended = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(attended.transpose(-1, -2).reshape(b, c, height, width))
        return projected
