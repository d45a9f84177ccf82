"""Where the parts of a Stable Diffusion folder are. Reads small JSON files only, and imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bootcli_diffusers.files import read_json

from bootcli.plugin import BootError

NETWORK, AUTOENCODER = "UNet2DConditionModel", "AutoencoderKL"
PIPELINES = frozenset({"StableDiffusionPipeline", "StableDiffusionXLPipeline"})
_INDEX, _WEIGHTS = "model_index.json", frozenset({".safetensors", ".bin"})
_IGNORED = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
_PARTS = frozenset({"unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"})


@dataclass(frozen=True)
class Layout:
    """One folder, taken apart.

    Args:
        folder: of the pipeline.
        unet, vae, scheduler: the configurations of these parts.
        encoders: the folders of the text encoders, each with that of its tokenizer.
        zero_negative: whether no prompt is an embedding of zeros instead of that of an empty text (SDXL).
    """

    folder: Path
    unet: dict[str, object]
    vae: dict[str, object]
    scheduler: dict[str, object]
    encoders: tuple[tuple[Path, Path], ...]
    zero_negative: bool


def matches(path: Path) -> bool:
    """Whether a folder is a pipeline around a `UNet2DConditionModel` that makes images from text. Never raises."""
    try:
        index = path / _INDEX
        return index.is_file() and str(read_json(index).get("_class_name")) in PIPELINES
    except (BootError, OSError, ValueError):
        return False


def variant_of(folder: Path) -> str | None:
    """What diffusers and transformers call the weights of a part: "fp16" where there are no others."""
    weights = [file.name for file in folder.glob("*") if file.suffix in _WEIGHTS]
    return "fp16" if weights and all(".fp16" in name for name in weights) else None


def has_weights(path: Path) -> bool:
    """Whether every part that needs weights has a file of some."""
    try:
        named = read_json(path / _INDEX)
    except BootError:
        return False
    wanted = [part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if _is_there(named.get(part))]
    return all(any(file.suffix in _WEIGHTS for file in (path / part).glob("*")) for part in wanted)


def _is_there(entry: object) -> bool:
    return isinstance(entry, list) and bool(entry) and entry[-1] is not None


def read_layout(path: Path) -> Layout:
    """The parts of a folder. Raises `BootError` for one that is no such pipeline."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise BootError(f"{path} {what}; a Stable Diffusion teacher is a folder.", "Give the folder with the parts.")
    index = read_json(path / _INDEX)
    parts = {name: entry for name, entry in index.items() if _is_there(entry)}
    if extra := sorted(parts.keys() - _PARTS - _IGNORED):
        raise BootError(
            f"{path / _INDEX} names parts that the sd family does not run: {', '.join(extra)}.",
            "It runs pipelines of a text encoder, a UNet2DConditionModel and an AutoencoderKL.",
        )
    pairs = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
    encoders = tuple((path / encoder, path / tokenizer) for encoder, tokenizer in pairs if encoder in parts)
    if not encoders:
        raise BootError(f"{path / _INDEX} names no text encoder.", "The sd family runs text-to-image models.")
    if missing := [folder.name for pair in encoders for folder in pair if not folder.is_dir()]:
        raise BootError(f"{path} lacks {', '.join(missing)}.", "Download the teacher again, as a whole.")
    vae = read_json(path / "vae" / "config.json")
    if vae.get("_class_name") != AUTOENCODER:
        raise BootError(
            f"{path / 'vae'} holds an autoencoder of class {vae.get('_class_name')!r}, not {AUTOENCODER}.",
            "The sd family runs Stable Diffusion 1.x, 2.x and XL.",
        )
    unet = read_json(path / "unet" / "config.json")
    if unet.get("_class_name") != NETWORK:
        raise BootError(
            f"{path / 'unet'} holds a network of class {unet.get('_class_name')!r}, not {NETWORK}.",
            "The sd family never runs code that comes with a model.",
        )
    if not has_weights(path):
        raise BootError(f"{path} lacks the weights of some of its parts.", "Download the teacher again, as a whole.")
    return Layout(
        path,
        unet,
        vae,
        read_json(path / "scheduler" / "scheduler_config.json"),
        encoders,
        bool(index.get("force_zeros_for_empty_prompt", "text_encoder_2" in parts)),
    )
