"""What the original code of ADM and Stable Diffusion calls the layers of diffusers' networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate

from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_parts(weights: Iterable[str]) -> dict[str, str]:
    """Where the original code has the parts of a `UNet2DConditionModel` with these weights: theirs by ours."""
    found = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    names = {part for name in weights for part in accumulate(name.split("."), "{}.{}".format)}
    for way, blocks, first, resampled in (("down", "input_blocks", 1, "op"), ("up", "output_blocks", 0, "conv")):
        place = first
        for block in range(sum(name.startswith(f"{way}_blocks.") and name.count(".") == 1 for name in names)):
            ours = f"{way}_blocks.{block}"
            layers = sum(name.startswith(f"{ours}.resnets.") and name.count(".") == 3 for name in names)
            attends = f"{ours}.attentions.0" in names
            for layer in range(layers):
                found[f"{ours}.resnets.{layer}"] = f"{blocks}.{place + layer}.0"
                if attends:
                    found[f"{ours}.attentions.{layer}"] = f"{blocks}.{place + layer}.1"
            place += layers
            if f"{ours}.{way}samplers.0" in names:
                where = f"{place}.0" if way == "down" else f"{place - 1}.{2 if attends else 1}"
                found[f"{ours}.{way}samplers.0.conv"] = f"{blocks}.{where}.{resampled}"
                place += way == "down"
    return found


VAE = {
    r"down_blocks\.(\d)\.resnets\.": r"down.\1.block.",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def single_file(unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1.x as its original code names them."""
    named: dict[str, Tensor] = {}
    parts = unet_parts(unet)
    for name, tensor in unet.items():
        home = max((part for part in parts if name.startswith(f"{part}.")), key=len)
        rest = name.removeprefix(f"{home}.")
        if ".resnets." in f".{home}.":
            layer, _, kind = rest.rpartition(".")
            rest = f"{RESNET[layer]}.{kind}"
        named[f"model.diffusion_model.{parts[home]}.{rest}"] = tensor
    last = max(int(found[1]) for name in vae if (found := re.search(r"up_blocks\.(\d)", name)))
    for name, tensor in vae.items():
        new = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{last - int(found[1])}.block.", name)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", new)
        for pattern, replacement in VAE.items():
            new = re.sub(pattern, replacement, new)
        flat = ".attentions." in name and tensor.ndim == 2
        named[f"first_stage_model.{new}"] = tensor[..., None, None] if flat else tensor
    prefix = "cond_stage_model.transformer."
    for name, tensor in text.items():
        named[f"{prefix}{name if name.startswith('text_model.') else f'text_model.{name}'}"] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in named.items()}
