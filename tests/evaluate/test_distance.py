"""Frechet distances and statistics against independent mathematics, whatever SciPy is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid
from torch import Tensor, nn

from bootcli.errors import BootError
from bootcli.evaluate import Statistics, frechet, statistics_of

from .conftest import CPU, gaussian


def independent_frechet(a: Statistics, b: Statistics) -> float:
    """The trace of (C_a C_b)^(1/2) from the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2): no sqrtm."""
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ b.cov @ root).clip(0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap)


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
