"""The contract between bootcli and one loaded teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from bootcli.errors import BootError, UsageError
from bootcli.maths.prediction import PredictionType
from bootcli.maths.schedule import Schedule
from bootcli.maths.threshold import NoThreshold, Threshold

Conditioning = Literal["none", "class", "text"]
Head = Literal["native", "x0"]
Sampler = Literal["ddim", "heun"]
Clock = Literal["native", "log"]


@dataclass(frozen=True)
class Cond:
    """What the network is conditioned on.

    Args:
        tensors: by name; their first dimension is the batch. Empty: unconditional.
        negative: what guidance leads away from, one row for each; None: the same for all, which the run says.
        guidance: w of each, shape (b,), float32; None: the same for all, which the run says. Only a network with a
            guidance input (`Teacher.add_guidance_input`) reads it.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    negative: Cond | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        """The number of conditions; an unconditional teacher has one, which is empty."""
        return next((len(tensor) for tensor in self.tensors.values()), 1)

    def rows(self, index: Tensor) -> Cond:
        """The conditions at ``index``, shape (b,)."""
        negative = None if self.negative is None else self.negative.rows(index)
        guidance = None if self.guidance is None else self.guidance[index.to(self.guidance.device)]
        tensors = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()}
        return Cond(tensors, negative, guidance)

    def to(self, device: torch.device) -> Cond:
        """The same on another device."""
        negative = None if self.negative is None else self.negative.to(device)
        guidance = None if self.guidance is None else self.guidance.to(device)
        return Cond({name: tensor.to(device) for name, tensor in self.tensors.items()}, negative, guidance)

    def then(self, other: Cond) -> Cond:
        """Both batches, one after the other: what a network reads, so without what guidance leads away from, and with
        w where both have one."""
        tensors = {name: torch.cat([tensor, other.tensors[name]]) for name, tensor in self.tensors.items()}
        if self.guidance is None or other.guidance is None:
            return Cond(tensors)
        return Cond(tensors, guidance=torch.cat([self.guidance, other.guidance]))


class Conditions(Protocol):
    """All conditions of a run, by their rows: a `Cond`, or prompts whose embeddings are on disk."""

    def __len__(self) -> int:
        """How many."""

    def rows(self, index: Tensor) -> Cond:
        """The conditions at ``index``, shape (b,)."""


@dataclass(frozen=True)
class TeacherSpec:
    """What the core has to know of a teacher to do every conversion itself.

    Args:
        sample_shape: (channels, height, width) of x_t.
        prediction: what the network predicts.
        schedule: its forward process.
        conditioning: what `Teacher.condition` accepts.
        num_classes: for ``conditioning="class"``: labels 0 to num_classes - 1.
        threshold: how the teacher keeps x_0 in range; latents have none.
        sampler: what its many-step samples are drawn with, along ``schedule.grid``: DDIM, or EDM's Heun.
    """

    sample_shape: tuple[int, int, int]
    prediction: PredictionType
    schedule: Schedule
    conditioning: Conditioning = "none"
    num_classes: int = 0
    threshold: Threshold = NoThreshold()
    sampler: Sampler = "ddim"


