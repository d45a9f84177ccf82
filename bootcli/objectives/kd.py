"""Direct distillation: regress on the ends of the teacher's own paths (Luhman and Luhman 2021, arXiv 2101.02388).

Data-free too: a path starts from prior noise. A path costs many evaluations, so paths are kept in a bounded buffer, and
each is drawn ``reuse`` times on average before a newer one takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bootcli.config import KDConfig
from bootcli.engine import Engine
from bootcli.maths.signal_ode import solve
from bootcli.objectives.base import Objective, Terms, adaptive, conditions, path_start
from bootcli.student import Student
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView

FIRST_FILL = 16
"""Batches in the buffer before the first update."""


@dataclass(frozen=True)
class KDDraw:
    """One batch; the noise and the ends are on the CPU until `KD.take`.

    Args:
        eps: noise (b, c, h, w), float32.
        rows: conditions, (b,), int64.
        ends: where the teacher's paths from ``eps`` end, (b, c, h, w).
    """

    eps: Tensor
    rows: Tensor
    ends: Tensor


class KD(Objective[KDDraw]):
    """Regression on the teacher's samples.

    Args:
        config: teacher steps, buffer.
        teacher: the denoiser f.
        t_min: target time of a sample.
        t_max: where the path starts.
        pool: the conditions that paths are drawn for.
    """

    def __init__(self, config: KDConfig, teacher: TeacherView, t_min: float, t_max: float, pool: Cond) -> None:
        self.config = config
        self.teacher = teacher
        self.t_min = t_min
        self.t_max = t_max
        self.pool = pool
        shape = teacher.teacher.spec.sample_shape
        self._eps, self._ends = torch.empty(0, *shape), torch.empty(0, *shape)
        self._rows = torch.empty(0, dtype=torch.long)
        self._next = 0

    def renew(self, generator: torch.Generator, batch_size: int, step: int, engine: Engine) -> None:
        """Put new paths into the buffer: some batches before the first update, later one every ``reuse`` updates."""
        if not len(self._eps):
            count = min(self.config.buffer, FIRST_FILL * batch_size)
        elif step % self.config.reuse == 0:
            count = batch_size
        else:
            return
        count += -count % engine.num_processes
        eps = torch.randn(count, *self._eps.shape[1:], generator=generator)
        rows = conditions(generator, count, len(self.pool))
        mine = slice(engine.rank * count // engine.num_processes, (engine.rank + 1) * count // engine.num_processes)
        parts = zip(torch.split(eps[mine], batch_size), torch.split(rows[mine], batch_size), strict=True)
        ends = engine.gather(torch.cat([self._ends_of(e, r, engine) for e, r in parts])).cpu()
        for start in range(0, count, self.config.buffer):
            part = slice(start, start + self.config.buffer)
            self._store(eps[part], rows[part], ends[part])

    @torch.no_grad()
    def _ends_of(self, eps: Tensor, rows: Tensor, engine: Engine) -> Tensor:
        eps, cond = eps.to(engine.device), self.pool.rows(rows).to(engine.device)
        t, s = (torch.full((len(eps),), at, dtype=torch.float64) for at in (self.t_max, self.t_min))

        def denoiser(x: Tensor, at: Tensor) -> Tensor:
            return self.teacher.x0(x, at, cond)

        with engine.autocast():
            y = path_start(self.teacher, eps, cond, self.t_max)
            return solve(denoiser, self.teacher.schedule, y, eps, t, s, self.config.solver, self.config.teacher_steps)

    def _store(self, eps: Tensor, rows: Tensor, ends: Tensor) -> None:
        """Append while there is room; then the oldest paths make room."""
        room = self.config.buffer - len(self._eps)
        self._eps = torch.cat([self._eps, eps[:room]])
        self._rows = torch.cat([self._rows, rows[:room]])
        self._ends = torch.cat([self._ends, ends[:room]])
        late = (self._next + torch.arange(max(0, len(eps) - room))) % self.config.buffer
        self._eps[late], self._rows[late], self._ends[late] = eps[room:], rows[room:], ends[room:]
        self._next = (self._next + len(late)) % self.config.buffer

    def state(self) -> dict[str, Tensor]:
        """The buffer."""
        return {"eps": self._eps, "rows": self._rows, "ends": self._ends, "next": torch.tensor(self._next)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a buffer back. Raises `KeyError` where it does not fit."""
        self._eps, self._rows, self._ends = tensors["eps"].cpu(), tensors["rows"].cpu(), tensors["ends"].cpu()
        self._next = int(tensors["next"])

    def draw(self, generator: torch.Generator, batch_size: int, pool: int, progress: float) -> KDDraw:
        """Paths of the buffer, uniformly."""
        index = torch.randint(len(self._eps), (batch_size,), generator=generator)
        return KDDraw(self._eps[index], self._rows[index], self._ends[index])

    def take(self, draw: KDDraw, rows: slice, device: torch.device) -> KDDraw:
        """The rows of a draw, with noise and ends on a device."""
        return KDDraw(draw.eps[rows].to(device), draw.rows[rows], draw.ends[rows].to(device))

    def loss(self, student: Student, draw: KDDraw, cond: Cond) -> Terms:
        """The squared error of y(eps, t_min, c) to the end of the teacher's path."""
        t = torch.full((len(draw.eps),), self.t_min, dtype=torch.float64)
        square = (student(draw.eps, t, cond) - draw.ends).square().flatten(1).mean(1)
        weight = adaptive(square, self.config.power)
        loss = (weight * square).mean()
        pull = 2 * weight * square.detach().sqrt()
        return Terms(loss, {"regression": loss.detach()}, square.detach(), t, pull)
