"""ADM (Dhariwal and Nichol 2021, arXiv 2105.05233) as EDM trains it (Karras et al. 2022, appendix F.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bootcli_edm.layers import PositionalEmbedding, Resample, UNetBlock, group_norm

HEAD_CHANNELS = 64


class DhariwalUNet(nn.Module):
    """The network of EDM's ImageNet checkpoints.

    Args:
        img_resolution: side of the image in pixels.
        in_channels, out_channels: of the image.
        label_dim: classes; 0: there are none.
        augment_dim: width of the augmentation label, which is held at zero; 0: there is none.
        model_channels: channels at full resolution.
        channel_mult: channels at each resolution, in multiples of that.
        channel_mult_emb: width of the embedding, likewise.
        num_blocks: residual blocks at each resolution on the way down.
        attn_resolutions: where there is self-attention, with heads of 64 channels.
        dropout: probability, in training.
        adaptive_scale: whether the embedding scales too; False for consistency_models' LSUN networks.
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
        adaptive_scale: bool,
    ) -> None:
        super().__init__()
        width = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, width)
        self.map_layer1 = nn.Linear(width, width)
        self.map_label = nn.Linear(label_dim, width, bias=False) if label_dim else None

        def block(inputs: int, outputs: int, resample: Resample = "keep", *, attends: bool = False) -> UNetBlock:
            heads = outputs // HEAD_CHANNELS if attends else 0
            return UNetBlock(
                inputs, outputs, width, resample=resample, heads=heads, adaptive_scale=adaptive_scale, dropout=dropout
            )  # fmt: skip

        sides = [img_resolution >> level for level in range(len(channel_mult))]
        self.enc = nn.ModuleDict()
        channels = model_channels * channel_mult[0]
        skips: list[int] = []
        for level, (side, mult) in enumerate(zip(sides, channel_mult, strict=True)):
            at, outputs = f"{side}x{side}", model_channels * mult
            if level == 0:
                self.enc[f"{at}_conv"] = nn.Conv2d(in_channels, channels, 3, padding=1)
            else:
                self.enc[f"{at}_down"] = block(channels, channels, "down")
            skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{at}_block{index}"] = block(channels, outputs, attends=side in attn_resolutions)
                channels = outputs
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (side, mult) in reversed([*enumerate(zip(sides, channel_mult, strict=True))]):
            at, outputs = f"{side}x{side}", model_channels * mult
            if level == len(sides) - 1:
                self.dec[f"{at}_in0"] = block(channels, channels, attends=True)
                self.dec[f"{at}_in1"] = block(channels, channels)
            else:
                self.dec[f"{at}_up"] = block(channels, channels, "up")
            for index in range(num_blocks + 1):
                inputs = channels + skips.pop()
                self.dec[f"{at}_block{index}"] = block(inputs, outputs, attends=side in attn_resolutions)
                channels = outputs
        self.out_norm = group_norm(channels, 1e-5)
        self.out_conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor) -> Tensor:
        """x (b, in_channels, h, w), noise_labels (b,), class_labels (b, label_dim) -> (b, out_channels, h, w)."""
        embedding = self._embed(noise_labels, class_labels)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, embedding) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, embedding)
        drawn: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return drawn

    def _embed(self, noise_labels: Tensor, class_labels: Tensor) -> Tensor:
        embedding = self.map_noise(noise_labels).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None:  # zeros mean: not augmented; every parameter has a gradient, if one of zero
            embedding = embedding + self.map_augment(embedding.new_zeros(len(embedding), self.map_augment.in_features))
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None:
            embedding = embedding + self.map_label(class_labels.to(embedding.dtype))
        return F.silu(embedding)
