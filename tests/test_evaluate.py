"""Frechet distances against independent mathematics, reference files good and hostile, and the whole evaluation."""

from __future__ import annotations

import json
import os
import pickle
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid
from cleanfid.inception_torchscript import InceptionV3W
from torch import Tensor, nn

from bootcli import evaluate as metrics
from bootcli.errors import BootError, UsageError
from bootcli.evaluate import (
    Inception,
    Reference,
    Statistics,
    folder_images,
    frechet,
    reference_for,
    statistics_of,
    write_reference,
)
from bootcli.images import save_png
from bootcli.pipelines import evaluate as pipeline
from bootcli.plugin import FeatureSpace, Teacher
from bootcli.sampler import prior_noise
from bootcli.teachers.registry import Loaded

CPU = torch.device("cpu")
DIM = 5


class Corners(nn.Module):
    """A feature network: five pixels of the image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :DIM]


def gaussian(seed: int, d: int = 6, images: int = 100, scale: float = 1.0) -> Statistics:
    """Statistics of correlated features; fewer images than d + 1 make the covariance singular."""
    rng = np.random.default_rng(seed)
    features = (rng.normal(size=(images, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)) * scale
    return Statistics(features.mean(0), np.cov(features, rowvar=False), images)


def independent_frechet(a: Statistics, b: Statistics) -> float:
    """The trace of (C_a C_b)^(1/2) from the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2): no sqrtm."""
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ b.cov @ root).clip(0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap)


@pytest.fixture
def own_space() -> FeatureSpace:
    return FeatureSpace("corners-5", Corners(), torch.full((DIM,), 127.0), 900 * torch.eye(DIM), 1000, "made up", 0.5)


@pytest.fixture
def teacher(tiny_teacher: Teacher, own_space: FeatureSpace, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """The tiny teacher with a feature space of its own."""
    monkeypatch.setattr(tiny_teacher, "feature_space", lambda: own_space)
    return tiny_teacher


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Tensor]:
    """A folder of 12 grey 8x8 PNG files, two of them a level deeper, and their pixels in the order of their paths."""
    pixels = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    for i, image in enumerate(pixels):
        save_png(image, tmp_path / "pictures" / ("more" if i >= 10 else "") / f"{'z' if i >= 10 else 'a'}{i:02d}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("not an image")
    return tmp_path / "pictures", pixels


# -- the number -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("images", [100, 4])
def test_distance_equals_an_independent_computation(scale: float, images: int) -> None:
    a, b = gaussian(1, images=images, scale=scale), gaussian(2, scale=scale)
    assert frechet(a, b) == pytest.approx(independent_frechet(a, b), rel=1e-6)


def test_distance_of_diagonal_gaussians_is_analytic() -> None:
    a = Statistics(np.zeros(3), np.diag([1.0, 4.0, 9.0]), None)
    b = Statistics(np.ones(3), np.diag([4.0, 4.0, 25.0]), None)
    assert frechet(a, b) == pytest.approx(3 + 1 + 0 + 4, rel=1e-12)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_sampled_gaussian_images_have_the_analytic_distance() -> None:
    def images(mean: float, std: float, seed: int) -> list[Tensor]:
        noise = torch.randn(20_000, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
        return list((mean + std * noise).round().clamp(0, 255).to(torch.uint8).chunk(7))

    a, b = (statistics_of(images(*args), nn.Flatten(), CPU) for args in ((100, 15, 0), (130, 25, 1)))
    assert a.num_images == 20_000
    assert frechet(a, b) == pytest.approx(4 * (30**2 + 10**2), rel=0.01)


def test_statistics_are_those_of_clean_fid() -> None:
    batches = [torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8) for n in (7, 9)]
    features = torch.cat(batches).flatten(1).numpy()
    ours = statistics_of(batches, nn.Flatten(), CPU)
    other = gaussian(0, d=16)
    theirs = fid.frechet_distance(features.mean(0), np.cov(features, rowvar=False), other.mean, other.cov)
    assert frechet(ours, other) == pytest.approx(float(theirs), rel=1e-9)


def test_features_that_are_not_finite_are_refused() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) / 0

    with pytest.raises(BootError, match="not finite"):
        statistics_of([torch.zeros(3, 1, 2, 2, dtype=torch.uint8)], Broken(), CPU)


def test_spaces_of_other_sizes_are_not_compared() -> None:
    with pytest.raises(BootError, match="5 and 6"):
        frechet(gaussian(0, d=5), gaussian(0, d=6))


# -- SciPy ------------------------------------------------------------------------------------------------------------

SQRTM: Callable[..., Any] = scipy.linalg.sqrtm


def test_a_scipy_without_disp_gives_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = gaussian(1), gaussian(2)
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda A: SQRTM(A))  # `disp` is a TypeError, as from SciPy 1.18 on
    assert frechet(a, b) == pytest.approx(independent_frechet(a, b), rel=1e-9)
    root, error = fid.linalg.sqrtm(a.cov, disp=False)
    np.testing.assert_allclose(root @ root, a.cov, atol=1e-9)
    assert error < 1e-20


def test_scipy_itself_is_not_patched() -> None:
    assert fid.linalg is not scipy.linalg
    assert scipy.linalg.sqrtm.__module__.startswith("scipy.")


def test_rounding_errors_in_the_imaginary_part_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = gaussian(1, scale=1e3), gaussian(2, scale=1e3)
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda A: SQRTM(A) + 1j)  # above clean-fid's 1e-3, tiny beside 1e6
    assert frechet(a, b) == pytest.approx(independent_frechet(a, b), rel=1e-9)


def test_a_root_that_is_really_complex_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda A: SQRTM(A) * (1 + 1j))
    with pytest.raises(BootError, match="cannot be computed"):
        frechet(gaussian(1), gaussian(2))


def test_what_clean_fid_prints_stays_off_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([lambda A: A * np.nan, SQRTM])
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda A: next(answers)(A))
    a, b = gaussian(1), gaussian(2)
    assert frechet(a, b) == pytest.approx(independent_frechet(a, b), rel=1e-3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "singular product" in captured.err


# -- references -------------------------------------------------------------------------------------------------------


def test_the_default_reference_is_the_teachers_own(teacher: Teacher, own_space: FeatureSpace) -> None:
    reference = reference_for(teacher, None, CPU)
    assert (reference.feature_space, reference.source, reference.floor) == ("corners-5", "made up", 0.5)
    assert reference.statistics.cov.dtype == np.float64
    assert reference.network is own_space.network


def test_a_teacher_without_a_feature_space_needs_a_reference(tiny_teacher: Teacher, tmp_path: Path) -> None:
    for words, match in ((None, "brings no reference"), (str(tmp_path), "no feature network of its own")):
        with pytest.raises(UsageError, match=match) as caught:
            reference_for(tiny_teacher, words, CPU)
        assert "inception-clean:PATH" in caught.value.hint


def test_a_folder_is_read_in_the_teachers_own_features(teacher: Teacher, pictures: tuple[Path, Tensor]) -> None:
    folder, pixels = pictures
    reference = reference_for(teacher, str(folder), CPU)
    np.testing.assert_array_equal(reference.statistics.mean, pixels.double().flatten(1)[:, :DIM].mean(0).numpy())
    assert (reference.feature_space, reference.source, reference.floor) == ("corners-5", str(folder), None)
    assert reference.statistics.num_images == 12


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
    for words in ("missing", "inception:" + str(tmp_path), str(tmp_path / "stats.txt"), str(tmp_path / "stats.npz")):
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


# -- the whole evaluation ---------------------------------------------------------------------------------------------


@pytest.fixture
def at_hand(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """The run's teacher, with its feature space."""
    loaded = Loaded(teacher, None, "tiny", "test")  # type: ignore[arg-type]  # the family is not asked for
    monkeypatch.setattr(pipeline, "load", lambda name: loaded)
    return teacher


