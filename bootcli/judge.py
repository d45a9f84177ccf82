"""The judge D: it tells the teacher's samples from the student's by what the frozen teacher makes of them inside.

Small heads on the features of a denoiser, after LADD (Sauer et al. 2024, arXiv 2403.12015): the teacher knows images
already, and heads alone learn in a few hundred updates.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from bootcli.errors import UsageError
from bootcli.teachers.protocol import Cond, Teacher


class Features:
    """What the teacher's `feature_layers` give, without running what comes after them.

    Args:
        teacher: on its device, frozen; its weights are shared.

    Raises `UsageError` where the teacher names no layers.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        # The same weights in modules of its own: the hooks are not the teacher's, and no compiled call passes them by.
        shared = {id(tensor): tensor for tensor in (*teacher.net.parameters(), *teacher.net.buffers())}
        self.net = copy.deepcopy(teacher.net, shared)
        layers = teacher.feature_layers(self.net)
        if not layers:
            raise UsageError(
                "This teacher names no layers for an adversary.", "Leave kd.adversary and replay.adversary at 0."
            )
        self._seen: list[Tensor] = []
        for layer in layers:
            layer.register_forward_hook(self._keep)
        layers[-1].register_forward_hook(self._stop)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Maps (b, channels, height, width), with a gradient for x_t where that asks for one; float32."""
        self._seen = []
        with suppress(_Enough):
            self.teacher.predict(self.net, x_t, t, cond)
        seen, self._seen = self._seen, []
        return [features.float() for features in seen]

    def _keep(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._seen.append(output)

    def _stop(self, module: nn.Module, args: object, output: Tensor) -> None:
        raise _Enough


class _Enough(Exception):
    """All features are there."""


class Judge(nn.Module):
    """One head on each map of features.

    Args:
        channels: of the maps.
        width: of the heads.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(each, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 1)) for each in channels
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """How sure it is, at each place of each map, that the sample is the teacher's: logits (b, places)."""
        return [head(each).flatten(1) for head, each in zip(self.heads, features, strict=True)]


@torch.no_grad()
def make_judge(features: Features, cond: Cond, width: int) -> Judge:
    """A judge for these features; ``cond`` is any condition, one row, on their device."""
    teacher = features.teacher
    x = next(teacher.net.parameters()).new_zeros(1, *teacher.spec.sample_shape)
    maps = features(x, torch.full((1,), 0.5, dtype=torch.float64), cond)
    return Judge([each.shape[1] for each in maps], width).to(x.device)
