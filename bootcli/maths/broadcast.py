"""The one helper that lines a per-sample vector up with a batch of samples."""

from __future__ import annotations

from torch import Tensor


def like(v: Tensor, x: Tensor) -> Tensor:
    """Cast and reshape a vector (b,) so that it multiplies a batch (b, ...).

    Coefficients are computed in float64 on the CPU; this is the visible place where they take the dtype and the
    device of the samples. Samples are float32 or better, whatever the networks compute in.

    Args:
        v: shape (b,) or ().
        x: shape (b, ...).

    Returns:
        Shape (b, 1, ...), dtype and device of ``x``.
    """
    return v.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
