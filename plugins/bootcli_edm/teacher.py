"""One loaded EDM teacher: a preconditioned network, its noise levels and its labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bootcli.plugin import (
    BootError,
    Clock,
    Cond,
    FeatureSpace,
    Head,
    Teacher,
    TeacherSpec,
    UsageError,
    VarianceExploding,
    load_feature_space,
    read_recipe,
)
from bootcli_edm.architecture import Architecture
from bootcli_edm.files import HEADER, NON_COMMERCIAL, Checkpoint, network_file, read_network
from bootcli_edm.layers import UNetBlock
from bootcli_edm.preconditioning import Preconditioned
from bootcli_edm.refusal import Refused

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
"""EDM's sampler (Karras et al. 2022, table 1)."""
FEATURES = "features"


class EDMTeacher(Teacher):
    """A network of EDM's kinds.

    Args:
        architecture: what it is.
        net: with its weights.
        facts: what is known of the file it came from.
        folder: where that lies; None for a teacher that was built from its config.
    """

    net: Preconditioned

    def __init__(
        self, architecture: Architecture, net: Preconditioned, facts: Mapping[str, str], folder: Path | None = None
    ) -> None:
        image, unet = architecture.wrapper, architecture.unet
        self.net = net
        self.architecture = architecture
        self.facts = dict(facts)
        self._folder = folder
        self._unlabelled = unet.label_dropout > 0
        blocks = [(place, block) for place, block in net.named_modules() if isinstance(block, UNetBlock)]
        self._targets = tuple(
            f"{place}.{name}"
            for place, block in blocks
            for name, layer in block.named_children()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        )
        scalings = architecture.preconditioning()
        low, high = max(SIGMA_MIN, scalings.levels[0]), min(SIGMA_MAX, scalings.levels[1])
        if not low < high:
            raise Refused(f"its network knows no noise levels from {low:g} to {high:g}")
        if image.img_channels not in (1, 3):
            raise Refused(f"its network makes images of {image.img_channels} channels, and not grey or coloured pixels")
        self.spec = TeacherSpec(
            sample_shape=(image.img_channels, image.img_resolution, image.img_resolution),
            prediction="eps" if scalings.predicts_noise else "x0",
            schedule=VarianceExploding(low, high, RHO),
            conditioning="class" if image.label_dim else "none",
            num_classes=image.label_dim,
            sampler="heun",
        )

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoiser D where the network's output is mixed with x_t, else the noise; see `Teacher.predict`."""
        sigma = self.spec.schedule(t).sigma.float().to(x_t.device)
        as_noise = self.spec.prediction == "eps"
        prediction: Tensor = net(x_t.float(), sigma, cond.tensors.get("labels"), as_noise=as_noise)
        return prediction

    def condition(self, requests: Sequence[int | str | None]) -> Cond:
        """Class labels as ``{"labels": (b, num_classes)}``, one-hot; zeros for None, where the network knows that."""
        if self.spec.conditioning == "none":
            return super().condition(requests)
        last = self.spec.num_classes - 1
        labels = torch.zeros(len(requests), self.spec.num_classes)
        for row, request in zip(labels, requests, strict=True):
            if request is None:
                if not self._unlabelled:
                    raise UsageError(
                        "This teacher always needs a class: trained without label dropout, it cannot be guided.",
                        f"Give class labels from 0 to {last}, and leave the guidance scale at 1.",
                    )
            elif not isinstance(request, int) or not 0 <= request <= last:
                raise UsageError(
                    f"{request!r} is not a class of this teacher.", f"Give class labels from 0 to {last}; no prompts."
                )
            else:
                row[request] = 1
        return Cond({"labels": labels})

    def embedding_site(self, net: nn.Module) -> tuple[nn.Module, int]:
        """The second layer of the embedding; see `Teacher.embedding_site`."""
        unet = self.architecture.unet
        return net.get_submodule("model.map_layer1"), unet.model_channels * unet.channel_mult_emb

    def output_layer(self, net: nn.Module) -> nn.Module:
        """The last convolution."""
        if self.architecture.wrapper.model_type == "DhariwalUNet":
            return net.get_submodule("model.out_conv")
        side = self.architecture.wrapper.img_resolution
        return net.get_submodule("model.dec").get_submodule(f"{side}x{side}_aux_conv")

    def head(self) -> Head:
        """``x0`` where the network predicts noise, which at sigma_max would be amplified sigma_max times.

        A decoder of type "skip" draws with more than one layer, none of which can be made anew alone.
        """
        if self.spec.prediction == "eps" and getattr(self.architecture.unet, "decoder_type", "standard") == "standard":
            return "x0"
        return "native"

    def config(self) -> dict[str, object]:
        """Class and arguments of the network, the clock, and what is known of the file; see `Teacher.config`."""
        return {
            "class_name": self.architecture.class_name,
            "arguments": self.architecture.arguments,
            "clock": "log" if self._schedule.log else "native",
            "facts": self.facts,
        }

    @property
    def _schedule(self) -> VarianceExploding:
        assert isinstance(self.spec.schedule, VarianceExploding)
        return self.spec.schedule

    def use_clock(self, clock: Clock) -> None:
        """EDM's rho-spaced levels, or uniform in log sigma; see `Teacher.use_clock`."""
        self.spec = replace(self.spec, schedule=replace(self._schedule, log=clock == "log"))

    def recipe(self) -> dict[str, object]:
        """The settings in the folder's ``recipe.json``, if it has one; see `Teacher.recipe`."""
        return {} if self._folder is None else read_recipe(self._folder)

    def lora_targets(self) -> tuple[str, ...]:
        """The plain layers of every block: convolutions, affine layers and the projections of the attention."""
        return self._targets

    def feature_layers(self, net: nn.Module) -> Sequence[nn.Module]:
        """The last residual block of every resolution on the way down, and the lowest ones on the way up."""
        last = self.architecture.unet.num_blocks - 1
        down = [
            layer for name, layer in net.get_submodule("model.enc").named_children() if name.endswith(f"_block{last}")
        ]
        middle = [layer for name, layer in net.get_submodule("model.dec").named_children() if name.endswith("_in1")]
        return (*down, *middle)

    def enable_gradient_checkpointing(self, net: nn.Module, function: Callable[..., Any] | None = None) -> None:
        """Block by block."""
        for module in net.modules():
            if isinstance(module, UNetBlock):
                module.checkpoint = function or partial(checkpoint, use_reentrant=False)

    def feature_space(self) -> FeatureSpace | None:
        """That of the folder's ``features``, if it has one; see `Teacher.feature_space`."""
        if self._folder is None or not (self._folder / FEATURES).is_dir():
            return None
        return load_feature_space(self._folder / FEATURES)

    def describe(self) -> dict[str, str]:
        """See `Teacher.describe`."""
        image, spec, schedule = self.architecture.wrapper, self.spec, self._schedule
        facts = {
            "architecture": f"{image.model_type} under {self.architecture.class_name}",
            "noise levels": f"{schedule.sigma_min:.3g} to {schedule.sigma_max:.3g}, rho {RHO:g}",
        }
        if spec.num_classes:
            guided = "guidance works" if self._unlabelled else "no label dropout, hence no guidance"
            facts["labels"] = f"{spec.num_classes}; {guided}"
        if image.use_fp16:
            facts["precision"] = "its authors run it in fp16; here --mixed-precision decides"
        if self.facts.get("licence") == NON_COMMERCIAL:
            facts["licence of it"] = "non-commercial use only; a student of it inherits that"
        return self.facts | facts

    def save(self, path: Path) -> None:
        """As one .safetensors file, which nothing has to be careful with; see `Teacher.save`."""
        save_file(
            {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()},
            path,
            {HEADER: json.dumps(self.config())},
        )


