"""The times between which a student of few steps goes on (`bootcli.objectives.refiner`)."""

from __future__ import annotations

import torch

from bootcli.config import DistillConfig
from bootcli.errors import UsageError
from bootcli.pipelines.defaults import start_time
from bootcli.teachers.protocol import Teacher


def refiner_times(teacher: Teacher, config: DistillConfig) -> tuple[float, ...]:
    """The times of ``refiner.sigmas``; none where nothing is refined.

    Raises `UsageError` for levels that do not fall, or are not those of times within the path.
    """
    if not config.refiner.share:
        return ()
    sigmas, schedule = config.refiner.sigmas, teacher.spec.schedule
    times = tuple(schedule.time_of(sigma) for sigma in sigmas)
    start, end = start_time(teacher, config), config.student.t_min
    levels = [schedule(torch.tensor(t, dtype=torch.float64)) for t in (max(end, 1e-12), start)]
    low, high = (float(level.sigma / level.alpha) for level in levels)  # EDM's begin above 0
    falling = bool(sigmas) and list(sigmas) == sorted(set(sigmas), reverse=True)
    if not falling or not end < times[-1] or not sigmas[0] < high:
        raise UsageError(
            f"refiner.sigmas = {list(sigmas)}: give one or more noise levels, falling, between {round(low, 6):.3g} and "
            f"{high:.3g}, those of the ends of the path."
        )
    return times


def refinement_starts(teacher: Teacher, config: DistillConfig, nfe: int) -> tuple[float, ...]:
    """The times that a student trained for few steps goes on from, to sample in ``nfe`` calls: nfe - 1 of its times.

    Raises `UsageError` for more calls than it was trained for.
    """
    times = refiner_times(teacher, config)
    if nfe > 1 + len(times):
        trained = f"at most {1 + len(times)}" if times else "one step only"
        raise UsageError(
            f"--nfe {nfe}: this student was trained for {trained}.",
            "" if times else "Distil one for more with: --set refiner.share=0.15",
        )
    # Spread over all trained times; a single one is the middle.
    return tuple(times[(2 * i + 1) * len(times) // (2 * (nfe - 1))] for i in range(nfe - 1))
