"""Pixel-space DDPM teachers: diffusers folders with a `UNet2DModel` and a scheduler of the DDPM kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bootcli.plugin import Alias, TeacherFamily
from bootcli_ddpm.layout import matches

if TYPE_CHECKING:
    from bootcli.plugin import Teacher

__all__ = ["family"]


def _load(path: Path) -> Teacher:
    from bootcli_ddpm.teacher import load

    return load(path)


def _build(config: Mapping[str, object]) -> Teacher:
    from bootcli_ddpm.teacher import build

    return build(config)


_ALIASES = {
    "fashion": Alias(str(Path(__file__).parent / "fashion"), "Fashion-MNIST, 16x16 grey, built in: no download"),
    "cifar10": Alias("google/ddpm-cifar10-32", "CIFAR-10, 32x32 (Ho et al. 2020)"),
    "celebahq": Alias("google/ddpm-celebahq-256", "CelebA-HQ, 256x256 (Ho et al. 2020)"),
    "church": Alias("google/ddpm-church-256", "LSUN church, 256x256 (Ho et al. 2020)"),
    "bedroom": Alias("google/ddpm-bedroom-256", "LSUN bedroom, 256x256 (Ho et al. 2020)"),
    "cat": Alias("google/ddpm-cat-256", "LSUN cat, 256x256 (Ho et al. 2020)"),
    "celebahq-ema": Alias("google/ddpm-ema-celebahq-256", "CelebA-HQ, 256x256, averaged weights"),
    "church-ema": Alias("google/ddpm-ema-church-256", "LSUN church, 256x256, averaged weights"),
    "bedroom-ema": Alias("google/ddpm-ema-bedroom-256", "LSUN bedroom, 256x256, averaged weights"),
    "cat-ema": Alias("google/ddpm-ema-cat-256", "LSUN cat, 256x256, averaged weights"),
    "butterflies": Alias("anton-l/ddpm-butterflies-128", "Smithsonian butterflies, 128x128"),
    "flowers": Alias("anton-l/ddpm-ema-flowers-64", "Oxford flowers, 64x64"),
}

_STEM = "diffusion_pytorch_model"


def _weights(*names: str) -> tuple[str, ...]:
    return (*names, *(f"unet/{name}" for name in names))


family = TeacherFamily(
    name="ddpm",
    summary="pixel diffusion models of diffusers: UNet2DModel with a DDPM, DDIM, PNDM or similar scheduler",
    accepts=(
        "a diffusers pipeline folder: unet/ (UNet2DModel) and scheduler/",
        "a flat diffusers folder: config.json, scheduler_config.json and the weights side by side",
    ),
    matches=matches,
    load=_load,
    build=_build,
    aliases=_ALIASES,
    hub_weights=(
        _weights(f"{_STEM}.safetensors", f"{_STEM}-*.safetensors"),
        _weights(f"{_STEM}.bin", f"{_STEM}-*.bin"),
        _weights(f"{_STEM}.fp16.safetensors"),
    ),
    hub_files=("features/*.safetensors",),
)
