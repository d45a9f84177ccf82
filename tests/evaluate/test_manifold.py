"""Precision and recall: closed forms, a loop of plain Python, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bootcli.manifold import Manifold, Quality, manifold_of, precision_recall, some_rows


def cloud(seed: int, n: int, d: int = 6, at: float = 0.0, scale: float = 1.0) -> Tensor:
    """Normal features (n, d) around a point of the diagonal."""
    return at + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quality(real: Tensor, generated: Tensor, k: int = 3, chunk: int = 1000) -> Quality:
    return precision_recall(manifold_of(real, k, chunk), manifold_of(generated, k, chunk), chunk)


def share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    """Equation 1 word for word: the share of the points in at least one ball, in loops of floats."""

    def distance(a: list[float], b: list[float]) -> float:
        return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))

    rows: list[list[float]] = centres.double().tolist()
    radii = [sorted(distance(a, b) for j, b in enumerate(rows) if j != i)[k - 1] for i, a in enumerate(rows)]
    inside = [
        any(distance(point, centre) <= radius for centre, radius in zip(rows, radii, strict=True))
        for point in points.double().tolist()
    ]
    return sum(inside) / len(inside)


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_a_line_of_points_is_done_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    assert manifold_of(real, k=1).radii.tolist() == pytest.approx([1, 1, 1, 8], abs=1e-6)
    assert manifold_of(real, k=2).radii.tolist() == pytest.approx([2, 1, 2, 9], abs=1e-6)
    # The real balls cover [-1, 18], the generated ones [-6, 3] and [17, 20].
    generated = torch.tensor([[-3.0], [0.0], [18.0], [19.0]])
    assert manifold_of(generated, k=1).radii.tolist() == pytest.approx([3, 3, 1, 1], abs=1e-6)
    assert quality(real, generated, k=1) == Quality(precision=2 / 4, recall=3 / 4)


def test_identical_sets_have_all_of_each_other() -> None:
    assert quality(cloud(0, 50), cloud(0, 50)) == Quality(1, 1)


def test_disjoint_sets_have_nothing_of_each_other() -> None:
    assert quality(cloud(0, 50), cloud(1, 40, at=1e3)) == Quality(0, 0)


def test_one_mode_of_two_is_precise_and_recalls_half() -> None:
    modes = torch.cat([cloud(0, 30), cloud(1, 30, at=100.0)])
    assert quality(modes, cloud(0, 30)) == Quality(precision=1, recall=0.5)
    assert quality(cloud(0, 30), modes) == Quality(precision=0.5, recall=1)


def test_one_and_the_same_picture_recalls_itself_only() -> None:
    real = cloud(0, 40)
    collapsed = real[:1].expand(20, -1)
    assert quality(real, collapsed) == Quality(precision=1, recall=1 / 40), "balls of radius 0 still hold their centre"


def test_sets_of_copies_have_all_of_each_other() -> None:
    copies = 1e3 * cloud(0, 5).repeat_interleave(4, dim=0)  # k = 3 other copies of each: every radius is 0
    assert quality(copies, copies.flip(0)) == Quality(1, 1)


def test_a_point_on_the_surface_is_inside() -> None:
    real, generated = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [102.0]])
    assert quality(real, generated, k=1) == Quality(precision=0.5, recall=1)


# -- against loops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "k"), [(30, 30, 3), (40, 25, 1), (20, 35, 2)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_both_equal_loops_over_equation_1(n: int, m: int, k: int, scale: float) -> None:
    real, generated = (scale * one for one in (cloud(2, n, d=3), cloud(3, m, d=3, at=0.7, scale=0.6)))
    found = quality(real, generated, k)
    assert found == Quality(share_inside(generated, real, k), share_inside(real, generated, k))
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1


def test_single_and_half_precision_features_are_compared_in_double() -> None:
    real, generated = cloud(4, 200).half(), cloud(5, 200).float()
    assert quality(real, generated) == quality(real.double(), generated.double())
    assert manifold_of(real).radii.dtype == torch.float64


# -- what changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
def test_chunks_change_nothing(chunk: int) -> None:
    real, generated = cloud(6, 150), cloud(7, 100, at=0.4)
    whole = manifold_of(real, chunk=1000)
    torch.testing.assert_close(manifold_of(real, chunk=chunk).radii, whole.radii, rtol=1e-12, atol=0)
    assert quality(real, generated, chunk=chunk) == quality(real, generated, chunk=1000)


def test_the_order_of_rows_and_a_shift_of_all_change_nothing() -> None:
    real, generated = cloud(8, 80), cloud(9, 80, at=0.3)
    found = quality(real, generated)
    assert quality(real.flip(0), generated.flip(0)) == found
    assert quality(real + 5, generated + 5) == found


def test_precision_and_recall_change_places_with_the_sets() -> None:
    real, generated = cloud(10, 60), cloud(11, 90, at=0.5, scale=0.5)
    there, back = quality(real, generated), quality(generated, real)
    assert (there.precision, there.recall) == (back.recall, back.precision)


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    cdist = torch.cdist

    def spy(a: Tensor, b: Tensor, compute_mode: str) -> Tensor:
        shapes.append((len(a), len(b)))
        return cdist(a, b, compute_mode=compute_mode)

    monkeypatch.setattr(torch, "cdist", spy)
    quality(cloud(0, 100), cloud(1, 60), chunk=40)
    assert max(rows for rows, _ in shapes) == 40
    assert sum(rows for rows, _ in shapes) == 100 + 60 + 60


# -- arguments --------------------------------------------------------------------------------------------------------


def test_too_few_features_have_no_neighbour() -> None:
    with pytest.raises(ValueError, match="3 features have no neighbour number 3"):
        manifold_of(cloud(0, 3))
    assert isinstance(manifold_of(cloud(0, 4)), Manifold)


def test_some_rows_are_a_random_sample_and_the_same_every_time() -> None:
    rows = torch.arange(1000.0)[:, None]  # sorted, as files by class are
    some = some_rows(rows, 100)
    assert len(some) == len(some.unique()) == 100
    assert torch.equal(some, some_rows(rows, 100))
    assert 400 < some.mean() < 600
    assert torch.equal(some_rows(rows, 1000), rows)
