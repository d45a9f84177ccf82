"""One loaded DDPM teacher: a `UNet2DModel` and its forward process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bootcli_diffusers.card import card_of
from bootcli_diffusers.lora import targets_of
from bootcli_diffusers.scheduler import Process, init_arguments, process_of, read_process
from diffusers import UNet2DModel
from torch import Tensor, nn

from bootcli.plugin import (
    BootError,
    Clip,
    Cond,
    Dynamic,
    Exporter,
    FeatureSpace,
    Teacher,
    TeacherSpec,
    UsageError,
    load_feature_space,
    read_recipe,
)
from bootcli_ddpm.layout import read_layout
from bootcli_ddpm.network import make_network, make_spec, try_out
from bootcli_ddpm.weights import fit_weights, read_weights


class DDPMTeacher(Teacher):
    """A pixel diffusion model of diffusers; its network still has random weights after construction.

    Args:
        unet: keyword arguments of `UNet2DModel`, without a learned variance.
        process: the forward process.
        card: facts that travel with students: ``licence`` and ``source`` (a hub id), where known.
        folder: where the teacher was loaded from; None for one built from a config.
    """

    def __init__(
        self, unet: Mapping[str, Any], process: Process, card: Mapping[str, str], folder: Path | None = None
    ) -> None:
        with torch.device("meta"):  # a sketch without memory: a wrong configuration is found before weights are made
            sketch = make_network(unet)
            self.spec = make_spec(sketch.config, process)
            try_out(sketch, self.spec)
        net = make_network(unet)
        self.net = net.eval()
        self.process = process
        self.card = dict(card)
        self._arguments = init_arguments(UNet2DModel, net.config)
        self._width = int(net.time_embedding.linear_2.out_features)
        self._folder = folder

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See `Teacher.predict`. The result has the dtype that ``net`` computes in."""
        parameter = next(net.parameters())
        # A float tensor: UNet2DModel truncates a Python float to a whole timestep.
        timestep = self.process.table.timestep(t).float().to(parameter.device)
        labels = cond.tensors.get("labels")
        output: Tensor = net(x_t.to(parameter.dtype), timestep, class_labels=labels, return_dict=False)[0]
        return output

    def condition(self, requests: Sequence[int | str | None]) -> Cond:
        """Class labels as ``{"labels": (b,) int64}``; see `Teacher.condition`.

        A `UNet2DModel` reserves no label for "no class", so None is refused where the model has classes.
        """
        if self.spec.conditioning == "none":
            return super().condition(requests)
        last = self.spec.num_classes - 1
        for request in requests:
            if request is None:
                raise UsageError(
                    "This teacher always needs a class: it has no unconditional branch, so it cannot be guided.",
                    f"Give class labels from 0 to {last}, and leave the guidance scale at 1.",
                )
            if not isinstance(request, int) or not 0 <= request <= last:
                raise UsageError(
                    f"{request!r} is not a class of this teacher.", f"Give class labels from 0 to {last}; no prompts."
                )
        return Cond({"labels": torch.tensor(requests, dtype=torch.long)})

    def embedding_site(self, net: nn.Module) -> tuple[nn.Module, int]:
        """The time embedding, to which the network adds the class embedding later; see `Teacher.embedding_site`."""
        return net.get_submodule("time_embedding"), self._width

    def output_layer(self, net: nn.Module) -> nn.Module:
        """The last convolution."""
        return net.get_submodule("conv_out")

    def config(self) -> dict[str, object]:
        """Arguments of `UNet2DModel` and `DDIMScheduler`, and the card; see `Teacher.config`."""
        parts = {"unet": self._arguments, "scheduler": self.process.config, "card": self.card}
        config: dict[str, object] = json.loads(json.dumps(parts))  # tuples become lists: what a file gives back
        return config

    def recipe(self) -> dict[str, object]:
        """The settings in the folder's ``recipe.json``, if it has one; see `Teacher.recipe`."""
        return {} if self._folder is None else read_recipe(self._folder)

    def lora_targets(self) -> tuple[str, ...]:
        """See `targets_of`."""
        return targets_of(self.net)

    def feature_layers(self, net: nn.Module) -> Sequence[nn.Module]:
        """The last residual block of every resolution on the way down, and the middle, if there is one."""
        resnets = [block.get_submodule("resnets") for block in net.get_submodule("down_blocks").children()]
        layers = [list(each.children())[-1] for each in resnets]
        return (*layers, net.get_submodule("mid_block")) if net.mid_block is not None else tuple(layers)

    def enable_gradient_checkpointing(self, net: nn.Module, function: Callable[..., Any] | None = None) -> None:
        """diffusers' own, block by block."""
        if not isinstance(net, UNet2DModel):
            raise BootError("Only a UNet2DModel knows how to checkpoint its gradients.")
        net.enable_gradient_checkpointing(function)

    def export_formats(self) -> Mapping[str, Exporter]:
        """``diffusers``: a `DDIMPipeline` folder that samples in one step."""
        from bootcli_ddpm.export import write_diffusers

        return {"diffusers": Exporter(write_diffusers, Path(__file__).with_name("check_diffusers.py"))}

    def feature_space(self) -> FeatureSpace | None:
        """The classifier in the teacher's ``features`` folder, if it has one; see `Teacher.feature_space`."""
        if self._folder is None or not (self._folder / "features").is_dir():
            return None
        return load_feature_space(self._folder / "features")

    def describe(self) -> dict[str, str]:
        """See `Teacher.describe`."""
        facts = {
            "architecture": f"UNet2DModel, {_millions(sum(p.numel() for p in self.net.parameters()))} parameters",
            "schedule": self.process.summary,
            "range of x_0": _range(self.spec),
            "attention": "yes" if any(name.endswith("to_q") for name, _ in self.net.named_modules()) else "no",
        }
        if self.spec.conditioning == "class":
            facts["classes"] = f"{self.spec.num_classes}; no unconditional branch, hence no guidance"
        return facts | self.card


