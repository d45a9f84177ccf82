"""The run folder: where each thing of a run lies. Light: imports no torch.

config.json   the resolved configuration, written before step 0
prompts.jsonl what a text teacher was asked for
log.jsonl     one line per logged step
scores.jsonl  one line per score of the student while it learns
previews/     PNG grids: the teacher's many-step samples above the student's, from the same noise
checkpoints/  complete states, newest last
student/      the student artifact, one safetensors file
samples/, evaluations/, export/: what the other commands make of it
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from bootcli.config import DistillConfig, from_dict, to_dict
from bootcli.errors import BootError, UsageError
from bootcli.store.files import TEMPORARY, atomic_file, check_free, read_json, write_json

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
    def _lock(self) -> Path:
        return self.path / ".lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process trains here; a new folder that stays empty goes away. Raises `UsageError` where one
        does."""
        from filelock import FileLock, Timeout

        is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{self.path} is being trained by another process.", "Wait for it, or choose another --output."
            ) from None
        try:
            yield
        finally:
            with suppress(OSError):  # Windows deletes it as it is released
                self._lock.unlink()
            lock.release()
            if is_new:
                with suppress(OSError):
                    self.path.rmdir()

    def is_locked(self) -> bool:
        """Whether a process trains here."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self._lock, timeout=0) if self._lock.exists() else nullcontext():
                return False
        except Timeout:
            return True
        except OSError:  # of another user
            return False

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
        check_free(self.path, overwrite=overwrite, mark=self.config_file.name, ours=(self._lock.name,))
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
        for unfinished in self.checkpoints.glob(f"{TEMPORARY}*"):  # of a process that was killed as it wrote
            unfinished.unlink()
        write_json(self.config_file, to_dict(config))

    def _clear(self) -> None:
        made = (self.previews, self.checkpoints, self.student.parent, self.samples, self.evaluations, self.exports)
        for folder in filter(Path.is_dir, made):
            for each in folder.iterdir():  # a link to a folder elsewhere stays, and leads to an empty one
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
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
        """The lines of the scores; those that a crash cut off are passed over."""
        read = (_object(line) for line in _lines(self.scores_file))
        return [line for line in read if line is not None]

    def trim(self, step: int) -> None:
        """Drop the lines of log and scores after ``step``, which a resumed run will write again."""
        for file in (self.log_file, self.scores_file):
            if file.exists():
                kept = [line for line in _lines(file) if _step_of(line) <= step]
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


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []


def _object(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _step_of(line: str) -> float:
    step = (_object(line) or {}).get("step")
    return float(step) if isinstance(step, int | float) else math.inf


def default_run(teacher: str, root: Path = RUNS) -> Path:
    """Make ``runs/<teacher>-<time>``, with a number behind it where two runs start in one second."""
    name = Path(teacher.replace(":", "-")).name or "teacher"
    base = root / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if os.environ.get("RANK", "0") != "0":  # accelerate starts a process for each device, of which one writes
        return base
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            break
    return path


def newest_run(root: Path = RUNS, *, with_student: bool = False) -> Path:
    """The run under ``root`` that was started last; with a student, where one has any. Raises `UsageError` when there
    is none."""
    runs = [path.parent for path in root.glob("*/config.json")] if root.is_dir() else []
    if not runs:
        raise UsageError(f"No run found under {root}/.", "Name a run folder, or make one with: bootcli distill")
    if with_student:
        runs = [run for run in runs if RunDir(run).student.is_file()] or runs
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime_ns)
