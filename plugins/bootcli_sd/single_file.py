"""One file in the layout of the original latent diffusion code, as communities share fine-tunes: read by diffusers.

diffusers would fetch the configurations of the parts, and the tokenizer, from the hub; here they come with the plugin
and with open_clip, so that a file is read without a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootcli.plugin import BootError

CONFIGS = Path(__file__).with_name("configs")
ENDINGS = (".safetensors", ".ckpt")
_UNET = "model.diffusion_model."
_V2 = f"{_UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
_FIRST = f"{_UNET}input_blocks.0.0.weight"
_PADS = {"sd1": ("<|endoftext|>",), "sd2-base": ("!",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}
"""What fills up the prompts of each tokenizer."""


def names_in(path: Path) -> Mapping[str, list[int]]:
    """Names and shapes of the tensors in a .safetensors file, without torch. Raises `ValueError` for another file."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= 2**26:
            raise ValueError("no header")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("no header")
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def matches(path: Path) -> bool:
    """Whether a file holds a latent diffusion model. Never raises."""
    try:
        return path.is_file() and path.suffix == ".safetensors" and _FIRST in names_in(path)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


@dataclass(frozen=True)
class Parts:
    """Everything in a file.

    Args:
        kind: one of `CONFIGS`.
        unet, vae: networks of diffusers.
        pairs: text encoders, each with its tokenizer.
        scheduler, vae_config: configurations.
    """

    kind: str
    unet: Any
    vae: Any
    pairs: list[tuple[Any, Any]]
    scheduler: dict[str, object]
    vae_config: dict[str, object]


def read_single_file(path: Path, kind: str | None = None) -> Parts:
    """All parts of a file, in float32. Raises `BootError` for a broken file or another model.

    Args:
        path: .safetensors, or .ckpt, of which only tensors are read.
        kind: which model; None: what its tensors say. Whether a Stable Diffusion 2 predicts v they do not say: those of
            768 pixels do, and a name that ends in "-base" or says 512 is taken for the other.
    """
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    try:
        if kind is None:
            checkpoint = load_single_file_checkpoint(str(path), local_files_only=True)
            kind = kind_of({name: list(tensor.shape) for name, tensor in checkpoint.items()}, path.stem)
        words = {f"tokenizer{place}": tokenizer(pad) for place, pad in zip(("", "_2"), _PADS[kind], strict=False)}
        pipeline = (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline).from_single_file(
            str(path), config=str(CONFIGS / kind), local_files_only=True, torch_dtype=torch.float32, **words
        )
    except BootError:
        raise
    except Exception as error:  # whatever diffusers says of what is missing or broken
        raise BootError(
            f"{path} cannot be loaded ({type(error).__name__}: {error!s:.300}).", "Download the teacher again."
        ) from None
    parts = pipeline.components
    pairs = [(parts[f"text_encoder{place}"], words[f"tokenizer{place}"]) for place in ("", "_2")[: len(words)]]
    for network in (parts["vae"], *(encoder for encoder, _ in pairs)):
        network.eval().requires_grad_(False)
    scheduler = json.loads((CONFIGS / kind / "scheduler" / "scheduler_config.json").read_text())
    vae = json.loads((CONFIGS / kind / "vae" / "config.json").read_text())
    return Parts(kind, parts["unet"], parts["vae"], pairs, scheduler, vae)


def kind_of(shapes: Mapping[str, list[int]], name: str) -> str:
    """Which model tensors of these shapes are. Raises `BootError` for one that the family does not run."""
    first = shapes.get(_FIRST)
    if first is None or first[1] != 4:
        inputs = "no UNet of latent diffusion" if first is None else f"a UNet that reads {first[1]} channels"
        raise BootError(f"{name} holds {inputs}.", "The sd family runs text-to-image models of four latent channels.")
    if _XL in shapes:
        return "sdxl"
    if shapes.get(_V2, [0])[-1] == 1024:
        return "sd2-base" if name.endswith("-base") or "512" in name else "sd2"
    return "sd1"


def tokenizer(pad: str) -> Any:
    """CLIP's tokenizer from the word list that comes with open_clip, filled up with ``pad``."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    words = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {renamed.get(word, word): place for word, place in words.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(words.bpe_ranks), pad_token=pad, model_max_length=77)
