"""Short runs of everything a run can have."""

from __future__ import annotations

import pytest

from bootcli.config import DistillConfig, resolve
from bootcli.engine import Engine
from bootcli.pipelines.setup import Distillation, set_up
from bootcli.plugin import Teacher
from bootcli.trainer import StepReport, Trainer

EVERYTHING: dict[str, object] = {
    "corrector": True,
    "correction.warmup": 2,
    "refiner.share": 0.125,
    "refiner.teacher_steps": 1,
    "replay.share": 0.125,
    "replay.teacher_steps": 2,
    "replay.points": 1,
    "replay.buffer": 16,
    "kd.teacher_steps": 2,
    "kd.buffer": 16,
    "adversary.warmup": 1,
}
ADVERSARIES = {"boot": "replay.adversary", "freeflow": "replay.adversary", "kd": "kd.adversary"}
DIRECTIONS = {"boot": "score", "freeflow": "score", "kd": "identity"}
every_objective = pytest.mark.parametrize("objective", ["boot", "freeflow", "kd"])


def config_of(**settings: object) -> DistillConfig:
    base: dict[str, object] = {
        "objective": "boot",
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "optimizer.warmup_steps": 2,
        "device": "cpu",
        "mixed_precision": "no",
    }
    return resolve({**base, **settings})


def build(teacher: Teacher, config: DistillConfig) -> tuple[Distillation, Trainer]:
    engine = Engine(config.device, config.mixed_precision)
    work = set_up(teacher, config, engine)
    return work, Trainer(work, work.config, engine)


def run(teacher: Teacher, config: DistillConfig) -> tuple[Trainer, list[StepReport]]:
    _, trainer = build(teacher, config)
    return trainer, list(trainer.run())
