"""The arguments in a checkpoint, checked, and the network they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from bootcli.plugin import misfit
from bootcli_edm.dhariwal_unet import DhariwalUNet
from bootcli_edm.preconditioning import EDM, IDDPM, VE, VP, Preconditioned, Preconditioning
from bootcli_edm.refusal import Refused, shown
from bootcli_edm.song_unet import SongUNet

# The bounds are far above any network there is; without them a damaged file could ask for a year of building.
Side = Annotated[int, Field(ge=1, le=4096)]
Few = Annotated[int, Field(ge=1, le=64)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Width = Annotated[int, Field(ge=0, le=100_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Rate = Annotated[float, Field(gt=0, le=400)]
Levels = Annotated[list[Few], Field(min_length=1, max_length=12)]
Sides = Annotated[list[Side], Field(max_length=12)]
Taps = Annotated[list[Positive], Field(min_length=1, max_length=12)]
Steps = Annotated[int, Field(ge=1, le=100_000)]
UNetName = Literal["SongUNet", "DhariwalUNet"]


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


_Kind = TypeVar("_Kind", bound=_Arguments)


class _UNet(_Arguments):
    """What both networks are given; ``label_dropout`` of the labels were left out: above 0, zeros mean "any class"."""

    augment_dim: Width = 0
    channel_mult_emb: Few = 4
    dropout: Share = 0.1
    label_dropout: Share = 0.0


class SongArguments(_UNet):
    """See `SongUNet`."""

    model_channels: Channels = 128
    channel_mult: Levels = [1, 2, 2, 2]
    num_blocks: Few = 4
    attn_resolutions: Sides = [16]
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: Few = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: Taps = [1, 1]


class DhariwalArguments(_UNet):
    """See `DhariwalUNet`."""

    model_channels: Channels = 192
    channel_mult: Levels = [1, 2, 3, 4]
    num_blocks: Few = 3
    attn_resolutions: Sides = [32, 16, 8]
    adaptive_scale: bool = True


class _Image(_Arguments):
    """What every preconditioner is given, in the order of positional arguments."""

    img_resolution: Side
    img_channels: Few
    label_dim: Width = 0
    use_fp16: bool = False


class EDMArguments(_Image):
    """See `EDM`."""

    sigma_min: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    sigma_max: Annotated[float, Field(gt=0)] = float("inf")
    sigma_data: Positive = 0.5
    model_type: UNetName = "DhariwalUNet"
    noise_scale: Positive = 0.25

    def preconditioning(self) -> Preconditioning:
        """The scalings."""
        return EDM(self.sigma_min, self.sigma_max, self.sigma_data, self.noise_scale)


class VPArguments(_Image):
    """See `VP`."""

    beta_d: Rate = 19.9
    beta_min: Rate = 0.1
    M: Steps = 1000
    epsilon_t: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    model_type: UNetName = "SongUNet"

    def preconditioning(self) -> Preconditioning:
        """The scalings."""
        return VP(self.beta_d, self.beta_min, self.M, self.epsilon_t)


class VEArguments(_Image):
    """See `VE`."""

    sigma_min: Positive = 0.02
    sigma_max: Positive = 100.0
    model_type: UNetName = "SongUNet"

    def preconditioning(self) -> Preconditioning:
        """The scalings."""
        return VE(self.sigma_min, self.sigma_max)


class IDDPMArguments(_Image):
    """See `IDDPM`."""

    C_1: Annotated[float, Field(gt=0, lt=1)] = 0.001
    C_2: Annotated[float, Field(gt=0, le=1)] = 0.008
    M: Steps = 1000
    model_type: UNetName = "DhariwalUNet"

    def preconditioning(self) -> Preconditioning:
        """The scalings."""
        return IDDPM(self.C_1, self.C_2, self.M)


Wrapper = EDMArguments | VPArguments | VEArguments | IDDPMArguments
UNet = SongArguments | DhariwalArguments
WRAPPERS: Mapping[str, type[Wrapper]] = {
    "EDMPrecond": EDMArguments,
    "VPPrecond": VPArguments,
    "VEPrecond": VEArguments,
    "iDDPMPrecond": IDDPMArguments,
}
NETWORKS: Mapping[str, tuple[type[UNet], type[nn.Module]]] = {
    "SongUNet": (SongArguments, SongUNet),
    "DhariwalUNet": (DhariwalArguments, DhariwalUNet),
}


class Architecture:
    """A network that can be built.

    Args:
        class_name: of the preconditioner in NVlabs' code: one of `WRAPPERS`.
        arguments: what it is constructed with, its network's among them.
        positional: the first of them, without their names.

    Raises `Refused` for arguments that describe none.
    """

    def __init__(self, class_name: str, arguments: Mapping[str, object], positional: Sequence[object] = ()) -> None:
        if class_name not in WRAPPERS:
            raise Refused(f"its network is of class {shown(class_name)!r}, none of {', '.join(WRAPPERS)}")
        kind = WRAPPERS[class_name]
        first = dict(zip(kind.model_fields, positional, strict=False))
        if len(first) < len(positional) or first.keys() & arguments.keys():
            raise Refused(f"its {class_name} is given an argument twice, or one too many")
        named = first | dict(arguments)
        own = {name: value for name, value in named.items() if name in kind.model_fields}
        self.class_name = class_name
        self.wrapper: Wrapper = _checked(kind, own, class_name)
        others = {name: value for name, value in named.items() if name not in own}
        self.unet: UNet = _checked(NETWORKS[self.wrapper.model_type][0], others, self.wrapper.model_type)

    @property
    def arguments(self) -> dict[str, object]:
        """All of them, JSON-able; an infinite sigma_max is left out."""
        both: dict[str, object] = {**self.wrapper.model_dump(), **self.unet.model_dump()}
        return {name: value for name, value in both.items() if value != float("inf")}

    def preconditioning(self) -> Preconditioning:
        """The scalings of the denoiser."""
        return self.wrapper.preconditioning()

    def build(self) -> Preconditioned:
        """The network with untrained weights, in eval mode. Raises `Refused` where its layers do not fit each other."""
        self._sketch()
        return self._network()

    def load(self, tensors: Mapping[str, Tensor]) -> Preconditioned:
        """The network with these weights, in float32. Raises `Refused` unless names and shapes are just its own."""
        net = self._sketch()
        if problem := misfit(net.state_dict(), tensors):
            raise Refused(f"its weights do not fit the network that it describes: tensors {problem}")
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.itemsize for t in tensors.values()}
        if sum(t.numel() for t in tensors.values()) > sum(held.values()):
            raise Refused("its weights are more numbers than it holds")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise Refused(f"its weights are damaged: {name} holds something else than finite numbers")
        net.load_state_dict({name: t.float().contiguous() for name, t in tensors.items()}, assign=True)
        if not net.u.numel():  # a buffer that no checkpoint has
            net.u = self.preconditioning().table()
        return net.eval()

    def _sketch(self) -> Preconditioned:
        """The network without memory, tried out: a lie about sizes costs nothing, layers that do not fit are found."""
        image = self.wrapper
        try:
            with torch.device("meta"), torch.no_grad():
                net = self._network()
                x = torch.zeros(1, image.img_channels, image.img_resolution, image.img_resolution)
                shape = net(x, torch.ones(1)).shape
        except Exception as error:  # whatever a layer says of the sizes it is given
            raise Refused(f"the network that it describes cannot be built ({shown(error, 200)})") from None
        if shape != x.shape:
            raise Refused(f"the network that it describes turns {tuple(x.shape[1:])} into {tuple(shape[1:])}")
        return net

    def _network(self) -> Preconditioned:
        image = self.wrapper
        outputs = image.img_channels * (2 if self.class_name == "iDDPMPrecond" else 1)
        model = NETWORKS[image.model_type][1](
            image.img_resolution,
            image.img_channels,
            outputs,
            image.label_dim,
            **self.unet.model_dump(exclude={"label_dropout"}),
        )
        return Preconditioned(model, self.preconditioning(), image.img_channels, image.label_dim).eval()


def _checked(kind: type[_Kind], values: Mapping[str, object], owner: str) -> _Kind:
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = shown(".".join(map(str, first["loc"])))
        given = "" if first["type"] == "missing" else f" = {shown(first['input'])}"
        raise Refused(f"it describes no {owner} that can be built: {where}{given}: {first['msg'].lower()}") from None
