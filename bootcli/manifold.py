"""Improved precision and recall of an image set (Kynkäänniemi et al. 2019, arXiv 1904.06991).

| code | paper | shape |
|---|---|---|
| real, generated | Phi_r, Phi_g: the features of the real and of the generated images | (n, d), (m, d) |
| radii | ``|phi' - NN_k(phi', Phi)|``, the distance to the k-th nearest neighbour in the own set | (n,) |
| manifold | the union of the balls with these radii around the features of a set | |
| precision | the share of the generated features that lie in the real manifold (eq. 2) | scalar |
| recall | the share of the real features that lie in the generated manifold (eq. 2) | scalar |

Precision falls with images that look like nothing real, recall with real images that the generator cannot draw. Balls
shrink as a set grows, so the numbers of two evaluations compare only where all sets have one size. Even a perfect
generator stays below 1: balls around a finite set do not cover all that the set was drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k, as in the paper: large enough for stable numbers, small enough not to close the gaps between modes."""
MOST_ROWS = 10_000
"""Features of a set that are compared at most: the work grows with the square."""
CHUNK = 1000
"""Rows of a distance matrix at a time: 80 MB beside `MOST_ROWS` columns."""
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Manifold:
    """The union of balls around features.

    Args:
        centres: shape (n, d), float64.
        radii: shape (n,), float64.
    """

    centres: Tensor
    radii: Tensor


@dataclass(frozen=True)
class Quality:
    """Shares in [0, 1]: how much of what is drawn is real, and how much of what is real is drawn."""

    precision: float
    recall: float


def manifold_of(features: Tensor, k: int = NEIGHBOURS, chunk: int = CHUNK) -> Manifold:
    """A ball around each feature that reaches its k-th nearest neighbour in the set, itself not counted.

    Args:
        features: shape (n, d), more than k of them.
        k: which neighbour.
        chunk: rows at a time; bounds the memory and changes nothing.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} features have no neighbour number {k}")
    centres = features.double()
    # A feature is its own nearest neighbour: the k-th other one is the (k + 1)-th of the whole set.
    nearest = [distances.topk(k + 1, dim=1, largest=False).values for distances in _distances(centres, centres, chunk)]
    return Manifold(centres, torch.cat(nearest)[:, k])


def precision_recall(real: Manifold, generated: Manifold, chunk: int = CHUNK) -> Quality:
    """Equations 1 and 2. A point on the surface of a ball is inside.

    Args:
        real, generated: from `manifold_of` with one k, n and m features of one dimension.
        chunk: generated features at a time; bounds the memory and changes nothing.
    """
    slack = _ROUNDING * max(float(one.centres.norm(dim=1).max()) for one in (real, generated))
    drawn = torch.zeros(len(real.centres), dtype=torch.bool)
    plausible = 0
    distances = _distances(generated.centres, real.centres, chunk)
    for from_chunk, radii in zip(distances, torch.split(generated.radii, chunk), strict=True):
        plausible += int((from_chunk <= real.radii + slack).any(1).sum())
        drawn |= (from_chunk <= radii[:, None] + slack).any(0)
    return Quality(plausible / len(generated.centres), float(drawn.double().mean()))


def some_rows(features: Tensor, count: int) -> Tensor:
    """``count`` rows of (n, d), the same ones every time, drawn at random because sets are often sorted by class."""
    if len(features) <= count:
        return features
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:count]]


def _distances(a: Tensor, b: Tensor, chunk: int) -> Iterator[Tensor]:
    """|a_i - b_j|, shapes (n, d) and (m, d), as matrices (chunk, m).

    As a matrix product, which is up to 18 times faster than differences. It rounds the squares: in float64 a distance
    of 0 comes out below 1e-7 of the features' norm, which `precision_recall` allows for.
    """
    for rows in torch.split(a, chunk):
        yield torch.cdist(rows, b, compute_mode="use_mm_for_euclid_dist")
