"""The teachers of Consistency Models (Song et al. 2023, arXiv 2303.01469): ``edm_imagenet64_ema.pt`` and its like.

They are EDM denoisers around guided-diffusion's ADM, which computes what `DhariwalUNet` does under other names. The
files hold tensors alone; the architecture shows in their names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bootcli.plugin import read_archive
from bootcli_edm.dhariwal_unet import HEAD_CHANNELS
from bootcli_edm.persistence import Stored
from bootcli_edm.refusal import Refused, shown

_SIDES = {4: 64, 5: 128, 6: 256}
"""guided-diffusion's resolutions, by their number of levels."""
_NARROWEST = 128
"""Channels from which both make 32 groups of them."""
_IN_BLOCK = {
    "in_layers.0": "norm0",
    "in_layers.2": "conv0",
    "emb_layers.1": "affine",
    "out_layers.0": "norm1",
    "out_layers.3": "conv1",
    "skip_connection": "skip",
}
_IN_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}
_AROUND = {"time_embed.0": "map_layer0", "time_embed.2": "map_layer1", "out.0": "out_norm", "out.2": "out_conv"}


def read(path: Path) -> Stored:
    """The network in such a file, under EDM's names. Raises `Refused` or `BootError` for a broken one."""
    try:
        return _renamed(read_archive(path))
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise Refused(
            f"it is not laid out as guided-diffusion's network ({type(error).__name__}: {shown(error)})"
        ) from None


def _renamed(tensors: Mapping[str, Tensor]) -> Stored:
    for name, tensor in tensors.items():  # before any is copied
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is more numbers than it holds")
    ups = [
        name
        for name in tensors
        if name.startswith("output_blocks.") and _place(name) > 0 and "in_layers.0.weight" in name
    ]
    levels = len(ups) + 1
    side = _SIDES[levels]
    num_blocks = len({name.split(".")[1] for name in tensors if name.startswith("input_blocks.")}) // levels - 1
    homes = _homes(side, levels, num_blocks)
    moved = dict(_moved(name, tensor, homes) for name, tensor in tensors.items())
    for level in range(1, levels):
        for home in (f"enc.{side >> level}x{side >> level}_down", f"dec.{side >> level - 1}x{side >> level - 1}_up"):
            for layer in ("conv0", "skip"):
                moved[f"model.{home}.{layer}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    width = len(tensors["input_blocks.0.0.weight"])
    if width < _NARROWEST:
        raise ValueError(f"{width} channels, whose norms guided-diffusion groups otherwise")
    sides = [side >> level for level in range(levels)]
    labels = tensors.get("label_emb.weight")
    shift = moved[f"model.enc.{side}x{side}_block0.affine.bias"]
    arguments: dict[str, object] = {
        "img_resolution": side,
        "img_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "label_dim": 0 if labels is None else len(labels),
        "model_type": "DhariwalUNet",
        "noise_scale": 250.0,
        "model_channels": width,
        "channel_mult": [len(moved[f"model.enc.{n}x{n}_block0.conv1.bias"]) // width for n in sides],
        "num_blocks": num_blocks,
        "attn_resolutions": [n for n in sides if f"model.enc.{n}x{n}_block0.qkv.weight" in moved],
        "adaptive_scale": len(shift) != len(moved[f"model.enc.{side}x{side}_block0.conv1.bias"]),
    }
    return Stored("EDMPrecond", (), arguments, moved)


def _place(name: str) -> int:
    """Of a layer in its block: 0 is the residual block, 1 the attention or what resamples, 2 what resamples."""
    return int(name.split(".")[2])


def _homes(side: int, levels: int, num_blocks: int) -> dict[str, str]:
    """Where EDM has the residual blocks of guided-diffusion, by their prefixes."""
    down: list[str] = []
    up: list[list[str]] = []
    for level in range(levels):
        at = f"{side >> level}x{side >> level}"
        down += [
            f"enc.{at}_conv" if level == 0 else f"enc.{at}_down",
            *(f"enc.{at}_block{i}" for i in range(num_blocks)),
        ]
    for level in reversed(range(levels)):
        at = f"{side >> level}x{side >> level}"
        up += [[f"dec.{at}_block{i}"] for i in range(num_blocks + 1)]
        if level:
            up[-1].append(f"dec.{side >> level - 1}x{side >> level - 1}_up")
    lowest = f"dec.{side >> levels - 1}x{side >> levels - 1}"
    homes = {f"input_blocks.{i}": home for i, home in enumerate(down)}
    homes |= {f"output_blocks.{i}": home for i, (home, *_) in enumerate(up)}
    homes |= {f"output_blocks.{i}.up": each[1] for i, each in enumerate(up) if len(each) > 1}
    return homes | {
        "middle_block.0": f"{lowest}_in0",
        "middle_block.1": f"{lowest}_in0",
        "middle_block.2": f"{lowest}_in1",
    }


def _moved(name: str, tensor: Tensor, homes: Mapping[str, str]) -> tuple[str, Tensor]:
    """One tensor under EDM's name, and in EDM's order."""
    layer, _, kind = name.rpartition(".")
    if layer in _AROUND:
        return f"model.{_AROUND[layer]}.{kind}", tensor
    if layer == "label_emb":
        return "model.map_label.weight", tensor.T
    stage, index, *inner = layer.split(".")
    if stage == "middle_block":
        home, part = homes[f"{stage}.{index}"], ".".join(inner)
    else:
        home, part = homes[f"{stage}.{index}"], ".".join(inner[1:])
        if part in _IN_BLOCK and inner[0] != "0":  # a second residual block: the one that doubles the image
            home = homes[f"{stage}.{index}.up"]
    if not part:
        return f"model.{home}.{kind}", tensor  # the first convolution
    if part in _IN_BLOCK:
        return f"model.{home}.{_IN_BLOCK[part]}.{kind}", tensor
    target = f"model.{home}.{_IN_ATTENTION[part]}.{kind}"
    if part == "qkv":
        # There all queries come first, then keys, then values; here a channel's three lie side by side.
        heads = len(tensor) // 3 // HEAD_CHANNELS
        tensor = tensor.reshape(3, heads, HEAD_CHANNELS, -1).permute(1, 2, 0, 3).reshape(tensor.shape)
    return target, tensor[..., None] if tensor.ndim == 3 else tensor