def load(path: Path) -> DDPMTeacher:
    """A teacher with its weights, in float32 and eval mode. Raises `BootError` for a broken folder."""
    layout = read_layout(path)
    process = read_process(layout.scheduler)
    unet = init_arguments(UNet2DModel, layout.network)
    tensors = read_weights(layout.unet)
    inputs, outputs = unet.get("in_channels", 3), unet.get("out_channels", 3)  # diffusers' defaults
    if isinstance(inputs, int) and outputs == 2 * inputs:
        # The second half is a learned variance, which DDIM never reads. Cut off, the network is a plain one that
        # students, exports and diffusers' own pipelines understand.
        unet["out_channels"] = inputs
        tensors |= {name: tensors[name][:inputs] for name in ("conv_out.weight", "conv_out.bias") if name in tensors}
    teacher = DDPMTeacher(unet, process, card_of(path), path)
    fit_weights(teacher.net, tensors, layout.unet)
    return teacher


def build(config: Mapping[str, Any]) -> DDPMTeacher:
    """The teacher of a stored `DDPMTeacher.config`, with random weights. Raises `BootError` for a damaged config."""
    try:
        unet, scheduler, card = (dict(config[name]) for name in ("unet", "scheduler", "card"))
        process = process_of(scheduler)
    except (KeyError, TypeError, ValueError) as error:
        raise BootError(
            f"The stored teacher config is incomplete ({type(error).__name__}: {error}).",
            "The file was edited, or written by another version of bootcli.",
        ) from None
    return DDPMTeacher(unet, process, card)


def _range(spec: TeacherSpec) -> str:
    match spec.threshold:
        case Clip(bound):
            return f"clipped to [-{bound:g}, {bound:g}]"
        case Dynamic(quantile, max_bound):
            return f"dynamic thresholding, quantile {quantile:g}, bound {max_bound:g}"
        case _:
            return "not limited"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"
