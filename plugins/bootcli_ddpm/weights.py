"""Weights from files to a network, without ever unpickling an object."""

from __future__ import annotations

import re
from pathlib import Path

from bootcli_diffusers.files import read_json
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bootcli.plugin import BootError, misfit, read_archive

_STEM = "diffusion_pytorch_model"
_FILES = (
    f"{_STEM}.safetensors",
    f"{_STEM}.safetensors.index.json",
    f"{_STEM}.bin",
    f"{_STEM}.bin.index.json",
    f"{_STEM}.fp16.safetensors",
)
_AGAIN = "The file may be cut short or a git-lfs pointer: download it again."

# diffusers renamed the projections of its attention blocks in version 0.14; the published DDPM weights are older.
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")
_NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a network's folder, by their present names; safetensors are preferred.

    Raises `BootError` for missing or damaged files, and for a pickle that holds anything but tensors.
    """
    source = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if source is None:
        raise BootError(f"{folder} holds no weights.", f"Looked for {', '.join(_FILES)}.")
    files = _shards(source) if source.suffix == ".json" else [source]
    tensors = {name: tensor for file in files for name, tensor in _read_tensors(file).items()}
    return {_OLD_ATTENTION.sub(lambda m: m[1] + _NEW_NAMES[m[2]], name): tensor for name, tensor in tensors.items()}


def fit_weights(net: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill ``net``. Raises `BootError` unless names and shapes are exactly the network's."""
    if problem := misfit(net.state_dict(), tensors):
        raise BootError(
            f"The weights in {folder} do not fit its config.json: tensors {problem}.",
            "Weights and config.json come from different models, or one of them was edited.",
        )
    net.load_state_dict(tensors)


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    shards = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    # A shard is a neighbour of its index: a name such as ../../x must not lead out of the folder.
    if not shards or any(Path(name).name != name for name in shards):
        raise BootError(f"{index} does not list weight files beside it.", "Download the folder again.")
    return [index.parent / name for name in shards]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise BootError(f"{file} is missing.", "Its index names it: download the folder again.")
    return _read_safetensors(file) if file.suffix == ".safetensors" else read_archive(file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise BootError(f"{file} is not a readable safetensors file: {error}", _AGAIN) from None
