"""Frechet distances between image sets, computed by clean-fid in a named feature space.

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
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from cleanfid import downloads_helper, fid
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from PIL import Image
from platformdirs import user_cache_path
from torch import Tensor, nn

from bootcli.errors import BootError, UsageError
from bootcli.store.files import atomic_folder
from bootcli.store.tensors import read_tensors, write_tensors
from bootcli.teachers.protocol import Teacher

Array = npt.NDArray[np.float64]

INCEPTION = ("inception-clean", "inception-legacy")
FORMS = (
    f"A reference is a folder of images or a .safetensors file, in the teacher's own features; or, with "
    f"{' or '.join(f'{name}:' for name in INCEPTION)} before it, a folder or .npz file (mu, sigma) in Inception's."
)
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", getattr(scipy.linalg, "LinAlgWarning", RuntimeWarning))
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

    @property
    def is_singular(self) -> bool:
        """Whether there were too few images for a covariance of full rank."""
        return self.num_images is not None and self.num_images <= len(self.mean)


@dataclass(frozen=True)
class Reference:
    """What image sets are compared with, and in which feature space.

    Args:
        feature_space: printed beside every number.
        network: (b, c, h, w) float images in [0, 255] -> (b, d) features.
        statistics: of the reference images.
        source: what they are, one line.
        floor: the distance of other real images to these, or None where unknown.
    """

    feature_space: str
    network: nn.Module
    statistics: Statistics
    source: str
    floor: float | None = None


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
            self.network = InceptionV3W(str(path.parent), download=False, resize_inside=legacy).eval()
        except (RuntimeError, AttributeError) as error:
            raise BootError(f"{path} is damaged.", "Delete it, so that it is fetched again.") from error
        self.resize = build_resizer("legacy_tensorflow" if legacy else "clean")

    def forward(self, images: Tensor) -> Tensor:
        """Features (b, 2048) of float images (b, 1 or 3, h, w) in [0, 255]; grey ones count as equal r, g and b."""
        chunks = images.expand(-1, 3, -1, -1).split(50)  # 50 images at 299x299 are 54 MB
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
        except OSError as error:
            raise BootError(
                f"Inception's weights are not in {path} and cannot be fetched: {error}.",
                f"Without a network, put the file of {downloads_helper.inception_url} there.",
            ) from error
    return path


def statistics_of(batches: Iterable[Tensor], network: nn.Module, device: torch.device) -> Statistics:
    """Fit a Gaussian to the features of at least two images.

    Args:
        batches: uint8 images (b, c, h, w).
        network: as in `Reference`, on ``device``.
        device: where to compute.

    Raises `BootError` for features that are not finite.
    """
    rows = [fid.get_batch_features(batch.float(), network, device) for batch in batches]
    features = np.concatenate(rows).astype(np.float64)
    if not np.isfinite(features).all():
        raise BootError("The feature network returned values that are not finite.", "Look at the images: bootcli sample")
    return Statistics(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)), len(features))


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
        folder: where to look; what is not an image is passed over.
        shape: (1 or 3, h, w) that every image must have; None takes any size, as RGB.

    Raises `BootError` for a folder with fewer than two images, a broken image or one of another size.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if len(files) < 2:
        raise BootError(f"{folder} holds {len(files)} images; statistics need more.", "Name a folder of image files.")
    images = (_read_image(path, shape) for path in files)
    for _, same_size in itertools.groupby(images, key=lambda image: image.shape):
        while batch := list(itertools.islice(same_size, FOLDER_BATCH)):
            yield torch.stack(batch)


def _read_image(path: Path, shape: torch.Size | None) -> Tensor:
    grey = shape is not None and shape[0] == 1
    try:
        with Image.open(path) as image:
            array = np.array(image.convert("L" if grey else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BootError(f"{path} cannot be read as an image: {error}.", "Replace or remove it.") from error
    pixels = torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)
    if shape is not None and pixels.shape != shape:
        size, wanted = (f"{s[2]}x{s[1]}" for s in (pixels.shape, shape))
        raise BootError(f"{path} is {size}, the teacher's images are {wanted}.", "Resize the reference images first.")
    return pixels


def reference_for(teacher: Teacher, reference: str | None, device: torch.device) -> Reference:
    """What a user's ``--reference`` means (see `FORMS`); None is the statistics that come with the teacher.

    Args:
        teacher: on ``device``.
        reference: ``[inception-clean:|inception-legacy:]PATH`` or None.
        device: where the feature network goes.

    Raises `UsageError` for a form that means nothing, `BootError` for a broken file or another feature space.
    """
    own = teacher.feature_space()
    if reference is None:
        if own is None:
            raise UsageError("This teacher brings no reference statistics: name some with --reference.", FORMS)
        statistics = Statistics(own.mean.double().cpu().numpy(), own.cov.double().cpu().numpy(), own.num_images)
        return Reference(own.name, own.network.eval().to(device), statistics, own.source, own.floor)
    prefix, _, rest = reference.partition(":")
    space, path = (prefix, Path(rest)) if prefix in INCEPTION else (own.name if own else None, Path(reference))
    path = path.expanduser()
    if not path.exists():
        raise UsageError(f"--reference {reference}: {path} does not exist.", FORMS)
    if path.suffix == ".safetensors":
        return _from_stored(teacher, path, prefix if prefix in INCEPTION else None, device)
    if space is None:
        raise UsageError(f"--reference {reference}: this teacher has no feature network of its own.", FORMS)
    if path.is_dir():
        network = _network(teacher, space, device)
        shape = None if space in INCEPTION else _image_shape(teacher, device)
        return Reference(space, network, statistics_of(folder_images(path, shape), network, device), str(path))
    if path.suffix == ".npz" and space in INCEPTION:
        return Reference(space, _network(teacher, space, device), _read_npz(path), str(path))
    raise UsageError(f"--reference {reference}: not a form that is known.", FORMS)


def write_reference(path: Path, reference: Reference) -> None:
    """Keep statistics for later use as ``--reference``, labelled with their feature space."""
    statistics = reference.statistics
    tensors = {"mean": torch.from_numpy(statistics.mean), "cov": torch.from_numpy(statistics.cov)}
    facts = {"feature_space": reference.feature_space, "num_images": statistics.num_images, "source": reference.source}
    write_tensors(path, tensors, facts)


def _from_stored(teacher: Teacher, path: Path, asked: str | None, device: torch.device) -> Reference:
    tensors, facts = read_tensors(path)
    space, count, source = facts.get("feature_space"), facts.get("num_images"), facts.get("source")
    if not isinstance(space, str) or not isinstance(count, int | None) or not {"mean", "cov"} <= tensors.keys():
        raise BootError(f"{path} holds no reference statistics.", FORMS)
    own = teacher.feature_space()
    usable = {asked} if asked else {*INCEPTION, *([own.name] if own else [])}
    if space not in usable:
        raise BootError(
            f"{path} holds {space} features, which cannot be compared with {' or '.join(sorted(usable))}.",
            "Make the statistics again, in the feature space of this evaluation.",
        )
    dimensions = len(own.mean) if own and own.name == space else 2048
    statistics = _checked(tensors["mean"].numpy(), tensors["cov"].numpy(), count, dimensions, path)
    return Reference(space, _network(teacher, space, device), statistics, f"{source} ({path})")


def _read_npz(path: Path) -> Statistics:
    try:
        with np.load(path, allow_pickle=False) as file:
            return _checked(file["mu"], file["sigma"], None, 2048, path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise BootError(f"{path} is not a file of statistics (mu, sigma): {error}.", "Get a fresh copy.") from error


def _checked(mean: Any, cov: Any, count: int | None, dimensions: int, path: Path) -> Statistics:
    if mean.shape != (dimensions,) or cov.shape != (dimensions, dimensions):
        raise BootError(f"{path}: the statistics have shapes {mean.shape} and {cov.shape}, not d = {dimensions}.")
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all() and np.allclose(cov, cov.T)):
        raise BootError(f"{path}: the covariance is not finite and symmetric.", "Get a fresh copy.")
    return Statistics(mean, cov, count)


def _network(teacher: Teacher, space: str, device: torch.device) -> nn.Module:
    own = teacher.feature_space()
    return (own.network if own and own.name == space else Inception(space)).eval().to(device)


def _image_shape(teacher: Teacher, device: torch.device) -> torch.Size:
    with torch.no_grad():
        return teacher.decode(torch.zeros(1, *teacher.spec.sample_shape, device=device)).shape[1:]
