"""DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456) as EDM trains them (Karras et al. 2022, appendix F.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bootcli_edm.layers import FourierEmbedding, PositionalEmbedding, Resample, ResampleConv2d, UNetBlock, group_norm


class SongUNet(nn.Module):
    """The network of EDM's CIFAR-10, FFHQ and AFHQ checkpoints.

    Args:
        img_resolution: side of the image in pixels.
        in_channels, out_channels: of the image.
        label_dim: classes; 0: there are none.
        augment_dim: width of the augmentation label, which is held at zero; 0: there is none.
        model_channels: channels at full resolution.
        channel_mult: channels at each resolution, in multiples of that.
        channel_mult_emb: width of the embedding, likewise.
        num_blocks: residual blocks at each resolution on the way down.
        attn_resolutions: where there is self-attention.
        dropout: probability, in training.
        embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
        channel_mult_noise: width of the noise embedding, in multiples of ``model_channels``.
        encoder_type, decoder_type: beside the blocks, the image goes down ("skip", "residual") and up ("skip") by
            itself.
        resample_filter: taps in one dimension: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int,
        *,
        augment_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        channel_mult_emb: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        embedding_type: Literal["positional", "fourier"],
        channel_mult_noise: int,
        encoder_type: Literal["standard", "skip", "residual"],
        decoder_type: Literal["standard", "skip"],
        resample_filter: Sequence[float],
    ) -> None:
        super().__init__()
        width = model_channels * channel_mult_emb
        noise = model_channels * channel_mult_noise
        fourier = embedding_type == "fourier"
        self.map_noise = FourierEmbedding(noise) if fourier else PositionalEmbedding(noise, endpoint=True)
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise, width)
        self.map_layer1 = nn.Linear(width, width)

        taps = resample_filter

        def block(inputs: int, outputs: int, resample: Resample = "keep", heads: int = 0) -> UNetBlock:
            return UNetBlock(
                inputs, outputs, width, resample=resample, heads=heads, taps=taps, adaptive_scale=False,
                skip_scale=math.sqrt(0.5), project=True, eps=1e-6, dropout=dropout,
            )  # fmt: skip

        sides = [img_resolution >> level for level in range(len(channel_mult))]
        self.enc = nn.ModuleDict()
        channels, image = in_channels, in_channels
        skips: list[int] = []
        for level, (side, mult) in enumerate(zip(sides, channel_mult, strict=True)):
            at = f"{side}x{side}"
            if level == 0:
                self.enc[f"{at}_conv"] = nn.Conv2d(channels, model_channels, 3, padding=1)
                channels = model_channels
            else:
                self.enc[f"{at}_down"] = block(channels, channels, "down")
                if encoder_type == "skip":
                    self.enc[f"{at}_aux_down"] = ResampleConv2d(image, image, 0, "down", taps)
                    self.enc[f"{at}_aux_skip"] = nn.Conv2d(image, channels, 1)
                if encoder_type == "residual":
                    self.enc[f"{at}_aux_residual"] = ResampleConv2d(image, channels, 3, "down", taps, fused=True)
                    image = channels
            skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{at}_block{index}"] = block(
                    channels, model_channels * mult, heads=int(side in attn_resolutions)
                )
                channels = model_channels * mult
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (side, mult) in reversed([*enumerate(zip(sides, channel_mult, strict=True))]):
            at = f"{side}x{side}"
            if level == len(sides) - 1:
                self.dec[f"{at}_in0"] = block(channels, channels, heads=1)
                self.dec[f"{at}_in1"] = block(channels, channels)
            else:
                self.dec[f"{at}_up"] = block(channels, channels, "up")
            for index in range(num_blocks + 1):
                attends = index == num_blocks and side in attn_resolutions
                outputs = model_channels * mult
                self.dec[f"{at}_block{index}"] = block(channels + skips.pop(), outputs, heads=int(attends))
                channels = outputs
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(sides) - 1:
                    self.dec[f"{at}_aux_up"] = ResampleConv2d(out_channels, out_channels, 0, "up", taps)
                self.dec[f"{at}_aux_norm"] = group_norm(channels, 1e-6)
                self.dec[f"{at}_aux_conv"] = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor) -> Tensor:
        """x (b, in_channels, h, w), noise_labels (b,), class_labels (b, label_dim) -> (b, out_channels, h, w)."""
        embedding = self._embed(noise_labels, class_labels)
        x, skips = self._encode(x, embedding)
        return self._decode(x, skips, embedding)

    def _embed(self, noise_labels: Tensor, class_labels: Tensor) -> Tensor:
        noise = self.map_noise(noise_labels).to(self.map_layer0.weight.dtype)
        embedding = torch.cat(noise.chunk(2, dim=1)[::-1], dim=1)  # sines first
        if self.map_label is not None:
            embedding = embedding + self.map_label(class_labels.to(noise.dtype) * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None:  # zeros mean: not augmented; every parameter has a gradient, if one of zero
            embedding = embedding + self.map_augment(embedding.new_zeros(len(embedding), self.map_augment.in_features))
        embedding = F.silu(self.map_layer0(embedding))
        return F.silu(self.map_layer1(embedding))

    def _encode(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        image = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                image = layer(image)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(image)
            elif "aux_residual" in name:
                x = skips[-1] = image = (x + layer(image)) / math.sqrt(2)
            else:
                x = layer(x, embedding) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        image: Tensor | None = None
        normed = x
        for name, layer in self.dec.items():
            if "aux_up" in name:
                image = layer(image)
            elif "aux_norm" in name:
                normed = layer(x)
            elif "aux_conv" in name:
                drawn = layer(F.silu(normed))
                image = drawn if image is None else drawn + image
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, embedding)
        assert image is not None  # the last level always draws
        return image