@dataclass(frozen=True)
class FeatureSpace:
    """A feature network with reference statistics, so that a Frechet distance has a meaning offline.

    Args:
        name: printed beside every number made with it ("fashion-cnn-64"); never "inception".
        network: (b, c, h, w) float images in [0, 255] -> (b, d) features.
        mean: (d,) float64, of the reference images.
        cov: (d, d) float64.
        num_images: how many reference images.
        source: what they are, one line.
        floor: the distance of real held-out images to the reference, by their number; empty where unknown.
        features: (n, d) of n reference images, drawn at random if not all; None where only mean and cov are known.
            Precision and recall need them, and take at most 10,000.
        classes_of: (b, d) features -> (b, num_classes) logits, where the network is a classifier of the teacher's
            classes; None: it is none, and the accuracy of samples is not known.
        words: what a prompt calls each of these classes, where the teacher reads prompts.
        size: height and width of the images that the network reads; None: of any.
    """

    name: str
    network: nn.Module
    mean: Tensor
    cov: Tensor
    num_images: int
    source: str
    floor: Mapping[int, float] = field(default_factory=dict)
    features: Tensor | None = None
    classes_of: Callable[[Tensor], Tensor] | None = None
    words: tuple[str, ...] = ()
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class LoraWeights:
    """What a student learned that was trained as a LoRA on its teacher.

    Args:
        tensors: by peft's names without the adapter's: "mid_block.attentions.0.proj_in.lora_A.weight".
        rank: of the changes; alpha is the same.
        targets: name endings of the modules that it changes.
        base: fingerprint of the teacher's weights.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    targets: tuple[str, ...]
    base: str


@dataclass(frozen=True)
class Exporter:
    """A format that other programs load: how to write it, and how those programs run it.

    Args:
        write: (teacher, student network at t_min, head, empty folder) -> files.
        check: a Python script that loads the folder with the other program and takes one step. After every export
            bootcli runs ``python SCRIPT FOLDER INPUTS OUTPUTS`` in a process where bootcli cannot be imported, and
            compares. INPUTS is a safetensors file with ``noise`` (b, c, h, w), which is
            ``torch.randn(shape, generator=torch.manual_seed(0))``, and the tensors of a `Cond`. The script writes
            OUTPUTS, a safetensors file with ``sample`` (b, c, h, w): what the student makes of that noise, before
            decoding and clamping; and, if the program has a whole pipeline, ``images`` (b, 1 or 3, H, W) in [-1, 1]
            as that pipeline gives them with seed 0.
        takes_guidance: whether the format has a place for the guidance scale of a student that takes one. INPUTS then
            has ``guidance`` too, w of each sample (b,). Other formats are refused to such a student.
    """

    write: Callable[[Teacher, nn.Module, Head, Path], None]
    check: Path
    takes_guidance: bool = False


@dataclass(frozen=True)
class LoraExporter:
    """A format for a LoRA alone, which other programs load onto the teacher.

    Args:
        write: (teacher, what the student learned, empty folder) -> files.
        check: as `Exporter.check`, with the teacher behind the other arguments: ``python SCRIPT FOLDER INPUTS OUTPUTS
            BASE``.
        base: where that lies; and whatever else the script has to know of it, in words of their own.
    """

    write: Callable[[Teacher, LoraWeights, Path], None]
    check: Path
    base: tuple[str, ...]


class Teacher(ABC):
    """One loaded teacher. Only ``predict`` knows native timesteps; the core knows t in [0, 1], t = 1 noise.

    A subclass sets ``spec`` and ``net`` and fills the abstract methods. ``net`` is a plain `nn.Module` in eval mode
    that the student copies; every method that takes a ``net`` must work on such a copy as well.
    """

    spec: TeacherSpec
    net: nn.Module

    @abstractmethod
    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The raw prediction of ``net``.

        Args:
            net: ``self.net`` or a copy of it.
            x_t: shape (b, c, h, w), on the device of ``net``.
            t: shape (b,), float64 on the CPU, in [0, 1].
            cond: from `condition`, on the device of ``net``.

        Returns:
            Shape (b, c, h, w): what ``spec.prediction`` says.
        """

    @abstractmethod
    def embedding_site(self, net: nn.Module) -> tuple[nn.Module, int]:
        """The submodule of ``net`` whose output, shape (b, width), conditions every block (the time embedding), and
        the width. The student adds its target-time embedding to that output."""

    @abstractmethod
    def output_layer(self, net: nn.Module) -> nn.Module:
        """The last layer of ``net``, with ``weight`` and ``bias``; the ``x0`` head re-initialises it."""

    @abstractmethod
    def config(self) -> dict[str, object]:
        """JSON-able architecture and spec: what `TeacherFamily.build` needs to make this teacher without weights."""

    def condition(self, requests: Sequence[int | str | None]) -> Cond:
        """Conditions for one request per sample: a class label, a prompt, or None (the unconditional branch).

        Raises `UsageError` for a request the teacher cannot honour.
        """
        if any(request is not None for request in requests):
            raise UsageError("This teacher is unconditional: it takes no classes and no prompts.")
        return Cond()

    def too_long(self, prompts: Sequence[str]) -> list[int]:
        """Which prompts have more words than the teacher reads, and are cut."""
        return []

    def fingerprint(self) -> str | None:
        """A hash of all that `condition` makes embeddings of prompts with (weights of the text encoder, tokenizer,
        settings), without loading it, so that they can be kept from run to run. None: they are not."""
        return None

    def release(self) -> None:  # noqa: B027  # most hold nothing
        """Let go of what `condition` and `decode` alone need; they load it again when they are called."""

    def use_resolution(self, width: int, height: int) -> None:
        """Draw images of so many pixels from now on: ``spec.sample_shape`` and `config` change. Raises `UsageError`
        for a size that the network does not draw; most draw one size only."""
        raise UsageError(
            f"--resolution {width}x{height}: the networks of this teacher's family draw one size.", "Leave it out."
        )

    def decode(self, z: Tensor) -> Tensor:
        """Images (b, 1 or 3, H, W) in [-1, 1] from samples; the identity for pixel models."""
        return z

    def head(self) -> Head:
        """The student's head (method: ``x0`` where the gain 1 / alpha at t = 1 is large, else ``native``)."""
        alpha = float(self.spec.schedule(torch.ones(1, dtype=torch.float64)).alpha)
        return "x0" if self.spec.prediction == "eps" and alpha < 0.05 else "native"

    def use_clock(self, clock: Clock) -> None:
        """Space times as the family does ("native") or uniformly in log sigma ("log"): ``spec.schedule`` and what
        `predict` makes of t change together. Raises `UsageError` where the family has no such spacing."""
        if clock != "native":
            raise UsageError(f"This teacher's times have one spacing: clock = {clock!r} is for teachers of EDM's kind.")

    def recipe(self) -> dict[str, object]:
        """Settings that suit this teacher, as a short diff on bootcli's defaults: ``{"boot.delta": 0.05}``."""
        return {}

    def lora_targets(self) -> tuple[str, ...]:
        """Name endings of the modules of ``net`` that a LoRA adapts; empty: none known. One step changes what every
        layer draws: name attention, feed-forward layers and convolutions, not the first and the last layer."""
        return ()

    def other_parts(self) -> Sequence[nn.Module]:
        """Networks beside ``net`` that are in memory now: text encoders, an autoencoder."""
        return ()

    def feature_layers(self, net: nn.Module) -> Sequence[nn.Module]:
        """Modules of ``net`` in the order that they run, each of which gives a map (b, channels, height, width): what
        ``net`` makes of a sample at several scales. An adversary looks at these; those of the encoder are the
        cheapest, since nothing after the last one runs. Empty: none known."""
        return ()

    def add_guidance_input(self, net: nn.Module, guidance_range: tuple[float, float]) -> None:
        """Give ``net``, a copy of ``self.net``, an input for the guidance scale, without effect before it is trained:
        `predict` of that net then reads ``cond.guidance``. Raises `UsageError` where there is no place for one.

        Args:
            net: the student's or a critic's.
            guidance_range: least and greatest w that it will be given.
        """
        raise UsageError(
            "--guidance-range: the networks of this teacher's family have no input for a guidance scale.",
            "Build one into the student, with --guidance-scale 3 for example.",
        )

    def enable_gradient_checkpointing(self, net: nn.Module, function: Callable[..., Any] | None = None) -> None:
        """Make ``net`` trade compute for memory where there are gradients, or say that it cannot.

        Args:
            net: ``self.net`` or a copy of it.
            function: to call as ``function(block, *inputs)`` in place of ``block(*inputs)``; None: torch's own
                checkpoint, without reentry.
        """
        raise BootError("This teacher's network does not support gradient checkpointing.")

    def export_formats(self) -> Mapping[str, Exporter]:
        """Formats that other programs load, by name."""
        return {}

    def lora_formats(self) -> Mapping[str, LoraExporter]:
        """Formats for a LoRA alone, by name."""
        return {}

    def feature_space(self) -> FeatureSpace | None:
        """A feature network of the teacher's own domain, or None: then FID means Inception.

        Of a teacher that draws other sizes (`use_resolution`): one that reads images of the size it draws.
        """
        return None

    def save(self, path: Path) -> None:
        """Write network and weights into one .safetensors file that ``TeacherFamily.load`` reads; or say that the
        family has no such form."""
        raise BootError("The family of this teacher has no form of its own to convert to.")

    def describe(self) -> dict[str, str]:
        """Facts for `bootcli teachers NAME`: architecture, licence if the model card names it, anything of note."""
        return {}
