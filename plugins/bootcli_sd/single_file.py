"""One file in the layout of the original latent diffusion code, as communities share fine-tunes: read by diffusers.

diffusers would fetch the configurations of the parts, and the tokenizer, from the hub; here they come with the plugin
and with open_clip, so that a file is read without a network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootcli.plugin import BootError

CONFIGS = Path(__file__).with_name("configs")
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_ATTENTION = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
_FIRST, _LABELS = f"{_UNET}input_blocks.0.0.weight", f"{_UNET}label_emb.0.0.weight"
_TELLTALE = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD_OF_V = 0.09
"""Standard deviation of that bias above which a Stable Diffusion 2 predicts v; the border that ComfyUI goes by."""
WIDTHS = {"sd1": 768, "sd2": 1024}
"""Of the text that the network attends to."""
_PADS = {"sd1": ("<|endoftext|>",), "sd2-base": ("!",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}
"""What fills up the prompts of each tokenizer."""
_PREDICTS = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v"}
"""What the networks of an architecture in the metadata predict."""


def header_of(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes of the tensors in a .safetensors file by name, and its metadata; without torch.

    Raises `ValueError` for another file.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= 2**26:
            raise ValueError("no header")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("no header")
    metadata = header.pop("__metadata__", {})
    return {name: entry["shape"] for name, entry in header.items()}, metadata if isinstance(metadata, dict) else {}


def digest_of(path: Path, kind: str) -> str:
    """A hash of the text encoders in a file, as they are stored; of all of a file that is no .safetensors."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    with path.open("rb") as stream:
        if path.suffix != ".safetensors":
            return digest.hexdigest() + hashlib.file_digest(stream, "blake2b").hexdigest()
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, entry in sorted(header.items()):
            if name != "__metadata__" and not name.startswith((_UNET, _VAE)):
                start, end = entry["data_offsets"]
                stream.seek(8 + length + start)
                digest.update(f"{name} {entry['dtype']} {entry['shape']}".encode() + stream.read(end - start))
    return digest.hexdigest()


def matches(path: Path) -> bool:
    """Whether a file holds a latent diffusion model. Never raises."""
    try:
        return path.is_file() and path.suffix == ".safetensors" and _FIRST in header_of(path)[0]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


@dataclass(frozen=True)
class Parts:
    """What is in a file.

    Args:
        kind: a folder of `CONFIGS`, with ":v" behind it where the network predicts v, and ":zero" where its noise
            schedule ends in pure noise.
        unet: the network; None where it was not asked for.
        vae: the autoencoder.
        pairs: text encoders, each with its tokenizer.
        scheduler, vae_config: configurations.
    """

    kind: str
    unet: Any
    vae: Any
    pairs: list[tuple[Any, Any]]
    scheduler: dict[str, object]
    vae_config: dict[str, object]


def read_single_file(path: Path, kind: str = "", *, with_unet: bool = True) -> Parts:
    """The parts of a file, in float32. Raises `BootError` for a broken file or another model.

    Args:
        path: .safetensors, or .ckpt, of which only tensors are read.
        kind: see `Parts`; empty: what its tensors say.
        with_unet: whether the network is wanted.
    """
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from bootcli_sd.loading import INCOMPLETE, check_whole, quietly

    try:
        kind = kind or kind_of(*_looked_at(path), path.name)
        model, *marks = kind.split(":")
        given: dict[str, Any] = {} if with_unet else {"unet": None}
        for place, pad in zip(("", "_2"), _PADS[model], strict=False):
            given[f"tokenizer{place}"] = tokenizer(pad)
        with quietly(), torch.serialization.safe_globals([(_Inert, _LIGHTNING)]):
            pipeline = (StableDiffusionXLPipeline if model == "sdxl" else StableDiffusionPipeline).from_single_file(
                str(path), config=str(CONFIGS / model), local_files_only=True, torch_dtype=torch.float32, **given
            )
    except BootError:
        raise
    except NotImplementedError:  # of tensors that were given no numbers, in the network or in the autoencoder
        raise BootError(f"{path} lacks some of the tensors that its model has.", INCOMPLETE) from None
    except Exception as error:  # whatever diffusers says of what is missing or broken
        raise BootError(
            f"{path} cannot be loaded ({type(error).__name__}: {error!s:.300}).",
            "It is damaged, another model than it seems, or holds more than tensors, none of which was executed.",
        ) from None
    parts = pipeline.components
    networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    tensors = {f"{name}.{each}": tensor for name, part in networks.items() for each, tensor in part.named_parameters()}
    check_whole(path, [name for name, tensor in tensors.items() if tensor.is_meta])
    places = ("", "_2")[: len(_PADS[model])]
    pairs = [(parts[f"text_encoder{place}"], given[f"tokenizer{place}"]) for place in places]
    for network in (parts["vae"], *(encoder for encoder, _ in pairs)):
        network.eval().requires_grad_(False)
    scheduler = json.loads((CONFIGS / model / "scheduler" / "scheduler_config.json").read_text())
    scheduler |= {"prediction_type": "v_prediction"} if "v" in marks else {}
    scheduler |= {"rescale_betas_zero_snr": True} if "zero" in marks else {}
    vae = json.loads((CONFIGS / model / "vae" / "config.json").read_text())
    return Parts(kind, parts["unet"], parts["vae"], pairs, scheduler, vae)


