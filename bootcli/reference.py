"""What image sets are compared with: the meaning of ``--reference``, and references kept in files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bootcli.config import OWN_IMAGES
from bootcli.errors import BootError, UsageError
from bootcli.evaluate import INCEPTION, Inception, Statistics, features_of, folder_images, gaussian_fit
from bootcli.manifold import MOST_ROWS, some_rows
from bootcli.paths import expanded
from bootcli.store.tensors import read_tensors, write_tensors
from bootcli.teachers.protocol import FeatureSpace, Teacher

OWN_STEPS = 50
"""Teacher steps of those, and of the ends that a student is paired with."""
OTHER_NOISE = 2**30
"""Added to a seed for the noise of the teacher's own image beside it: a reference has the conditions of the images
compared with it, never their noise. Of a seed torch's generators look at 32 bits alone."""
FORMS = (
    "PATH, a folder of images or a .safetensors file of statistics, is read in the teacher's own features; "
    f"{' or '.join(f'{name}:PATH' for name in INCEPTION)}, which may be an .npz file (mu, sigma) too, in Inception's. "
    f"{OWN_IMAGES!r} in the place of PATH stands for images that the teacher draws."
)
_BROKEN_NPZ = (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Reference:
    """What image sets are compared with, and in which feature space.

    Args:
        feature_space: printed beside every number.
        network: (b, c, h, w) float images in [0, 255] -> (b, d) features.
        statistics: of the reference images.
        source: what they are, one line.
        floor: the distance of other real images to these, by their number; empty where unknown.
        features: of at most `MOST_ROWS` of the reference images, (n, d) on the CPU; None where only their statistics
            are known.
        classes_of, words: of the teacher's `FeatureSpace`, where the features are those.
    """

    feature_space: str
    network: nn.Module
    statistics: Statistics
    source: str
    floor: Mapping[int, float] = field(default_factory=dict)
    features: Tensor | None = None
    classes_of: Callable[[Tensor], Tensor] | None = None
    words: tuple[str, ...] = ()


def reference_for(
    teacher: Teacher,
    reference: str | None,
    device: torch.device,
    *,
    with_features: bool = False,
    own_images: Callable[[], Iterable[Tensor]] | None = None,
) -> Reference:
    """What a user's ``--reference`` means (see `FORMS`); None is the statistics that come with the teacher.

    Args:
        teacher: on ``device``.
        reference: ``[inception-clean:|inception-legacy:]PATH``, PATH maybe the word `OWN_IMAGES`, or None.
        device: where the feature network goes.
        with_features: whether statistics alone are too little.
        own_images: begins what that word stands for, uint8 batches (b, c, h, w) that the teacher draws in
            `OWN_STEPS`; None where the word is a path like any other.

    Raises `UsageError` for a form that means nothing, `BootError` for a broken file or another feature space.
    """
    own = teacher.feature_space()
    if reference is None:
        if own is None:
            what = "This teacher brings no reference statistics for images of this size"
            raise UsageError(f"{what}: name some with --reference.", FORMS)
        statistics = Statistics(own.mean.double().cpu().numpy(), own.cov.double().cpu().numpy(), own.num_images)
        rows = None if own.features is None else some_rows(own.features.cpu(), MOST_ROWS)
        if with_features:
            _need_features(rows, "This teacher's own reference")
        network = own.network.eval().to(device)
        return Reference(own.name, network, statistics, own.source, own.floor, rows, own.classes_of, own.words)
    inception, named = _parts(reference)
    drawn = own_images if is_own(reference) else None
    path = expanded(named)
    check_reference(teacher, reference, "--reference", may_draw=drawn is not None)
    space, dimensions = (inception, 2048) if inception or own is None else (own.name, len(own.mean))
    known = None if drawn or path.is_dir() else _read(path, space, dimensions)  # before a large network is loaded
    if known is not None and with_features:
        _need_features(known[1], f"--reference {reference}")
    network = (Inception(space) if inception or own is None else own.network).eval().to(device)
    if known is None:
        images = drawn() if drawn else folder_images(path, None if inception else _image_shape(teacher, device))
        features = features_of(images, network, device)
        known = gaussian_fit(features), some_rows(features, MOST_ROWS)
    classes_of, words = (None, ()) if inception or own is None else (own.classes_of, own.words)
    source = f"the teacher's own, {OWN_STEPS} steps" if drawn else str(path)
    return Reference(space, network, known[0], source, features=known[1], classes_of=classes_of, words=words)


def check_reference(teacher: Teacher, reference: str, name: str, *, may_draw: bool = True) -> None:
    """Raise `UsageError` for one that means nothing, before anything is drawn or read.

    Args:
        teacher: loaded.
        reference: see `FORMS`.
        name: of the setting that it comes from.
        may_draw: whether the teacher may draw its own images.
    """
    inception, named = _parts(reference)
    path = expanded(named)
    if not named:
        raise UsageError(f"{name} {reference!r} names nothing.", FORMS)
    if not (may_draw and is_own(reference)) and not path.exists():
        raise UsageError(f"{name} {reference}: {path} does not exist.", FORMS)
    if teacher.feature_space() is None and not inception:
        what = "this teacher has no feature network of its own for images of this size"
        raise UsageError(f"{name} {reference}: {what}.", FORMS)


def features_for(teacher: Teacher, reference: str | None) -> FeatureSpace | None:
    """The teacher's own features, where a user's ``--reference`` is compared in them; None: in Inception's."""
    return teacher.feature_space() if reference is None or not _parts(reference)[0] else None


def is_own(reference: str | None) -> bool:
    """Whether a user's ``--reference`` is what the teacher draws itself."""
    return reference is not None and _parts(reference)[1] == OWN_IMAGES


def _parts(reference: str) -> tuple[str, str]:
    """Which Inception features it asks for, "" for none, and what it names."""
    prefix, _, rest = reference.partition(":")
    return (prefix, rest) if prefix in INCEPTION else ("", reference)


def _need_features(features: Tensor | None, source: str) -> None:
    if features is None:
        raise UsageError(
            f"{source} holds a mean and a covariance only; precision and recall need features of single images.",
            "Name a folder of images with --reference; --save-reference keeps its features in a .safetensors file.",
        )


def write_reference(path: Path, reference: Reference) -> None:
    """Keep statistics, and features where there are some, for later use as ``--reference``, labelled with their
    feature space."""
    statistics = reference.statistics
    tensors = {"mean": torch.from_numpy(statistics.mean), "cov": torch.from_numpy(statistics.cov)}
    if reference.features is not None:
        tensors["features"] = reference.features
    facts = {"feature_space": reference.feature_space, "num_images": statistics.num_images, "source": reference.source}
    write_tensors(path, tensors, facts)


def _read(path: Path, space: str, dimensions: int) -> tuple[Statistics, Tensor | None]:
    """A .safetensors file of `write_reference`, or an .npz file of clean-fid's kind; neither can run code."""
    if path.suffix == ".npz" and space in INCEPTION:
        statistics, features = _read_npz(path), None
    elif path.suffix == ".safetensors":
        statistics, features = _read_stored(path, space)
    else:
        raise UsageError(f"--reference {path}: not a reference in {space} features.", FORMS)
    mean, cov = statistics.mean, statistics.cov
    if mean.shape != (dimensions,) or cov.shape != (dimensions, dimensions):
        raise BootError(f"{path}: the statistics have shapes {mean.shape} and {cov.shape}, not d = {dimensions}.")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all() and np.allclose(cov, cov.T)):
        raise BootError(f"{path}: the covariance is not finite and symmetric.", "Get a fresh copy.")
    if features is not None and not (features.ndim == 2 and features.shape[1] == dimensions and _finite(features)):
        raise BootError(f"{path}: the features are not (n, {dimensions}) finite numbers.", "Make the file again.")
    return statistics, features


