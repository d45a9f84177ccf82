"""What a network predicts, to and from x_0. The one place that converts.

| kind | prediction | x_0 |
|---|---|---|
| eps | eps | (x_t - sigma * eps) / alpha |
| x0 | x_0 | itself |
| v | alpha * eps - sigma * x_0 (Salimans and Ho 2022) | (alpha * x_t - sigma * v) / (alpha^2 + sigma^2) |
| flow | eps - x_0 (Lipman et al. 2023) | (x_t - sigma * u) / (alpha + sigma) |
"""

from __future__ import annotations

from typing import Literal, assert_never

from torch import Tensor

from bootcli.maths.broadcast import like
from bootcli.maths.schedule import Coefficients

PredictionType = Literal["eps", "x0", "v", "flow"]


def to_x0(kind: PredictionType, prediction: Tensor, x_t: Tensor, at: Coefficients) -> Tensor:
    """x_0 from a raw prediction.

    Args:
        kind: what ``prediction`` is.
        prediction: shape (b, ...).
        x_t: the noisy input, shape (b, ...).
        at: coefficients at its time, each (b,). ``eps`` needs alpha > 0.

    Returns:
        Shape (b, ...), dtype of ``x_t``.
    """
    alpha, sigma = like(at.alpha, x_t), like(at.sigma, x_t)
    prediction = prediction.to(x_t.dtype)
    match kind:
        case "x0":
            return prediction
        case "eps":
            return (x_t - sigma * prediction) / alpha
        case "v":
            return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
        case "flow":
            return (x_t - sigma * prediction) / (alpha + sigma)
        case _:
            assert_never(kind)


def from_x0(kind: PredictionType, x_0: Tensor, x_t: Tensor, at: Coefficients) -> Tensor:
    """The raw prediction that means ``x_0``: the inverse of `to_x0`. All kinds but ``x0`` need sigma > 0."""
    alpha, sigma = like(at.alpha, x_t), like(at.sigma, x_t)
    if kind == "x0":
        return x_0
    eps = (x_t - alpha * x_0) / sigma
    match kind:
        case "eps":
            return eps
        case "v":
            return alpha * eps - sigma * x_0
        case "flow":
            return eps - x_0
        case _:
            assert_never(kind)
