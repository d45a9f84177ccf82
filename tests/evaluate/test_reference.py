"""References good and hostile: the teacher's own, folders, statistics files, Inception."""

from __future__ import annotations

import dataclasses
import os
import pickle
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cleanfid import fid
from cleanfid.inception_torchscript import InceptionV3W
from torch import Tensor, nn

from bootcli import evaluate as metrics
from bootcli import reference as references
from bootcli.errors import BootError, UsageError
from bootcli.evaluate import Inception, folder_images, frechet, statistics_of
from bootcli.images import save_png
from bootcli.pipelines.evaluate import evaluate
from bootcli.plugin import FeatureSpace, Teacher
from bootcli.reference import Reference, reference_for, write_reference
from bootcli.store.tensors import read_tensors, write_tensors

from .conftest import CPU, DIM, Corners, gaussian

# -- references -------------------------------------------------------------------------------------------------------


def test_the_default_reference_is_the_teachers_own(teacher: Teacher, own_space: FeatureSpace) -> None:
    reference = reference_for(teacher, None, CPU)
    assert (reference.feature_space, reference.source, reference.floor) == ("corners-5", "made up", {10: 0.5})
    assert reference.statistics.cov.dtype == np.float64
    assert reference.network is own_space.network
    assert reference.features is own_space.features


def test_a_teacher_without_a_feature_space_needs_a_reference(tiny_teacher: Teacher, tmp_path: Path) -> None:
    for words, match in ((None, "brings no reference"), (str(tmp_path), "no feature network of its own")):
        with pytest.raises(UsageError, match=match) as caught:
            reference_for(tiny_teacher, words, CPU)
        assert "inception-clean:PATH" in caught.value.hint


def test_where_no_reference_can_be_kept_nothing_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.file").write_text("")
    with pytest.raises(OSError, match=r"a\.file"):
        evaluate(tmp_path / "no run", save_reference=tmp_path / "a.file" / "kept.safetensors")


def test_a_folder_is_read_in_the_teachers_own_features(teacher: Teacher, pictures: tuple[Path, Tensor]) -> None:
    folder, pixels = pictures
    reference = reference_for(teacher, str(folder), CPU)
    np.testing.assert_array_equal(reference.statistics.mean, pixels.double().flatten(1)[:, :DIM].mean(0).numpy())
    assert (reference.feature_space, reference.source, reference.floor) == ("corners-5", str(folder), {})
    assert reference.statistics.num_images == 12
    assert reference.features is not None
    assert torch.equal(reference.features, pixels.float().flatten(1)[:, :DIM])


