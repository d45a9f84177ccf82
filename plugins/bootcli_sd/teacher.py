"""One loaded Stable Diffusion teacher: a `UNet2DConditionModel`, its forward process, its words and its latents."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from bootcli_diffusers.card import card_of
from bootcli_diffusers.lora import targets_of
from bootcli_diffusers.scheduler import Process, init_arguments, process_of, read_process
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from bootcli.plugin import (
    BootError,
    Cond,
    Exporter,
    FeatureSpace,
    LoraExporter,
    NoThreshold,
    Teacher,
    TeacherSpec,
    UsageError,
    load_feature_space,
    locate,
    read_recipe,
)
from bootcli_sd import single_file
from bootcli_sd.layout import Layout, read_layout, variant_of
from bootcli_sd.loading import check_whole, quietly
from bootcli_sd.single_file import Parts, read_single_file
from bootcli_sd.text import TextEncoder, digest_of, load_pairs

PROMPTS, FEATURES = "prompts.txt", "features"
PACKAGE = Path(__file__).parent
"""Teachers that come with it are stored by their place in here, since it moves with every installation."""
UNIT = 8
"""Pixels of which diffusers' pipelines draw multiples."""
DECODED = 4
"""Latents decoded at a time."""
GUIDANCE_WIDTH = 256
"""Numbers that a guidance scale is embedded as, in students that take one; as latent consistency models have it."""