def test_an_evaluation_says_all_it_takes_to_repeat_it(at_hand: Teacher, tiny_run: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = pipeline.evaluate(
        tiny_run,
        num_images=8,
        repeats=2,
        teacher_steps=(1, 3),
        batch_size=5,
        device="cpu",
        progress=lambda *facts: seen.append(facts),
    )
    student, teacher = result["student"], result["teacher"]
    assert isinstance(student, dict)
    assert isinstance(teacher, list)
    assert [(row["steps"], row["nfe"]) for row in teacher] == [(1, 1), (3, 3)]
    for row in (student, *teacher):
        assert row["fid"] == pytest.approx(sum(row["fid_repeats"]) / 2)
        assert row["fid_std"] > 0
    assert student["nfe"] == 1
    assert (result["metric"], result["feature_space"]) == ("fid", "corners-5")
    assert result["reference"] == {
        "feature_space": "corners-5",
        "dimensions": DIM,
        "source": "made up",
        "num_images": 1000,
        "floor": 0.5,
    }
    assert result["sampler"] == {
        "method": "ddim",
        "eta": 0.0,
        "timestep_spacing": "trailing",
        "use_clipped_model_output": True,
        "threshold": "Clip(bound=1.0)",
        "guidance_scale": 1.0,
        "precision": "float32",
    }
    assert [facts[1:] for facts in seen if facts[0] == "student"] == [(5, 16), (8, 16), (13, 16), (16, 16)]
    (written,) = (tiny_run / "evaluations").glob("fid-*.json")
    assert json.loads(written.read_text()) == json.loads(json.dumps(result))
    written.unlink()


def seeds_drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every seed that noise is drawn from, in order."""
    drawn: list[int] = []

    def spy(seeds: Any, shape: tuple[int, int, int]) -> Tensor:
        drawn.extend(seeds)
        return prior_noise(seeds, shape)

    monkeypatch.setattr("bootcli.sampler.prior_noise", spy)
    return drawn


def test_student_and_teacher_share_seeds_and_repeats_do_not(
    at_hand: Teacher, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = seeds_drawn(monkeypatch)
    file = tiny_run / "student" / "student.safetensors"
    pipeline.evaluate(file, num_images=6, seed=40, repeats=3, teacher_steps=(1,), batch_size=4, device="cpu")
    assert drawn == [*range(40, 58)] * 2


def test_the_batch_size_changes_nothing(at_hand: Teacher, tiny_run: Path) -> None:
    file = tiny_run / "student" / "student.safetensors"
    small, large = (pipeline.evaluate(file, num_images=12, batch_size=n, device="cpu") for n in (5, 12))
    assert small["student"]["fid"] == pytest.approx(large["student"]["fid"], rel=1e-3)  # type: ignore[index]


def test_notes_warn_of_numbers_that_mislead(at_hand: Teacher, tiny_run: Path) -> None:
    file = tiny_run / "student" / "student.safetensors"
    notes = " ".join(pipeline.evaluate(file, num_images=4, device="cpu")["notes"])  # type: ignore[arg-type]
    for part in ("not comparable with Inception", "4 images of the student", "--repeats"):
        assert part in notes


@pytest.mark.parametrize(
    "wrong", [{"metric": "kid"}, {"num_images": 1}, {"repeats": 0}, {"teacher_steps": (4, 0)}, {"batch_size": 0}]
)
def test_impossible_requests_are_usage_errors(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        pipeline.evaluate(tmp_path / "missing", **wrong)


def test_statistics_can_be_kept_for_later(
    at_hand: Teacher, tiny_run: Path, pictures: tuple[Path, Tensor], tmp_path: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    file = tiny_run / "student" / "student.safetensors"
    settings: dict[str, Any] = {"num_images": 8, "device": "cpu"}
    first = pipeline.evaluate(file, reference=str(pictures[0]), save_reference=kept, **settings)
    again = pipeline.evaluate(file, reference=str(kept), **settings)
    assert first["student"]["fid"] == pytest.approx(again["student"]["fid"])  # type: ignore[index]
    assert again["reference"]["num_images"] == 12  # type: ignore[index]
    with pytest.raises(UsageError, match=r"\.safetensors"):
        pipeline.evaluate(file, save_reference=tmp_path / "kept.npz", **settings)
