"""A teacher's ``features`` folder as a `FeatureSpace`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bootcli.plugin import BootError, FeatureSpace
from bootcli_ddpm.features import CONFIG, load_feature_network, load_manifold, load_reference
from bootcli_ddpm.layout import read_json


def load_feature_space(folder: Path) -> FeatureSpace:
    """The feature network of ``folder`` with its reference statistics. Raises `BootError` for a damaged folder."""
    config: dict[str, Any] = read_json(folder / CONFIG)
    try:
        network = load_feature_network(folder)
        mean, cov = load_reference(folder)
        count = int(config["reference_images"])
        return FeatureSpace(
            name=str(config["name"]),
            network=network,
            mean=mean,
            cov=cov,
            num_images=count,
            source=str(config.get("source", f"{count:,} training images of the teacher")),
            floor={int(images): float(distance) for images, distance in config.get("floor", {}).items()},
            features=load_manifold(folder),
        )
    except (OSError, SafetensorError, RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BootError(
            f"The feature network in {folder} is damaged ({type(error).__name__}: {error}).",
            "Install bootcli again, or download the teacher again.",
        ) from None