class SDTeacher(Teacher):
    """A latent text-to-image model of diffusers.

    Its text encoder and its autoencoder stay in files until they are needed, and are not part of ``net``.

    Args:
        net: the UNet.
        process: the forward process.
        vae: configuration of the autoencoder.
        home: the folder that holds the other parts, or the single file.
        kind: of a single file (`bootcli_sd.single_file.CONFIGS`); empty for a folder.
        card: facts that travel with students: ``licence`` and ``source`` (a hub id), where known.
    """

    def __init__(
        self, net: Any, process: Process, vae: Mapping[str, Any], home: Path, card: Mapping[str, str], kind: str = ""
    ) -> None:
        self.net = net.eval()
        self.process = process
        self.home = home
        self.kind = kind
        self.card = dict(card)
        self.vae_config = dict(vae)
        self._arguments = init_arguments(UNet2DConditionModel, net.config)
        self._width = int(net.time_embedding.linear_2.out_features)
        self._text: TextEncoder | None = None
        self._vae: Any = None
        side = net.config.sample_size
        if side is None:
            raise BootError(
                "The network's configuration does not say its sample_size.",
                "Add it to unet/config.json: 64 for SD 1.5.",
            )
        sides = (side, side) if isinstance(side, int) else side
        if not (isinstance(sides, Sequence) and len(sides) == 2 and all(isinstance(s, int) and s > 0 for s in sides)):
            raise BootError(
                f"The network's configuration has sample_size {side!r}.",
                "Set it to the side of its latents, or to [height, width], in unet/config.json.",
            )
        self.spec = TeacherSpec(
            sample_shape=(int(net.config.in_channels), *sides),
            prediction=process.prediction,
            schedule=process.table,
            conditioning="text",
            threshold=NoThreshold(),  # latents have no range
        )

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See `Teacher.predict`. The result has the dtype that ``net`` computes in."""
        parameter = next(net.parameters())
        timestep = self.process.table.timestep(t).float().to(parameter.device)
        text = cond.tensors["text"].to(parameter.dtype)
        added = None
        if "pooled" in cond.tensors:
            added = {"text_embeds": cond.tensors["pooled"].to(parameter.dtype), "time_ids": self._sizes(x_t)}
        guidance = None
        if net.get_submodule("time_embedding").cond_proj is not None:
            assert cond.guidance is not None, "a network with a guidance input needs w"
            guidance = embed_guidance(cond.guidance).to(parameter.dtype)
        output: Tensor = net(
            x_t.to(parameter.dtype),
            timestep,
            timestep_cond=guidance,
            encoder_hidden_states=text,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output

    def _sizes(self, x_t: Tensor) -> Tensor:
        """SDXL's time_ids (b, 6): original size, crop and target size in pixels; nothing is cropped."""
        height, width = (side * self.pixels for side in x_t.shape[2:])
        return torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).expand(len(x_t), -1)

    @property
    def pixels(self) -> int:
        """Pixels of a side for each latent of a side."""
        return int(2 ** (len(self.vae_config.get("block_out_channels", (64,))) - 1))  # diffusers' default

    def condition(self, requests: Sequence[int | str | None]) -> Cond:
        """Text embeddings as ``{"text": (b, tokens, width)}``, for SDXL ``pooled`` too; None is the empty prompt."""
        for request in requests:
            if request is not None and not isinstance(request, str):
                raise UsageError(f"{request!r} is no prompt: this teacher takes text, not classes.")
        encoder = self.text.to(next(self.net.parameters()).device)
        encoded = encoder(requests)  # type: ignore[arg-type]  # as was just checked
        return Cond({name: tensor.cpu() for name, tensor in encoded.items()})

    @property
    def text(self) -> TextEncoder:
        """The text encoder, loaded when it is first asked for."""
        if self._text is None and self.kind:
            self.take(self._file())
        elif self._text is None:
            layout = self._layout()
            self._text = TextEncoder(load_pairs(layout.encoders), zero_negative=layout.zero_negative)
        assert self._text is not None
        return self._text

    @property
    def vae(self) -> Any:
        """The autoencoder, loaded when it is first asked for."""
        if self._vae is None and self.kind:
            self.take(self._file())
        elif self._vae is None:
            self._vae = _from_folder(AutoencoderKL, self._layout().folder / "vae").eval().requires_grad_(False)
        return self._vae

    def fingerprint(self) -> str:
        """Of the files of text encoders and tokenizers; see `Teacher.fingerprint`."""
        if self.kind:
            return single_file.digest_of(self._checked_file(), self.kind)
        layout = self._layout()
        return digest_of(layout.encoders, zero_negative=layout.zero_negative)

    def release(self) -> None:
        """Text encoder and autoencoder go back to their files."""
        self._text = self._vae = None

    def use_resolution(self, width: int, height: int) -> None:
        """Any multiple of what a latent and diffusers' pipelines ask for; the network itself upsamples to the size that
        it halved, even or odd."""
        unit = max(self.pixels, UNIT)
        if width % unit or height % unit:
            raise UsageError(
                f"--resolution {width}x{height}: this teacher draws multiples of {unit} pixels.",
                f"Near the size that it was trained at, multiples of {8 * unit} are the usual ones.",
            )
        sides = height // self.pixels, width // self.pixels
        net: Any = self.net
        net.register_to_config(sample_size=sides[0] if sides[0] == sides[1] else sides)
        self._arguments = init_arguments(UNet2DConditionModel, net.config)
        self.spec = dataclasses.replace(self.spec, sample_shape=(self.spec.sample_shape[0], *sides))

    def take(self, parts: Parts) -> None:
        """Keep the text encoder and the autoencoder of a single file, which is read as a whole."""
        self._text = TextEncoder(parts.pairs, zero_negative=single_file.model_of(parts.kind) == "sdxl")
        self._vae = parts.vae

    def _layout(self) -> Layout:
        if not self.home.is_dir() and "source" in self.card:  # a student moved to another machine, or a cleared cache
            self.home = locate(f"sd:{self.card['source']}")
        if not self.home.is_dir():
            raise self._gone()
        return read_layout(self.home)

    def _file(self) -> Parts:
        return read_single_file(self._checked_file(), self.kind, with_unet=False)

    def _checked_file(self) -> Path:
        if not self.home.is_file():
            raise self._gone()
        return self.home

    def _gone(self) -> BootError:
        return BootError(
            f"{self.home} is gone: it held the text encoder and the autoencoder of this teacher.",
            "Put it back, or distil again from where it is now.",
        )

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images (b, 3, H, W) by the autoencoder, a few at a time: its widest maps are 128 times the latents."""
        vae = self.vae.to(z.device)
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        latents = z.float() / vae.config.scaling_factor
        if mean is not None and std is not None:  # of some fine-tunes of SDXL
            mean, std = (torch.tensor(each, device=z.device)[None, :, None, None] for each in (mean, std))
            latents = latents * std + mean
        return torch.cat([vae.decode(few, return_dict=False)[0] for few in latents.split(DECODED)])

    def too_long(self, prompts: Sequence[str]) -> list[int]:
        """See `Teacher.too_long`."""
        return self.text.too_long(prompts)

    def embedding_site(self, net: nn.Module) -> tuple[nn.Module, int]:
        """The time embedding; see `Teacher.embedding_site`."""
        return net.get_submodule("time_embedding"), self._width

    def output_layer(self, net: nn.Module) -> nn.Module:
        """The last convolution."""
        return net.get_submodule("conv_out")

    def config(self) -> dict[str, object]:
        """Arguments of the UNet, of the scheduler and of the autoencoder, and where the other parts lie."""
        parts = {
            "unet": self._arguments,
            "scheduler": self.process.config,
            "vae": self.vae_config,
            "home": str(self.home.relative_to(PACKAGE) if self.home.is_relative_to(PACKAGE) else self.home),
            "kind": self.kind,
            "card": self.card,
        }
        config: dict[str, object] = json.loads(json.dumps(parts))  # tuples become lists: what a file gives back
        return config

    def recipe(self) -> dict[str, object]:
        """The settings in the folder's ``recipe.json``, and its own ``prompts.txt``, if it has them; see
        `Teacher.recipe`."""
        prompts = self.home / PROMPTS
        own: dict[str, object] = {"prompts": str(prompts)} if prompts.is_file() else {}
        return own | read_recipe(self.home)

    def lora_targets(self) -> tuple[str, ...]:
        """Attention, feed-forward layers and convolutions."""
        return targets_of(self.net)

    def other_parts(self) -> Sequence[nn.Module]:
        """Text encoders and autoencoder, where they are loaded."""
        encoders = [] if self._text is None else [encoder for encoder, _ in self._text.pairs]
        return [*encoders, *([] if self._vae is None else [self._vae])]

    def feature_layers(self, net: nn.Module) -> Sequence[nn.Module]:
        """The last residual block of every resolution on the way down, and of the middle, where there is one."""
        blocks = [*net.get_submodule("down_blocks").children()]
        if net.mid_block is not None:  # small students of Stable Diffusion have none (BK-SDM-Tiny)
            blocks.append(net.get_submodule("mid_block"))
        return tuple(list(block.get_submodule("resnets").children())[-1] for block in blocks)

    def add_guidance_input(self, net: nn.Module, guidance_range: tuple[float, float]) -> None:
        """diffusers' ``time_cond_proj_dim``; see `GuidanceInput` and `Teacher.add_guidance_input`."""
        assert isinstance(net, UNet2DConditionModel)
        net.time_embedding.cond_proj = GuidanceInput(net.time_embedding.linear_1.in_features, guidance_range)
        net.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)

    def enable_gradient_checkpointing(self, net: nn.Module, function: Callable[..., Any] | None = None) -> None:
        """diffusers' own, block by block."""
        assert isinstance(net, UNet2DConditionModel)
        net.enable_gradient_checkpointing(function)

    def export_formats(self) -> Mapping[str, Exporter]:
        """``diffusers``: a `StableDiffusionPipeline` folder that samples in one step."""
        from bootcli_sd.export import write_diffusers

        check = Path(__file__).with_name("check_diffusers.py")
        return {"diffusers": Exporter(write_diffusers, check, takes_guidance=True)}

    def lora_formats(self) -> Mapping[str, LoraExporter]:
        """``lora``: one file for diffusers' `load_lora_weights`, ComfyUI and others, and a scheduler of one step."""
        from bootcli_sd.export import write_lora

        base: tuple[str, ...] = (str(self.home),)
        if self.kind:
            base = (*base, str(single_file.CONFIGS / single_file.model_of(self.kind)))
        return {"lora": LoraExporter(write_lora, Path(__file__).with_name("check_lora.py"), base)}

    def feature_space(self) -> FeatureSpace | None:
        """That of the folder's ``features``, if it has one for images of this size; see `Teacher.feature_space`."""
        folder = self.home / FEATURES
        if not folder.is_dir():
            return None
        _, height, width = self.spec.sample_shape
        space = load_feature_space(folder)
        return space if space.size == (self.pixels * height, self.pixels * width) else None

    def describe(self) -> dict[str, str]:
        """See `Teacher.describe`."""
        _, height, width = self.spec.sample_shape
        count = sum(parameter.numel() for parameter in self.net.parameters())
        facts = {
            **({"single file": self.kind} if self.kind else {}),
            "architecture": f"UNet2DConditionModel, {count / 1e6:.1f}M parameters",
            "schedule": self.process.summary,
            "guidance": "built into the student, or a range of w that it takes (--guidance-range)",
            "images": f"{height * self.pixels}x{width * self.pixels} pixels, from {height}x{width} latents",
        }
        return self.card | facts


