"""Direct distillation: regress on the ends of the teacher's own paths (Luhman and Luhman 2021, arXiv 2101.02388).

Data-free too: a path starts from prior noise. A path costs many evaluations, so paths are kept in a bounded buffer, and
each is drawn ``reuse`` times on average before a newer one takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from bootcli.config import PathsConfig
from bootcli.deck import Pool
from bootcli.engine import Engine
from bootcli.maths.signal_ode import follow
from bootcli.objectives.base import Objective, Terms, conditions, regression
from bootcli.student import Student
from bootcli.teachers.protocol import Cond, Conditions
from bootcli.teachers.view import TeacherView

_NAMES = ("eps", "rows", "points")
FIRST_BATCHES = 16
"""Updates that each put a batch of paths into the buffer, before only one in ``reuse`` does."""


@dataclass(frozen=True)
class KDDraw:
    """One batch; the noise and the ends are on the CPU until `KD.take`.

    Args:
        eps: noise (b, c, h, w), float32.
        rows: conditions, (b,), int64.
        t: times of the points, (b,), float64.
        points: where the teacher's paths from ``eps`` are at t, (b, c, h, w).
    """

    eps: Tensor
    rows: Tensor
    t: Tensor
    points: Tensor


class KD(Objective[KDDraw]):
    """Regression on the teacher's samples.

    Args:
        config: teacher steps, buffer.
        power: of the `adaptive` weight of each error.
        teacher: the denoiser f.
        t_min: target time of a sample.
        t_max: where the path starts.
        pool: the conditions that paths are drawn for.

    With ``config.points`` above 1 the student learns points all along the path, the end among them: this grounds an
    objective that bootstraps (``replay.share``).
    """

    def __init__(
        self, config: PathsConfig, power: float, teacher: TeacherView, t_min: float, t_max: float, pool: Conditions
    ) -> None:
        self.config = config
        self.power = power
        self.teacher = teacher
        self.t_min = t_min
        self.t_max = t_max
        self.pool = pool
        shape, points = teacher.teacher.spec.sample_shape, config.points
        assert config.solver != "auto", "resolved"
        assert config.buffer is not None, "resolved"
        self._solver, self._size = config.solver, config.buffer
        self._steps = math.ceil(config.teacher_steps / points)  # from a point to the next
        falling = torch.linspace(1, 0, self._steps * points + 1, dtype=torch.float64) ** config.step_power
        self._grid = t_min + (t_max - t_min) * falling
        self._times = self._grid[self._steps :: self._steps]
        # Of the whole size at once, which takes memory as it is filled: to grow it would copy it each time.
        self._eps, self._points = torch.empty(config.buffer, *shape), torch.empty(config.buffer, points, *shape)
        self._rows = torch.empty(config.buffer, dtype=torch.long)
        self._count = self._next = 0
        self._undo: list[tuple[int, int, Tensor, tuple[Tensor, ...]]] = []

    def renew(
        self,
        generator: torch.Generator,
        batch_size: int,
        pool: Pool,
        step: int,
        engine: Engine,
        at_once: int | None = None,
    ) -> None:
        """Put a batch of new paths into the buffer: every update while it holds few, later every ``reuse`` updates."""
        self._undo = []
        if self._count >= min(self._size, FIRST_BATCHES * batch_size) and step % self.config.reuse:
            return
        size = at_once or batch_size
        eps = torch.randn(batch_size, *self._eps.shape[1:], generator=generator)
        rows = conditions(generator, batch_size, pool, self.teacher.levels)
        # As many for each process, so that some may be followed twice.
        share = math.ceil(batch_size / engine.num_processes)
        mine = torch.arange(engine.rank * share, (engine.rank + 1) * share) % batch_size
        parts = zip(torch.split(eps[mine], size), torch.split(rows[mine], size), strict=True)
        points = engine.gather(torch.cat([self._follow(e, r, engine) for e, r in parts])).cpu()[:batch_size]
        for start in range(0, batch_size, self._size):
            part = slice(start, start + self._size)
            self._store(eps[part], rows[part], points[part])

    @torch.no_grad()
    def _follow(self, eps: Tensor, rows: Tensor, engine: Engine) -> Tensor:
        """The points of the teacher's paths from ``eps``, (b, points, c, h, w)."""
        eps, cond = eps.to(engine.device), self.pool.rows(rows).to(engine.device)

        def denoiser(x: Tensor, at: Tensor) -> Tensor:
            return self.teacher.x0(x, at, cond)

        times = [t.expand(len(eps)) for t in self._grid]
        with engine.autocast():
            y = self.teacher.start_of_path(eps, cond, self.t_max)
            path = follow(denoiser, self.teacher.schedule, y, eps, times, self._solver)
            return torch.stack([*islice(path, self._steps - 1, None, self._steps)], 1)

    def _store(self, eps: Tensor, rows: Tensor, points: Tensor) -> None:
        """Append while there is room; then the oldest paths make room."""
        new = min(len(eps), self._size - self._count)
        late = (self._next + torch.arange(len(eps) - new)) % self._size
        self._undo.append((self._count, self._next, late, tuple(kept[late] for kept in self._kept)))
        places = torch.cat([self._count + torch.arange(new), late])
        for kept, given in zip(self._kept, (eps, rows, points), strict=True):
            kept[places] = given
        self._count += new
        self._next = (self._next + len(late)) % self._size

    def take_back(self) -> None:
        """See `Objective.take_back`."""
        for count, place, late, before in reversed(self._undo):
            for kept, old in zip(self._kept, before, strict=True):
                kept[late] = old
            self._count, self._next = count, place
        self._undo = []

    @property
    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._eps, self._rows, self._points

    def state(self) -> dict[str, Tensor]:
        """The part of the buffer that is filled."""
        filled = {name: kept[: self._count] for name, kept in zip(_NAMES, self._kept, strict=True)}
        return filled | {"next": torch.tensor(self._next)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a buffer back. Raises `KeyError` or `RuntimeError` where it does not fit."""
        self._count, self._next = len(tensors["eps"]), int(tensors["next"])
        for name, kept in zip(_NAMES, self._kept, strict=True):
            kept[: self._count] = tensors[name]

    def stand_in(self) -> dict[str, Tensor]:
        """One path of zeros."""
        zeros = {name: kept.new_zeros(1, *kept.shape[1:]) for name, kept in zip(_NAMES, self._kept, strict=True)}
        return zeros | {"next": torch.tensor(0)}

    def draw(self, generator: torch.Generator, batch_size: int, pool: Pool, progress: float) -> KDDraw:
        """Paths of the buffer, uniformly, and points on them, in turn."""
        path = torch.randint(self._count, (batch_size,), generator=generator)
        first = torch.randint(self.config.points, (1,), generator=generator)
        point = (first + torch.arange(batch_size)) % self.config.points
        return KDDraw(self._eps[path], self._rows[path], self._times[point], self._points[path, point])

    def take(self, draw: KDDraw, rows: slice, device: torch.device) -> KDDraw:
        """The rows of a draw, with noise and points on a device."""
        return KDDraw(draw.eps[rows].to(device), draw.rows[rows], draw.t[rows], draw.points[rows].to(device))

    def loss(self, student: Student, draw: KDDraw, cond: Cond) -> Terms:
        """The weighted squared error of y(eps, t, c) to the point of the teacher's path."""
        samples = student(draw.eps, draw.t, cond)
        rows, count = (draw.t == self._times[-1]).nonzero().flatten(), len(samples) / self.config.points
        return regression(samples, draw.points, self.power, draw.t, "regression", rows, count)
