"""Muon: steps whose matrices are orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

torch.optim has a Muon for two-dimensional parameters and timm one for convolutions too. Both work through one matrix
after the other in bfloat16, which took 0.05 s of a 0.2 s update of the embedded teacher. Here the iteration runs on the
Gram matrices alone, many of one size together: a third of that time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x^3 + c x^5, which takes singular values from (0, 1] to about [0.7, 1.2] in five rounds."""
ROUNDS = 5
PIXELS = 4
"""Layers to or from this many channels or fewer (pixels, latents) are not hidden layers: AdamW does better there."""
CHUNK = 1 << 22
"""Elements worked on together."""


class Muon(torch.optim.AdamW):
    """Orthogonal steps for hidden matrices and convolutions, AdamW's for everything else.

    The steps are scaled to the root mean square that AdamW's have, 0.2 of the learning rate (Liu et al. 2025,
    arXiv 2502.16982, equation 4), so that one learning rate serves both.

    Args:
        params: of any shapes.
        lr, betas, weight_decay: as in AdamW.
        momentum: of the matrices; Nesterov's.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        params = list(params)
        # Fused on a CPU, where it is much the faster. On a GPU a fused AdamW unscales fp16's gradients itself, which
        # would leave out the matrices.
        fused = all(p.device.type == "cpu" for p in params)
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
        self._step_supports_amp_scaling = False
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; it uses the gradients up."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            alike: defaultdict[int, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None and is_hidden(p):
                    alike[min(p.flatten(1).shape)].append(p)
            for members in alike.values():
                for part in chunks(members):
                    self._step_alike(part, group["lr"], group["weight_decay"])
        super().step()
        return loss

    def _step_alike(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Step matrices that have a smaller side in common."""
        grads, averages = [], []
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros(()), "average": torch.zeros_like(p)}  # AdamW looks for a step
            averages.append(self.state[p]["average"])
            if p.grad is not None:
                grads.append(p.grad)
            p.grad = None  # AdamW passes over it
        torch._foreach_lerp_(averages, grads, 1 - self.momentum)
        updates = [update.flatten(1) for update in torch._foreach_lerp(grads, averages, self.momentum)]
        for p, step in zip(params, orthogonal(updates), strict=True):
            if weight_decay:
                p.mul_(1 - lr * weight_decay)
            p.add_(step.view_as(p), alpha=-lr * 0.2 * math.sqrt(max(step.shape)))


def is_hidden(p: Tensor) -> bool:
    """Whether a parameter is the matrix or convolution of a hidden layer."""
    return p.ndim >= 2 and min(p.shape[:2]) > PIXELS


def chunks(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, in lists of at most `CHUNK` elements or one parameter."""
    part: list[nn.Parameter] = []
    for p in params:
        if part and sum(q.numel() for q in part) + p.numel() > CHUNK:
            yield part
            part = []
        part.append(p)
    if part:
        yield part


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """For each matrix about the nearest (semi-)orthogonal one: U V^T of its SVD.

    The Newton-Schulz iteration X <- P X with P = a + b A + c A^2 and A = X X^T needs X only at its ends, because
    A <- P A P. That is less work, and matrices of any length go together; but it needs float32: what rounding leaves of
    a zero eigenvalue grows by a^2 each round.

    Args:
        matrices: shapes (rows, columns), the smaller side the same for all.
    """
    tall = [matrix.shape[0] > matrix.shape[1] for matrix in matrices]
    raw = [(matrix.mT if flip else matrix).float() for matrix, flip in zip(matrices, tall, strict=True)]
    wide = torch._foreach_div(raw, torch._foreach_clamp_min(torch._foreach_norm(raw), 1e-12))
    a, b, c = COEFFICIENTS
    gram = torch.stack([x @ x.mT for x in wide])
    product = torch.eye(gram.shape[1], device=gram.device).expand_as(gram)
    for _ in range(ROUNDS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        product = p @ product
        gram = p @ gram @ p
    results = [q @ x for q, x in zip(product, wide, strict=True)]
    return [(o.mT if flip else o).to(m.dtype) for o, flip, m in zip(results, tall, matrices, strict=True)]
