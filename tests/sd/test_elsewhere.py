"""A run of Stable Diffusion on a device of its own: see `tests.elsewhere`."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from bootcli_sd.teacher import SDTeacher

from bootcli.pipelines.distill import Session
from bootcli.store.rundir import RunDir
from bootcli.teachers.registry import load
from tests.elsewhere import elsewhere
from tests.training.short import EVERYTHING, build, config_of

from .conftest import MakeFolder


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "kd", "kd.adversary": 0.5, "student.lora_rank": 2, "correction.critic": "lora"},
        {"guidance_scale": 3.0, "memory.offload_teacher": True, "optimizer.gradient_checkpointing": True},
        {"objective": "freeflow", "guidance_range": (1.5, 4.0)},
    ],
    ids=["lora", "offloaded", "range"],
)
def test_a_run_with_prompts_works_elsewhere(
    settings: dict[str, object], make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = str(make_folder())
    teacher = load(folder).teacher
    assert isinstance(teacher, SDTeacher)
    ((encoder, _),) = teacher.text.pairs
    before: dict[str, object] = {**EVERYTHING, "student.path_start": "noise", "student.max_gain": 20.0}
    config = config_of(**before | settings, steps=2)
    teacher.release()
    work, trainer = build(teacher, config)
    assert not teacher.other_parts(), "what encoded the first prompts is gone"
    assert trainer.fitting() == 1
    assert not teacher.other_parts(), "no encoder takes room while micro-batches are tried"
    teacher = load(folder).teacher
    assert isinstance(teacher, SDTeacher)
    ((encoder, _),) = teacher.text.pairs
    with elsewhere() as device, mock.patch.object(teacher, "release"):
        work, trainer = build(teacher, config)
        session = Session(RunDir(tmp_path / "run"), work, trainer, "sd", trainer.engine)
        assert [*session.encode()]
        assert next(encoder.parameters()).device == device
        reports = list(trainer.run())
    assert len(reports) == 2