def load(path: Path) -> EDMTeacher:
    """A teacher with its weights, in float32 and eval mode. Raises `BootError` for a broken file."""
    file = network_file(path) or (path if path.is_file() else None)
    if file is None:
        raise BootError(
            f"{path} holds no EDM network, or more than one.", "Name the file: a .pkl, .pt or .safetensors."
        )
    return read_network(file, lambda found: _teacher(found, file.parent if path.is_dir() else None))


def _teacher(found: Checkpoint, folder: Path | None) -> EDMTeacher:
    return EDMTeacher(found.architecture, found.architecture.load(found.tensors), found.facts, folder)


def build(config: Mapping[str, Any]) -> EDMTeacher:
    """The teacher of a stored `EDMTeacher.config`, with random weights. Raises `BootError` for a damaged config."""
    try:
        facts = {str(name): str(value) for name, value in config["facts"].items()}
        architecture = Architecture(str(config["class_name"]), dict(config["arguments"]))
        teacher = EDMTeacher(architecture, architecture.build(), facts)
        teacher.use_clock("log" if config["clock"] == "log" else "native")
        return teacher
    except (Refused, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BootError(
            f"The stored teacher config is not valid ({type(error).__name__}: {error}).",
            "The file was edited, or written by another version of bootcli.",
        ) from None
