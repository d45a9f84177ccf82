"""The student: it maps prior noise and a wanted time to the signal, in one call.

It is a copy of the teacher's network, or a LoRA in that.

| code | paper | shape |
|---|---|---|
| eps | prior noise | (b, c, h, w) |
| t | target time | (b,) |
| y | y(eps, t, c), BOOT's g_theta | (b, c, h, w) |

The backbone always sees pure noise, so its native timestep stays at t = 1. The target time enters by a branch of its
own, added to the time embedding as ``e(t) - e(t_min)``: at t_min the student is exactly a stock network, which any
program that sends the last timestep can run.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from bootcli.lora import Lora
from bootcli.maths.prediction import to_x0
from bootcli.teachers.protocol import Cond, Head, Teacher


class TimeBranch(nn.Module):
    """``e(t) - e(t_min)``: Fourier features of t, one hidden layer, a zero-initialised output.

    Args:
        width: of the embedding it is added to.
        t_min: where the branch is exactly 0, whatever its weights.
        frequencies: number of sine and cosine pairs, geometric from 1 to 32 radians. The signal is smooth in t; much
            higher frequencies would leave t_min, where samples are drawn, unlike the times trained beside it.
    """

    def __init__(self, width: int, t_min: float, frequencies: int = 16) -> None:
        super().__init__()
        self.t_min = t_min
        self.frequencies = frequencies
        self.hidden = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, t: Tensor) -> Tensor:
        """The offset for times (b,), float64 CPU: shape (b, width), on the device of the weights."""
        weight = self.out.weight
        times = torch.cat([t, t.new_tensor([self.t_min])])
        ladder = torch.logspace(0, 5, self.frequencies, base=2, dtype=torch.float64)
        angles = times[:, None] * ladder
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(weight.device, weight.dtype)
        hidden = self.hidden(features)
        # The difference is taken before the last layer, so that it is exactly 0 at t_min in any precision.
        offset: Tensor = self.out(hidden[:-1] - hidden[-1:])
        return offset


class Student(nn.Module):
    """y(eps, t, c).

    Args:
        teacher: its family's knowledge (how to call the network, where to inject); its weights are copied, or shared
            where there is a LoRA.
        head: ``native`` reads the output as the teacher's prediction type at t = 1 and converts it to x_0; ``x0``
            reads the output as y itself.
        t_min: the target time of a sample.
        lora: of the student, in the teacher's network; None: the whole network learns.
        guidance_range: least and greatest w that it takes with its conditions; None: w is built in. Of whole networks
            only.

    Raises `UsageError` where the teacher's network has no place for w.
    """

    net: nn.Module

    def __init__(
        self,
        teacher: Teacher,
        head: Head,
        t_min: float,
        lora: Lora | None = None,
        guidance_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.head: Head = head
        self.lora = lora
        self.guidance_range = guidance_range
        if lora is None:
            self.net = copy.deepcopy(teacher.net).float().requires_grad_(True)
            if guidance_range is not None:
                teacher.add_guidance_input(self.net, guidance_range)
        else:
            self.__dict__["net"] = teacher.net  # not registered: what the student learns is the LoRA
        site, width = teacher.embedding_site(self.net)
        self.time_branch = TimeBranch(width, t_min)
        self._offset: Tensor | None = None
        site.register_forward_hook(self._add_offset)

    @property
    def t_min(self) -> float:
        """The target time of a sample."""
        return self.time_branch.t_min

    def _add_offset(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output if self._offset is None else output + self._offset.to(output.dtype)

    def forward(self, eps: Tensor, t: Tensor, cond: Cond, start: Tensor | None = None) -> Tensor:
        """The signal at target times ``t`` on the paths that start from ``eps``; float32.

        Args:
            eps: prior noise, (b, c, h, w); with ``start``, samples ``x`` at those times.
            t: target times, (b,).
            cond: conditions of the samples.
            start: times that the paths start at, (b,); None is t = 1, pure noise.
        """
        t, start = t.cpu(), None if start is None else start.cpu()  # several processes move what they pass to a GPU
        self._offset = self.time_branch(t)
        try:
            return self.sample(eps, cond, start)
        finally:
            self._offset = None

    def sample(self, eps: Tensor, cond: Cond, start: Tensor | None = None) -> Tensor:
        """y(eps, t_min, c): the stock network alone, without the time branch (which is 0 there)."""
        spec = self.teacher.spec
        x = spec.schedule.prior_scale * eps if start is None else eps
        at = torch.ones(len(eps), dtype=torch.float64) if start is None else start
        with self._adapted():
            output = self.teacher.predict(self.net, x, at, cond).float()
        if self.head == "x0":
            return output
        return to_x0(spec.prediction, output, x.float(), spec.schedule(at))

    def _adapted(self) -> AbstractContextManager[None]:
        return nullcontext() if self.lora is None else self.lora.active()

    def merge(self) -> None:
        """Fold a LoRA into the network, which is no longer the teacher's: from here on this is an ordinary student."""
        if self.lora is not None:
            del self.__dict__["net"]
            self.net, self.lora = self.lora.merge(), None

    def start_at(self, mean: Tensor, eps: Tensor, cond: Cond) -> None:
        """Make an ``x0`` head a good place to start from.

        The last layer spoke another language (eps): its weights are kept at a small scale, so that the gradient reaches
        the layers below from the first step, and its bias is set so that samples begin near the mean that is given.

        Args:
            mean: of the teacher's x_0 at the start of the path, (c,).
            eps, cond: any samples to call the network with.
        """
        layer = self.teacher.output_layer(self.net)
        weight, bias = layer.weight, layer.bias
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            raise TypeError("the output layer needs a weight and a bias")
        with torch.no_grad():
            weight.mul_(1 / math.sqrt(weight[0].numel()))
            bias[: len(mean)] = mean  # what comes after the channels of the image is cut off (a learned variance)
            if (self.sample(eps, cond).mean((0, 2, 3)) * mean).sum() < 0:
                bias.neg_()  # the prediction is the negative of what the layer gives (EDM's VE)

    def borrow_features(self, start_t: float, eps: Tensor, cond: Cond) -> None:
        """Start with the features of another time.

        At t = 1 a network does little but copy its input or guess a mean, while at middle times its features draw: the
        bias of the time embedding is shifted so that the copy, called at t = 1, has those of ``start_t``. It stays a
        stock network. Of a teacher of classes, whose embedding is not the sum of both, it is the shift of one class.

        Args:
            start_t: whose features.
            eps, cond: any samples to call the network with; the shift is that of the first.
        """
        with torch.no_grad():
            shift = self._embedding(start_t, eps, cond) - self._embedding(1.0, eps, cond)
            site, width = self.teacher.embedding_site(self.net)
            biases = [p for name, p in site.named_parameters() if name.endswith("bias") and p.shape == (width,)]
            if biases:  # the last one is that of the embedding's last layer
                biases[-1].add_(shift)

    def _embedding(self, t: float, eps: Tensor, cond: Cond) -> Tensor:
        """The time embedding at t, shape (width,)."""
        site, _ = self.teacher.embedding_site(self.net)
        seen: list[Tensor] = []
        handle = site.register_forward_hook(lambda module, args, output: seen.append(output.detach().float()))
        try:
            self.teacher.predict(self.net, eps, torch.full((len(eps),), t, dtype=torch.float64), cond)
        finally:
            handle.remove()
        return seen[0][0]
