"""What low-rank adapters adapt of a UNet of diffusers."""

from __future__ import annotations

from torch import nn

_ADAPTED = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
)


def targets_of(net: nn.Module) -> tuple[str, ...]:
    """What a LoRA adapts of a UNet of diffusers: attention, feed-forward layers and convolutions, as LCM-LoRA does
    (Luo et al. 2023, arXiv 2311.05556); the first and the last layer speak the teacher's language."""
    names = [name for name, _ in net.named_modules()]
    return tuple(target for target in _ADAPTED if any(name.endswith(f".{target}") for name in names))
