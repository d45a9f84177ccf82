"""Features of image sets in a named feature space and Frechet distances between them, as clean-fid computes them.

| code | paper (Heusel et al. 2017, arXiv 1706.08500) | shape |
|---|---|---|
| mean, cov | m, C of the features of an image set | (d,), (d, d) |
| frechet | d^2((m, C), (m_w, C_w)) | scalar |

A distance has a meaning only within one feature space, so every statistic carries the name of its own. Resizing is part
of the space: `inception-clean` resizes as clean-fid recommends (Parmar et al. 2022, arXiv 2104.11222) and
`inception-legacy` inside the network, as the first TensorFlow code and most published reference files do.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from cleanfid import downloads_helper, fid
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from platformdirs import user_cache_path
from torch import Tensor, nn

from bootcli.errors import BootError
from bootcli.images import is_grid
from bootcli.store.files import atomic_folder

Array = npt.NDArray[np.float64]

INCEPTION = ("inception-clean", "inception-legacy")
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm", ".tif", ".tiff"})
FOLDER_BATCH = 250


class _Linalg:
    """`scipy.linalg` as clean-fid knows it: SciPy 1.18 removed the ``disp`` argument of ``sqrtm``."""

    @staticmethod
    def sqrtm(matrix: Array, disp: bool = True) -> Any:
        """The square root of a product of two covariances; with ``disp=False`` also its relative squared error.

        The exact root is real. Where a covariance is singular, SciPy returns rounding errors as imaginary parts, which
        clean-fid compares to an absolute bound and so refuses for features of large scale: they are dropped here when
        small beside the root itself.
        """
        with warnings.catch_warnings(action="ignore", category=scipy.linalg.LinAlgWarning):
            root = scipy.linalg.sqrtm(matrix)
        if np.iscomplexobj(root) and np.abs(root.imag).max() <= 1e-3 * np.abs(root.real).max():
            root = root.real
        if disp:
            return root
        return root, np.linalg.norm(root @ root - matrix) ** 2 / max(float(np.linalg.norm(matrix)), 1e-300)


fid.linalg = _Linalg  # clean-fid's own namespace only; SciPy itself stays as it is


@dataclass(frozen=True)
class Statistics:
    """The Gaussian fit to the features of an image set.

    Args:
        mean: (d,) float64.
        cov: (d, d) float64.
        num_images: how many images; None where a foreign file does not say.
    """

    mean: Array
    cov: Array
    num_images: int | None


class Inception(nn.Module):
    """Inception V3 features as clean-fid extracts them, d = 2048.

    Args:
        feature_space: one of `INCEPTION`.
    """

    def __init__(self, feature_space: str) -> None:
        super().__init__()
        path = inception_file()
        legacy = feature_space == "inception-legacy"
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch.jit is on its way out
                self.network = InceptionV3W(str(path.parent), download=False, resize_inside=legacy).eval()
        except (RuntimeError, AttributeError) as error:
            raise BootError(f"{path} is damaged.", "Delete it, so that it is fetched again.") from error
        self.resize = build_resizer("legacy_tensorflow" if legacy else "clean")

    def forward(self, images: Tensor) -> Tensor:
        """Features (b, 2048) of float images (b, 1 or 3, h, w) in [0, 255]; grey ones count as equal r, g and b."""
        chunks = torch.split(images.expand(-1, 3, -1, -1), 50)  # 50 images at 299x299 are 54 MB
        return torch.cat([self.network(self._resized(chunk)) for chunk in chunks])

    def _resized(self, images: Tensor) -> Tensor:
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        resized = np.stack([self.resize(array) for array in arrays])
        return torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous().to(images.device)


def inception_file() -> Path:
    """The TorchScript file of Inception in bootcli's cache, fetched by clean-fid if it is not there.

    Raises `BootError` without a network.
    """
    path = user_cache_path("bootcli") / "inception" / Path(downloads_helper.inception_url).name
    if not path.is_file():
        try:
            with atomic_folder(path.parent) as folder:
                downloads_helper.check_download_inception(str(folder))
        except (OSError, HTTPException) as error:
            raise BootError(
                f"Inception's weights are not in {path} and cannot be fetched: {error}.",
                f"Without a network, put the file of {downloads_helper.inception_url} there.",
            ) from error
    return path


def features_of(batches: Iterable[Tensor], network: nn.Module, device: torch.device) -> Tensor:
    """The features (n, d) of n images, on the CPU, in the precision of the network.

    Args:
        batches: uint8 images (b, c, h, w).
        network: float images in [0, 255] -> (b, d) features, on ``device``.
        device: where to compute.

    Raises `BootError` for features that are not finite.
    """
    rows = [fid.get_batch_features(batch.float(), network, device) for batch in batches]
    features = torch.from_numpy(np.concatenate(rows))
    if not features.isfinite().all():
        raise BootError("The feature network returned values that are not finite.", "Look at some of the images.")
    return features


def gaussian_fit(features: Tensor) -> Statistics:
    """Mean and covariance of at least two features, shape (n, d), in float64."""
    rows = features.double().numpy()
    return Statistics(rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False)), len(rows))


def statistics_of(batches: Iterable[Tensor], network: nn.Module, device: torch.device) -> Statistics:
    """`gaussian_fit` of `features_of` at least two images."""
    return gaussian_fit(features_of(batches, network, device))


def frechet(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), by clean-fid. Raises `BootError` where it has no value."""
    if a.mean.shape != b.mean.shape:
        raise BootError(f"Features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared.")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # clean-fid and old SciPy print warnings; stdout is for results
            return float(fid.frechet_distance(a.mean, a.cov, b.mean, b.cov))
    except (ValueError, np.linalg.LinAlgError) as error:
        raise BootError(f"The Frechet distance cannot be computed: {error}.", "Use more images.") from error


def folder_images(folder: Path, shape: torch.Size | None = None) -> Iterator[Tensor]:
    """The images of a folder and the folders in it, by path, as uint8 batches (b, c, h, w) of one size each.

    Args:
        folder: where to look; what is not an image is passed over, and so are the grids of `bootcli sample`.
        shape: (1 or 3, h, w) that every image must have; None takes any size, as RGB.

    Raises `BootError` for a folder with fewer than two images, a broken image or one of another size.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    files = [path for path in found if not is_grid(path)]
    if len(files) < 2:
        raise BootError(f"{folder} holds {len(files)} images; statistics need more.", "Name a folder of image files.")
    dataset = fid.ResizeDataset(files, mode="legacy_tensorflow")  # the mode that leaves the size alone
    images = (_read_image(dataset, i, shape) for i in range(len(files)))
    for _, same_size in itertools.groupby(images, key=lambda image: image.shape):
        while batch := list(itertools.islice(same_size, FOLDER_BATCH)):
            yield torch.stack(batch)


def _read_image(dataset: Any, i: int, shape: torch.Size | None) -> Tensor:
    path = dataset.files[i]
    try:
        image: Tensor = dataset[i].round().to(torch.uint8)
    except Exception as error:  # decoders raise whatever they like
        raise BootError(f"{path} cannot be read as an image: {error}.", "Replace or remove it.") from error
    if shape is None:
        return image
    if image.shape[1:] != shape[1:]:
        size, wanted = (f"{s[2]}x{s[1]}" for s in (image.shape, shape))
        raise BootError(f"{path} is {size}, the teacher's images are {wanted}.", "Resize the reference images first.")
    if shape[0] == 1 and not (image == image[:1]).all():
        raise BootError(f"{path} is in colour, the teacher's images are grey.", "Convert the reference images first.")
    return image[: shape[0]]