class GuidanceInput(nn.Linear):
    """Where w enters the time embedding of a student's UNet, named ``cond_proj`` there: zero at first.

    Args:
        channels: of the time features that it is added to.
        limits: least and greatest w that the student is given.
    """

    def __init__(self, channels: int, limits: tuple[float, float]) -> None:
        super().__init__(GUIDANCE_WIDTH, channels, bias=False)
        nn.init.zeros_(self.weight)
        self.limits = limits


def embed_guidance(guidance: Tensor) -> Tensor:
    """Sines and cosines (b, `GUIDANCE_WIDTH`) of ``1000 (w - 1)`` for w (b,), at frequencies from 1 down to 1e-4.

    It is what diffusers' `StableDiffusionPipeline.get_guidance_scale_embedding` makes of w - 1, but on any device.
    """
    half = GUIDANCE_WIDTH // 2
    ladder = torch.arange(half, dtype=torch.float32, device=guidance.device)
    frequencies = torch.exp(ladder * -(torch.tensor(10000.0).log() / (half - 1)).item())
    angles = (1000 * (guidance.float() - 1))[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def load(path: Path) -> SDTeacher:
    """A teacher with its weights, in float32 and eval mode. Raises `BootError` for a broken folder or file."""
    if path.is_file():
        parts = read_single_file(path)
        process = read_process(parts.scheduler)
        teacher = SDTeacher(parts.unet, process, parts.vae_config, path.absolute(), {}, parts.kind)
        teacher.take(parts)
        return teacher
    layout = read_layout(path)
    process = read_process(layout.scheduler)
    net = _from_folder(UNet2DConditionModel, path / "unet")
    _check_network(net.config, layout)
    _update(net)
    return SDTeacher(net, process, layout.vae, path.absolute(), card_of(path))


def build(config: Mapping[str, Any]) -> SDTeacher:
    """The teacher of a stored `SDTeacher.config`, with random weights. Raises `BootError` for a damaged config."""
    try:
        process = process_of(dict(config["scheduler"]))
        net = UNet2DConditionModel(**config["unet"])
        home, kind = PACKAGE / Path(config["home"]), str(config["kind"])
        return SDTeacher(net, process, dict(config["vae"]), home, dict(config["card"]), kind)
    except BootError:
        raise
    except Exception as error:  # values of any kind come from the file, and diffusers checks few of them
        raise BootError(
            f"The stored teacher config is not valid ({type(error).__name__}: {error!s:.300}).",
            "The file was edited, or written by another version of bootcli.",
        ) from None


def _from_folder(kind: Any, folder: Path) -> Any:
    """A network of diffusers in float32, from safetensors if there are any, in full or half precision."""
    how = {"variant": variant_of(folder), "torch_dtype": torch.float32}
    try:
        with quietly():
            network, told = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **how)
    except Exception as error:  # whatever diffusers says of what is missing or broken
        raise BootError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error!s:.300}).", "Download the teacher again."
        ) from None
    check_whole(folder, told["missing_keys"])
    return network