def test_the_word_teacher_stands_for_its_own_images(
    teacher: Teacher, pictures: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pixels = pictures

    def own() -> Sequence[Tensor]:
        return pixels[:8].split(3)

    reference = reference_for(teacher, "teacher", CPU, with_features=True, own_images=own)
    said = (reference.source, reference.statistics.num_images, reference.floor)
    assert said == ("the teacher's own, 50 steps", 8, {})
    assert reference.features is not None
    assert torch.equal(reference.features, pixels[:8].float().flatten(1)[:, :DIM])
    folder.rename(folder.parent / "teacher")
    monkeypatch.chdir(folder.parent)
    assert reference_for(teacher, "./teacher", CPU, own_images=own).statistics.num_images == 12
    with pytest.raises(UsageError, match="inception-clean:elsewhere: elsewhere does not exist") as caught:
        reference_for(teacher, "inception-clean:elsewhere", CPU, own_images=own)
    assert "'teacher' in the place of PATH" in caught.value.hint


def test_images_of_another_kind_are_not_bent_to_fit(teacher: Teacher, pictures: tuple[Path, Tensor]) -> None:
    folder, _ = pictures
    save_png(torch.zeros(1, 9, 8, dtype=torch.uint8), folder / "tall.png")
    with pytest.raises(BootError, match=r"tall\.png is 8x9, the teacher's images are 8x8"):
        reference_for(teacher, str(folder), CPU)
    (folder / "tall.png").unlink()
    save_png(torch.eye(3).to(torch.uint8).reshape(3, 3, 1).repeat(1, 3, 8)[:, :8], folder / "red.png")
    with pytest.raises(BootError, match=r"red\.png is in colour"):
        reference_for(teacher, str(folder), CPU)
    (folder / "red.png").write_bytes(b"not a png")
    with pytest.raises(BootError, match=r"red\.png cannot be read"):
        reference_for(teacher, str(folder), CPU)


def test_words_that_name_no_reference(teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "stats.txt").touch()
    np.savez(tmp_path / "stats.npz", mu=np.zeros(DIM), sigma=np.eye(DIM))
    missing = ("", "inception-clean:", "missing", "~nobody123/missing", "inception:" + str(tmp_path))
    for words in (*missing, str(tmp_path / "stats.txt"), str(tmp_path / "stats.npz")):
        with pytest.raises(UsageError) as caught:
            reference_for(teacher, words, CPU)
        assert "PATH" in caught.value.hint, "an .npz file does not say whose features it holds"
    with pytest.raises(BootError, match="holds 0 images"):
        reference_for(teacher, str(tmp_path / "empty"), CPU)


def test_kept_statistics_come_back(teacher: Teacher, pictures: tuple[Path, Tensor], tmp_path: Path) -> None:
    made = reference_for(teacher, str(pictures[0]), CPU)
    write_reference(tmp_path / "kept.safetensors", made)
    again = reference_for(teacher, str(tmp_path / "kept.safetensors"), CPU)
    assert frechet(made.statistics, again.statistics) == pytest.approx(0, abs=1e-6)
    assert again.statistics.num_images == 12
    assert again.features is not None
    assert made.features is not None
    assert torch.equal(again.features, made.features)


def test_features_are_those_of_a_limited_number_of_images(
    teacher: Teacher, own_space: FeatureSpace, pictures: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "MOST_ROWS", 7)
    for words in (None, str(pictures[0])):
        features = reference_for(teacher, words, CPU).features
        assert features is not None
        assert features.shape == (7, DIM)
    assert reference_for(teacher, str(pictures[0]), CPU).statistics.num_images == 12


def test_statistics_alone_are_too_little_for_precision_and_recall(
    teacher: Teacher, own_space: FeatureSpace, tmp_path: Path, cache: Path
) -> None:
    write_reference(tmp_path / "old.safetensors", Reference("corners-5", Corners(), gaussian(0, d=DIM), "elsewhere"))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    bare = dataclasses.replace(own_space, features=None)
    teacher.feature_space = lambda: bare  # type: ignore[method-assign]
    for words in (None, str(tmp_path / "old.safetensors"), f"inception-clean:{tmp_path / 'stats.npz'}"):
        with pytest.raises(UsageError, match="a mean and a covariance only") as caught:
            reference_for(teacher, words, CPU, with_features=True)
        assert "--save-reference" in caught.value.hint
    assert reference_for(teacher, None, CPU).features is None, "enough for a distance"
    assert not list(cache.glob("*")), "the error comes before Inception is fetched"


@pytest.mark.parametrize(
    "features", [torch.zeros(9, 4), torch.zeros(9), torch.zeros(9, DIM).int(), torch.full((9, DIM), torch.inf)]
)
def test_stored_features_that_do_not_fit_are_refused(
    teacher: Teacher, pictures: tuple[Path, Tensor], tmp_path: Path, features: Tensor
) -> None:
    path = tmp_path / "kept.safetensors"
    write_reference(path, reference_for(teacher, str(pictures[0]), CPU))
    tensors, facts = read_tensors(path)
    write_tensors(path, tensors | {"features": features}, facts)
    with pytest.raises(BootError, match=r"kept\.safetensors: the features are not \(n, 5\) finite numbers"):
        reference_for(teacher, str(path), CPU)


def test_another_feature_space_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    write_reference(path, Reference("other-5", Corners(), gaussian(0, d=DIM), "elsewhere"))
    for words, wanted in ((str(path), "corners-5"), (f"inception-clean:{path}", "inception-clean")):
        with pytest.raises(BootError, match=f"holds other-5 features, not {wanted}"):
            reference_for(teacher, words, CPU)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_hostile_and_broken_statistics_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    path, trap = tmp_path / "stats.npz", tmp_path / "trap"
    square, good = np.eye(2048), np.zeros(2048)

    def with_bytes(data: bytes) -> Callable[[], object]:
        return lambda: path.write_bytes(data)

    makers: list[Callable[[], object]] = [
        lambda: np.savez(path, mu=np.array([Bomb(trap)], dtype=object), sigma=square),
        with_bytes(pickle.dumps(Bomb(trap))),
        with_bytes(b"PK\x03\x04 and then nothing"),
        with_bytes(b""),
        lambda: np.savez(path, mean=good, cov=square),
        lambda: np.savez(path, mu=good[:64], sigma=square[:64, :64]),
        lambda: np.savez(path, mu=good.astype(str), sigma=np.full((2048, 2048), "x")),
        lambda: np.savez(path, mu=good, sigma=square * np.nan),
        lambda: np.savez(path, mu=good, sigma=np.triu(np.ones((2048, 2048)))),
    ]
    for make in makers:
        make()
        with pytest.raises(BootError, match=r"stats\.npz"):
            reference_for(teacher, f"inception-clean:{path}", CPU)
        assert not trap.exists()


# -- Inception, with a small network in its place ---------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((32, 32))

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x)
        return pooled[:, :2].flatten(1)