def _finite(features: Tensor) -> bool:
    return features.is_floating_point() and bool(features.isfinite().all())


def _read_stored(path: Path, space: str) -> tuple[Statistics, Tensor | None]:
    tensors, facts = read_tensors(path)
    if facts.get("feature_space") != space:
        raise BootError(f"{path} holds {facts.get('feature_space')} features, not {space} features.", FORMS)
    count = facts.get("num_images")
    try:
        mean, cov = (tensors[name].double().numpy() for name in ("mean", "cov"))
    except KeyError as error:
        raise BootError(f"{path} holds no {error}.", "Make the statistics again.") from error
    return Statistics(mean, cov, count if isinstance(count, int) else None), tensors.get("features")


def _read_npz(path: Path) -> Statistics:
    try:
        with np.load(path, allow_pickle=False) as file:
            return Statistics(file["mu"].astype(np.float64), file["sigma"].astype(np.float64), None)
    except (*_BROKEN_NPZ, MemoryError) as error:  # memory: a header may claim any size
        raise BootError(f"{path} is not a file of statistics (mu, sigma): {error}.", "Get a fresh copy.") from error


def _image_shape(teacher: Teacher, device: torch.device) -> torch.Size:
    with torch.no_grad():
        return teacher.decode(torch.zeros(1, *teacher.spec.sample_shape, device=device)).shape[1:]
