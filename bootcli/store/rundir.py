"""The run folder: where each thing of a run lies. Light: imports no torch.

config.json   the resolved configuration, written before step 0
log.jsonl     one line per logged step
scores.jsonl  one line per score of the student while it learns
previews/     PNG grids: the teacher's many-step samples above the student's, from the same noise
checkpoints/  complete states, newest last
student/      the student artifact, one safetensors file
samples/, evaluations/, export/: what the other commands make of it
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bootcli.config import DistillConfig, from_dict, to_dict
from bootcli.errors import BootError, UsageError
from bootcli.store.files import atomic_file, check_free, read_json, write_json

RUNS = Path("runs")


@dataclass(frozen=True)
class RunDir:
    """Paths and small files of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def prompts(self) -> Path:
        """What a text teacher is asked for, as it was when the run began."""
        return self.path / "prompts.jsonl"

    @property
    def log_file(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "log.jsonl"

    @property
    def scores_file(self) -> Path:
        """One JSON object per score."""
        return self.path / "scores.jsonl"

    @property
    def best(self) -> Path:
        """The best student of an unfinished run."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def previews(self) -> Path:
        """PNG grids."""
        return self.path / "previews"

    @property
    def checkpoints(self) -> Path:
        """Files ``step-00000100.safetensors``."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """The student artifact."""
        return self.path / "student" / "student.safetensors"

    @property
    def samples(self) -> Path:
        """Images that `bootcli sample` drew."""
        return self.path / "samples"

    @property
    def evaluations(self) -> Path:
        """Scores that `bootcli evaluate` measured."""
        return self.path / "evaluations"

    @property
    def exports(self) -> Path:
        """The student in the formats of other programs."""
        return self.path / "export"

    def check_free(self, *, overwrite: bool) -> None:
        """Raise `UsageError` for a folder that is not empty, unless ``overwrite`` and it holds an earlier run."""
        check_free(self.path, overwrite=overwrite, mark=self.config_file.name)
        if self.config_file.exists() and not self._is_run():
            raise UsageError(
                f"{self.config_file} is not a run's, so {self.path} is not overwritten.", "Choose another --output."
            )

    def _is_run(self) -> bool:
        """Whether the config.json is a run's, of whatever version: other programs have files of that name too."""
        try:
            return {"teacher", "objective", "steps"} <= read_json(self.config_file).keys()
        except BootError:
            return False

    def create(self, config: DistillConfig, *, keep: bool) -> None:
        """Write the configuration into the folder; unless ``keep``, the files of an earlier run there go away."""
        if not keep:
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config_file, to_dict(config))

    def _clear(self) -> None:
        made = (self.previews, self.checkpoints, self.student.parent, self.samples, self.evaluations, self.exports)
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.log_file, self.scores_file, self.prompts):
            file.unlink(missing_ok=True)

    def config(self) -> DistillConfig:
        """The stored configuration. Raises `BootError` for a folder that is not a run or a broken file."""
        if not self.config_file.is_file():
            raise BootError(f"{self.path} is not a run folder: it has no config.json.", "Name a run, or leave it out.")
        try:
            return from_dict(read_json(self.config_file))
        except UsageError as error:
            raise BootError(f"{self.config_file}: {error.message}", error.hint) from error

    def log(self, line: Mapping[str, object]) -> None:
        """Append one line to the log."""
        _append(self.log_file, line)

    def log_score(self, line: Mapping[str, object]) -> None:
        """Append one line to the scores."""
        _append(self.scores_file, line)

    def scores(self) -> list[dict[str, object]]:
        """The lines of the scores."""
        if not self.scores_file.exists():
            return []
        return [json.loads(line) for line in self.scores_file.read_text(encoding="utf-8").splitlines()]

    def trim(self, step: int) -> None:
        """Drop the lines of log and scores after ``step``, which a resumed run will write again."""
        for file in (self.log_file, self.scores_file):
            if file.exists():
                kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
                with atomic_file(file) as temporary:
                    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _append(path: Path, line: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_known(line), allow_nan=False) + "\n")


def _known(value: object) -> object:
    """The same with None for every number that is not finite: JSON has no word for it."""
    if isinstance(value, Mapping):
        return {key: _known(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a crash


def default_run(teacher: str, root: Path = RUNS) -> Path:
    """``runs/<teacher>-<time>``; a number is added where two runs start in one second."""
    name = Path(teacher.replace(":", "-")).name or "teacher"
    base = root / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def newest_run(root: Path = RUNS) -> Path:
    """The run under ``root`` that was started last. Raises `UsageError` when there is none."""
    runs = [path.parent for path in root.glob("*/config.json")] if root.is_dir() else []
    if not runs:
        raise UsageError(f"No run found under {root}/.", "Name a run folder, or make one with: bootcli distill")
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime_ns)