class FakeInception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        features: Tensor = self.layers(x)
        return features


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no network."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(metrics, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return tmp_path / "bootcli" / "inception"


@pytest.fixture
def inception(cache: Path) -> Path:
    cache.mkdir(parents=True)
    path = cache / "inception-2015-12-05.pt"
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        torch.jit.script(FakeInception()).save(str(path))
    return path


def test_inception_that_cannot_be_fetched_is_named(
    teacher: Teacher, cache: Path, pictures: tuple[Path, Tensor]
) -> None:
    with pytest.raises(BootError, match=r"inception-2015-12-05\.pt.*no route to host") as caught:
        reference_for(teacher, f"inception-clean:{pictures[0]}", CPU)
    assert "https://" in caught.value.hint
    assert not list(cache.parent.glob("**/*.pt")), "half a file would be taken for the whole the next time"


def test_damaged_inception_is_named(inception: Path) -> None:
    inception.write_bytes(b"half a file")
    with pytest.raises(BootError, match=r"inception-2015-12-05\.pt is damaged"):
        Inception("inception-clean")


def test_the_teachers_own_images_in_inceptions_features(
    tiny_teacher: Teacher, pictures: tuple[Path, Tensor], inception: Path
) -> None:
    reference = reference_for(tiny_teacher, "inception-clean:teacher", CPU, own_images=lambda: [pictures[1]])
    assert (reference.feature_space, reference.statistics.mean.shape) == ("inception-clean", (2048,))


@pytest.mark.parametrize(("space", "mode"), [("inception-clean", "clean"), ("inception-legacy", "legacy_tensorflow")])
def test_inception_features_are_clean_fids(
    space: str, mode: str, inception: Path, teacher: Teacher, pictures: tuple[Path, Tensor]
) -> None:
    folder, pixels = pictures
    reference = reference_for(teacher, f"{space}:{folder}", CPU)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        network = InceptionV3W(str(inception.parent), download=False, resize_inside=mode != "clean")
    theirs = fid.get_folder_features(str(folder), network, 0, device=CPU, mode=mode, verbose=False)
    np.testing.assert_allclose(reference.statistics.mean, theirs.mean(0), atol=1e-5)
    assert reference.feature_space == space
    generated = statistics_of(pixels.chunk(3), reference.network, CPU)
    np.testing.assert_allclose(generated.mean, reference.statistics.mean, atol=1e-5)


def test_a_folder_of_many_sizes_is_read_whole(pictures: tuple[Path, Tensor]) -> None:
    folder, _ = pictures
    save_png(torch.zeros(3, 5, 7, dtype=torch.uint8), folder / "b.png")
    assert sorted(tuple(batch.shape) for batch in folder_images(folder)) == [(1, 3, 5, 7), (2, 3, 8, 8), (10, 3, 8, 8)]


def test_the_grid_beside_samples_is_none_of_them(pictures: tuple[Path, Tensor]) -> None:
    """A picture of the user's own, of whatever name, is."""
    folder, _ = pictures
    before = sum(len(batch) for batch in folder_images(folder))
    picture = torch.zeros(3, 9, 9, dtype=torch.uint8)
    save_png(picture, folder / "grid.png", {"Software": "bootcli 1", "source": "student"})
    assert sum(len(batch) for batch in folder_images(folder)) == before
    save_png(picture, folder / "grid.png")
    assert sum(len(batch) for batch in folder_images(folder)) == before + 1