def _update(net: UNet2DConditionModel) -> None:
    """Have a configuration of before diffusers 0.9 say what diffusers' pipelines read in it: they take a sample_size
    below 64 for a mistake of the scripts of that time, also where it is the one that a user chose."""
    version = str(net.config.get("_diffusers_version", diffusers.__version__))
    side = net.config.sample_size
    if [int(part) for part in re.findall(r"\d+", version)[:2]] < [0, 9]:
        net.register_to_config(sample_size=max(side, 64) if isinstance(side, int) else side)
        net.register_to_config(_diffusers_version=diffusers.__version__)


def _check_network(config: Any, layout: Layout) -> None:
    """Raise `BootError` for a network that wants more than text."""
    if config.in_channels != config.out_channels:
        raise BootError(
            f"The network reads {config.in_channels} channels and predicts {config.out_channels}.",
            "It is no text-to-image model on its own (inpainting or depth, perhaps).",
        )
    if config.in_channels != layout.vae.get("latent_channels", 4):
        latents = layout.vae.get("latent_channels")
        raise BootError(
            f"The network draws {config.in_channels} channels, its autoencoder knows {latents}.",
            "unet/ and vae/ come from different models.",
        )
    if config.time_cond_proj_dim is not None:
        raise BootError(
            "The network takes the guidance scale as an input: it is a student itself (a latent consistency model).",
            "Distil the model that it was made from.",
        )
    wanted = 2 if config.addition_embed_type == "text_time" else 1 if config.addition_embed_type is None else 0
    more = config.class_embed_type or config.num_class_embeds or config.encoder_hid_dim
    if wanted != len(layout.encoders) or more:
        raise BootError(
            "The network is conditioned on more than text.", "The sd family runs Stable Diffusion 1.x, 2.x and XL."
        )
