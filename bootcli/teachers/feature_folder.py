"""A feature space in a folder, for a Frechet distance that needs no download.

A folder holds `config.json` (architecture, name, test accuracy, floor), `model.safetensors` (weights),
`reference.safetensors` (feature mean and covariance of the training images) and perhaps `manifold.safetensors` (the
features of some of them, one by one, for precision and recall). Or its `config.json` says ``{"same_as": NAME}``: one of
those that come with bootcli. `fashion-cnn-64` is a small classifier of Fashion-MNIST at 16x16, `fashion-colour-cnn-64`
one of its coloured pieces at 32x32 (`examples/captioned_fashion.py`); their distances are on scales of their own and
are not comparable to Inception's FID.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bootcli.errors import BootError
from bootcli.teachers.protocol import FeatureSpace

SHIPPED = Path(__file__).with_name("features")
"""The feature spaces that come with bootcli, each in a folder of its name."""
CONFIG, WEIGHTS, REFERENCE = "config.json", "model.safetensors", "reference.safetensors"
MANIFOLD = "manifold.safetensors"


class FeatureNetwork(nn.Module):
    """Three conv-relu-pool stages and a linear embedding, read before its activation.

    The embedding is taken before the relu because there it is dense and closer to the Gaussian that the Frechet
    distance assumes; relu outputs would be sparse, with a nearly singular covariance.

    Args:
        channels: output channels of the three convolutions.
        features: width of the embedding.
        classes: number of classes of the training labels.
        size: side of the square input images, in pixels.
        colours: channels of the input images.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 64),
        features: int = 64,
        classes: int = 10,
        size: int = 16,
        colours: int = 1,
    ) -> None:
        super().__init__()
        self.size = size
        widths = (colours, *channels)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.dropout = nn.Dropout(0.3)
        self.embed = nn.Linear(channels[-1] * (size >> len(channels)) ** 2, features)
        self.classify = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features (b, features) of float images (b, colours, size, size), levels 0..255 (clean-fid's convention)."""
        x = images / 127.5 - 1
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        features: Tensor = self.embed(self.dropout(x.flatten(1)))
        return features

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (b, classes) of float images (b, colours, size, size) with levels in [0, 255]."""
        return self.classes_of(self(images))

    def classes_of(self, features: Tensor) -> Tensor:
        """Class logits (b, classes) of features (b, features)."""
        logits: Tensor = self.classify(self.dropout(F.relu(features)))
        return logits


def sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_feature_network(folder: Path) -> FeatureNetwork:
    """Load the network of `folder` in float32, in eval mode and with frozen weights.

    Raises:
        ValueError: the weights are not the ones that `config.json` was written for.
    """
    config = json.loads((folder / CONFIG).read_text())
    if sha256(folder / WEIGHTS) != config["sha256"]:
        raise ValueError(f"{folder / WEIGHTS} does not match the sha256 in {CONFIG}: the folder is damaged or mixed")
    network = FeatureNetwork(**config["architecture"])
    network.load_state_dict(load_file(folder / WEIGHTS))
    return network.eval().requires_grad_(False)


def load_reference(folder: Path) -> tuple[Tensor, Tensor]:
    """Load the reference statistics of `folder`: float64 mean (features,) and covariance (features, features)."""
    tensors = load_file(folder / REFERENCE)
    return tensors["mean"].to(torch.float64), tensors["cov"].to(torch.float64)


def save_manifold(folder: Path, features: Tensor) -> None:
    """Keep features (n, d) of single reference images in float16, bound to the network of `folder` by its digest."""
    save_file({"features": features.half().contiguous()}, folder / MANIFOLD, {"network": sha256(folder / WEIGHTS)})


def load_manifold(folder: Path) -> Tensor | None:
    """Load what `save_manifold` wrote: features (n, d) in float16; None if the folder has none.

    Raises:
        ValueError: the features are those of another network.
    """
    if not (folder / MANIFOLD).is_file():
        return None
    with safe_open(folder / MANIFOLD, framework="pt") as file:
        if (file.metadata() or {}).get("network") != sha256(folder / WEIGHTS):
            raise ValueError(f"{folder / MANIFOLD} holds features of another network than {WEIGHTS}")
        features: Tensor = file.get_tensor("features")
    return features


def load_feature_space(folder: Path) -> FeatureSpace:
    """The feature network of ``folder`` with its reference statistics. Raises `BootError` for a damaged folder."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if "same_as" in config:
            folder = SHIPPED / Path(config["same_as"]).name
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
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
            classes_of=network.classes_of,
            words=tuple(str(word) for word in config.get("words", ())),
            size=(network.size, network.size),
        )
    except (OSError, SafetensorError, RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BootError(
            f"The feature network in {folder} is damaged ({type(error).__name__}: {error}).",
            "Install bootcli again, or download the teacher again.",
        ) from None
