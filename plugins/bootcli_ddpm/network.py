"""The network behind a teacher: made from arguments that nobody has checked, and described by a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bootcli_diffusers.scheduler import Process
from diffusers import UNet2DModel
from torch import Tensor, nn

from bootcli.plugin import BootError, TeacherSpec


class InterpolatedEmbedding(nn.Embedding):
    """A learned table of timesteps, read between its entries too; its weights stay those of diffusers' network."""

    def forward(self, timestep: Tensor) -> Tensor:
        """Rows (b, width) at timesteps (b,), whole or not."""
        left = timestep.floor()
        below, above = (super(InterpolatedEmbedding, self).forward(entry.long()) for entry in (left, timestep.ceil()))
        return torch.lerp(below, above, (timestep - left).to(below.dtype)[:, None])


def make_network(unet: Mapping[str, Any]) -> Any:
    """The `UNet2DModel` of these arguments, with random weights. Raises `BootError` for arguments that make none."""
    try:
        net = UNet2DModel(**unet)
        if isinstance(net.time_proj, nn.Embedding):
            net.time_proj = InterpolatedEmbedding(net.time_proj.num_embeddings, net.time_proj.embedding_dim)
        return net
    except Exception as error:  # values of any kind come from the file, and diffusers checks few of them
        raise _invalid(error) from None


def make_spec(config: Any, process: Process) -> TeacherSpec:
    """What the core has to know. Raises `BootError` for a `UNet2DModel` that is not a model of images on its own."""
    _check_time(config, process)
    classes = _num_classes(config)
    return TeacherSpec(
        sample_shape=_sample_shape(config),
        prediction=process.prediction,
        schedule=process.table,
        conditioning="class" if classes else "none",
        num_classes=classes,
        threshold=process.threshold,
    )


def _sample_shape(config: Any) -> tuple[int, int, int]:
    size = [config.sample_size] * 2 if isinstance(config.sample_size, int) else config.sample_size
    if not (isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise BootError(
            f"The network's config.json has sample_size {config.sample_size!r}.",
            "Set it to the side of its images in pixels, or to [height, width].",
        )
    if config.in_channels != config.out_channels:
        raise BootError(
            f"The network reads {config.in_channels} channels and predicts {config.out_channels}.",
            "It is not an image model on its own (super-resolution or inpainting, perhaps).",
        )
    if config.in_channels not in (1, 3):
        raise BootError(
            f"The network makes images of {config.in_channels} channels.",
            "The ddpm family runs grey (1) and colour (3) pixels; four channels are usually latents of an autoencoder.",
        )
    return int(config.in_channels), size[0], size[1]


def _check_time(config: Any, process: Process) -> None:
    if config.time_embedding_type == "fourier":
        raise BootError(
            "The network has time_embedding_type 'fourier': it divides by its noise level and has no timesteps.",
            "It belongs to a variance-exploding process (NCSN++), which the ddpm family does not run.",
        )
    if config.time_embedding_type == "learned" and config.num_train_timesteps < process.table.num_timesteps:
        raise BootError(
            f"The network knows {config.num_train_timesteps} timesteps, its scheduler {process.table.num_timesteps}.",
            "Correct num_train_timesteps in scheduler_config.json.",
        )


def _num_classes(config: Any) -> int:
    kind, classes = config.class_embed_type, config.num_class_embeds
    if kind is None:
        return int(classes or 0)
    if kind == "timestep" and classes is not None:
        return int(classes)
    if kind == "timestep":
        raise BootError(
            "The network takes classes (class_embed_type 'timestep'), but its config.json does not say how many.",
            'Add "num_class_embeds": the number of classes; diffusers does not use it for this type.',
        )
    raise BootError(
        f"The network has class_embed_type {kind!r}: it expects an embedding vector, not a class.",
        "The ddpm family runs unconditional and class-conditional models.",
    )


def try_out(sketch: Any, spec: TeacherSpec) -> None:
    """One call on the meta device: do all layers fit each other and the image size?"""
    labels = torch.zeros(1, dtype=torch.long) if spec.num_classes else None
    timestep = torch.zeros(1)
    try:
        shape = sketch(torch.zeros(1, *spec.sample_shape), timestep, class_labels=labels).sample.shape
    except Exception as error:  # as above
        raise _invalid(error) from None
    if shape[1:] != spec.sample_shape:
        raise BootError(
            f"The network turns images of shape {spec.sample_shape} into {tuple(shape[1:])}.",
            "Correct sample_size or the padding in config.json.",
        )


def _invalid(error: Exception) -> BootError:
    return BootError(
        f"The network's configuration is not valid ({type(error).__name__}: {error}).",
        "Correct config.json, or save the model again with diffusers.",
    )
