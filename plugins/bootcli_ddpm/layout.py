"""Where the parts of a diffusers folder are. Reads small JSON files only, and imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bootcli_diffusers.files import read_json

from bootcli.plugin import BootError

NETWORK = "UNet2DModel"
_INDEX = "model_index.json"
_PARTS = {"unet", "scheduler"}


@dataclass(frozen=True)
class Layout:
    """One folder, taken apart.

    Args:
        unet: the folder that holds the network's weights.
        network: the network's config.json.
        scheduler: scheduler_config.json.
    """

    unet: Path
    network: dict[str, object]
    scheduler: dict[str, object]


def matches(path: Path) -> bool:
    """Whether a folder is laid out as a diffusers pipeline or network around a `UNet2DModel`. Never raises."""
    try:
        if (path / _INDEX).is_file():
            return _class_in_index(read_json(path / _INDEX).get("unet")) == NETWORK
        return any(
            read_json(config).get("_class_name") == NETWORK
            for config in (path / "unet" / "config.json", path / "config.json")
            if config.is_file()
        )
    except (BootError, OSError, ValueError):
        return False


def read_layout(path: Path) -> Layout:
    """Both layouts: parts in sub-folders, or side by side as in google/ddpm-cifar10-32.

    Raises `BootError` for a path that is no such folder, or one with parts that this family does not run.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise BootError(f"{path} {what}; a DDPM teacher is a folder.", "Give the folder with the configs.")
    if (path / _INDEX).is_file():
        _check_parts(path / _INDEX)
    unet = path / "unet" if (path / "unet").is_dir() else path
    scheduler = path / "scheduler" if (path / "scheduler").is_dir() else path
    network = read_json(unet / "config.json")
    if network.get("_class_name") != NETWORK:
        raise BootError(
            f"{unet / 'config.json'} describes a network of class {network.get('_class_name')!r}, not {NETWORK}.",
            "The ddpm family reads UNet2DModel; see `bootcli teachers` for other families.",
        )
    return Layout(unet, network, read_json(scheduler / "scheduler_config.json"))


def _check_parts(index: Path) -> None:
    parts = {name: _class_in_index(entry) for name, entry in read_json(index).items() if not name.startswith("_")}
    extra = sorted(f"{name} ({kind})" for name, kind in parts.items() if kind and name not in _PARTS)
    if extra:
        raise BootError(
            f"{index} names parts beside a network and a scheduler: {', '.join(extra)}.",
            "The ddpm family reads models that make pixels directly, without an autoencoder or a text encoder.",
        )
    if parts.get("unet") not in (NETWORK, None):
        raise BootError(
            f"{index} names a network of class {parts['unet']!r}, not {NETWORK}.",
            "The ddpm family reads UNet2DModel, and never runs code that comes with a model.",
        )


def _class_in_index(entry: object) -> str | None:
    """The class in an entry such as ``["diffusers", "UNet2DModel"]``; None for a part that is absent."""
    if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
        return str(entry[1]) if entry[0] == "diffusers" else f"{entry[0]}.{entry[1]}"
    return None