class _Inert:
    """Stands for a class that older .ckpt files name beside their tensors, which need it for nothing."""


_LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def model_of(kind: str) -> str:
    """The folder of `CONFIGS` that a kind names."""
    return kind.partition(":")[0]


def _looked_at(path: Path) -> tuple[dict[str, list[int]], dict[str, str], float]:
    """Shapes by name, metadata, and the standard deviation of `_TELLTALE`, which is 0 where there is none."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        shapes, metadata = header_of(path)
        with safe_open(path, "pt") as file:
            telltale = file.get_tensor(_TELLTALE) if _TELLTALE in shapes else None
    else:
        import torch
        from diffusers.loaders.single_file_utils import load_single_file_checkpoint

        with torch.serialization.safe_globals([(_Inert, _LIGHTNING)]):
            checkpoint = load_single_file_checkpoint(str(path), local_files_only=True)
        shapes = {name: list(tensor.shape) for name, tensor in checkpoint.items()}
        metadata, telltale = {}, checkpoint.get(_TELLTALE)
    return shapes, metadata, 0.0 if telltale is None else float(telltale.double().std(unbiased=False))


def kind_of(shapes: Mapping[str, list[int]], metadata: Mapping[str, str], spread: float, name: str) -> str:
    """Which model tensors of these shapes are; see `Parts`. Raises `BootError` for one that the family does not run.

    What a network predicts its weights hardly show. Some files say it: in an empty tensor ``v_pred`` (and ``ztsnr``),
    or in their metadata, as kohya's scripts (``prediction_type``, ``architecture``) or ComfyUI (``predict_key``) write
    them. Of the others, a Stable Diffusion 2 predicts v, and draws 768 pixels, where the ``spread`` of one bias is
    that of those which do.
    """
    first = shapes.get(_FIRST)
    if first is None or first[1] != 4:
        inputs = "no UNet of latent diffusion" if first is None else f"a UNet that reads {first[1]} channels"
        raise BootError(f"{name} holds {inputs}.", "The sd family runs text-to-image models of four latent channels.")
    if any(each.startswith("edm_") for each in shapes):
        raise BootError(
            f"{name} is a model of EDM's kind (CosXL, Playground 2.5), noised in another way than Stable Diffusion.",
            "The sd family runs SD 1.x, 2.x and XL.",
        )
    built = _PREDICTS.get(metadata.get("modelspec.architecture", ""), "")
    said = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or built
    says_v = "v_pred" in shapes or said.startswith("v")
    marks = (":v" if says_v else "") + (":zero" if "ztsnr" in shapes else "")
    if _XL in shapes:
        return f"sdxl{marks}"
    width = shapes.get(_ATTENTION, [0])[-1]
    if width == WIDTHS["sd2"]:
        if _LABELS in shapes:
            raise BootError(
                f"{name} is conditioned on more than text (an unCLIP model, on images).",
                "The sd family runs text-to-image models.",
            )
        v = says_v or (not said and spread > _SPREAD_OF_V)
        return f"sd2{marks.replace(':v', '')}" if v else "sd2-base"
    if width == WIDTHS["sd1"]:
        return f"sd1{marks}"
    raise BootError(
        f"{name} holds a UNet that attends to texts of width {width}.", "The sd family runs SD 1.x, 2.x and XL."
    )


def tokenizer(pad: str) -> Any:
    """CLIP's tokenizer from the word list that comes with open_clip, filled up with ``pad``.

    Where that is "!", as of SD 2 and of SDXL's second encoder, transformers reads a "!" in a prompt as padding, which
    CLIP itself does not; so do the published folders of these models.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    words = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {renamed.get(word, word): place for word, place in words.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(words.bpe_ranks), pad_token=pad, model_max_length=77)
