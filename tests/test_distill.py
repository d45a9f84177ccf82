"""Runs as a user makes them: folders, resume, interruption, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bootcli.closed_form import GaussianTeacher
from bootcli.ema import EMA
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.maths.prediction import PredictionType
from bootcli.maths.schedule import Schedule, VarianceExploding
from bootcli.objectives.adversary import Adversary
from bootcli.objectives.corrector import Corrector
from bootcli.objectives.kd import KD
from bootcli.pipelines import distill as pipeline
from bootcli.pipelines.defaults import start_time
from bootcli.pipelines.distill import distill
from bootcli.pipelines.estimate import dry_run
from bootcli.pipelines.events import Finished, Previewed, Saved, Started, Stepped
from bootcli.pipelines.settings import resolve_config, resume_config
from bootcli.pipelines.setup import set_up
from bootcli.store.rundir import RunDir
from bootcli.teachers.registry import load
from bootcli.trainer import StepReport, Trainer
from tests.objectives.closed import DDPM, MEAN
from tests.training.short import config_of


@pytest.fixture
def settings(tiny_ddpm: Path) -> dict[str, object]:
    return {
        "teacher": str(tiny_ddpm),
        "steps": 6,
        "batch_size": 8,
        "device": "cpu",
        "preview_every": 3,
        "checkpoint_every": 2,
        "preview_teacher_steps": 4,
        "log_every": 1,
    }


def cli(*words: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bootcli", *words],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"},
    )


def test_a_run_tells_its_story_and_leaves_its_folder(settings: dict[str, object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert resolve_config(settings, {}, {}).objective == "kd", "what does best where no recipe says otherwise"
    events = []
    for event in distill(resolve_config(settings, {}, {}), run):
        if isinstance(event, Started):
            assert (run / "config.json").is_file(), "the configuration is written before step 0"
            assert not (run / "log.jsonl").exists()
        events.append(event)
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert [e.report.step for e in events if isinstance(e, Stepped)] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events if isinstance(e, Previewed)] == [3, 6]
    assert [e.step for e in events if isinstance(e, Saved)] == [2, 4, 6]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "residual", "residual_bins", "grad_norm", "learning_rate", "seconds"} <= lines[0].keys()
    assert (run / "student" / "student.safetensors").is_file()
    assert sorted(p.name for p in (run / "previews").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert len(list((run / "checkpoints").iterdir())) == 2, "only the newest are kept"
    config = json.loads((run / "config.json").read_text())
    assert config["student"]["head"] == "x0"
    assert config["student"]["max_gain"] == 20.0, "resolved"
    assert config["mixed_precision"] in ("no", "bf16"), "what the machine is best at, written down"


def test_a_resumed_run_equals_an_uninterrupted_one(settings: dict[str, object], tmp_path: Path) -> None:
    """Stopped by a real SIGINT in a real process, continued in another; every weight is equal bit for bit."""
    words = ["distill", "--teacher", str(settings["teacher"]), "--batch-size", "8", "--device", "cpu", "--steps", "60"]
    words += ["--preview-every", "0", "--set", "preview_teacher_steps=2", "--checkpoint-every", "0", "--seed", "3"]
    straight = cli(*words, "--output", "straight", cwd=tmp_path)
    stopped = cli(*words, "--output", "stopped", cwd=tmp_path)
    log = tmp_path / "stopped" / "log.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not log.exists():
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, said
    assert "--resume" in said
    assert not (tmp_path / "stopped" / "student").exists()
    resumed = cli("distill", "--resume", "--output", "stopped", cwd=tmp_path)
    _, said = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, said
    assert straight.wait(timeout=120) == 0
    straight.communicate()
    for place in ("student/student.safetensors", "checkpoints/step-00000060.safetensors"):
        one, two = (load_file(tmp_path / run / place) for run in ("straight", "stopped"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), place
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [1, 10, 20, 30, 40, 50, 60]


def test_sigterm_saves_and_exits_143(settings: dict[str, object], tmp_path: Path) -> None:
    process = cli("distill", "--teacher", str(settings["teacher"]), "--batch-size", "8", "--steps", "100000",
                  "--preview-every", "0", "--output", "run", cwd=tmp_path)  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not log.exists():
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("stop", "objective"), [(False, "boot"), (True, "boot"), pytest.param(False, "kd", marks=pytest.mark.slow)]
)
def test_two_processes_make_one_run(settings: dict[str, object], tmp_path: Path, stop: bool, objective: str) -> None:
    """The same losses as one process, three predictions among two too; a signal to one stops both at one step, with
    one checkpoint."""
    words = ["distill", "--teacher", str(settings["teacher"]), "--batch-size", "8", "--device", "cpu", "--seed", "3",
             "--set", "log_every=1", "--set", "preview_teacher_steps=2", "--mixed-precision", "no",
             "--steps", "100000" if stop else "3", "--set", "optimizer.warmup_steps=2",
             "--corrector", "--set", "correction.direction=identity", "--set", "correction.warmup=1",
             "--objective", objective, "--set", "refiner.share=0.375"]  # fmt: skip
    own = {"boot": ["boot.boundary_every=3"], "kd": ["kd.adversary=0.5", "adversary.warmup=0", "kd.teacher_steps=2"]}
    words += [word for setting in own[objective] for word in ("--set", setting)]
    together = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "bootcli",
         *words, "--output", "two", "--json"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    log = tmp_path / "two" / "log.jsonl"
    if stop:
        deadline = time.time() + 120
        while time.time() < deadline and not log.exists():
            time.sleep(0.01)
        _, second = sorted(psutil.Process(together.pid).children(), key=lambda worker: worker.pid)
        second.send_signal(signal.SIGINT)  # it alone hears of it, and it is not the one that writes
    try:
        out, said = together.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        for worker in psutil.Process(together.pid).children():
            worker.kill()
        together.kill()
        raise
    if stop:
        assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 1, said
        assert "--resume" in said
        return
    assert together.returncode == 0, said
    assert json.loads(out)["steps"] == 3
    alone = cli(*words, "--output", "one", cwd=tmp_path)
    _, said = alone.communicate(timeout=120)
    assert alone.returncode == 0, said
    two, one = (
        [json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("two", "one")
    )
    assert two == pytest.approx(one, rel=1e-3)


def test_resume_allows_longer_and_refuses_different(tiny_run: Path) -> None:
    assert resume_config(tiny_run, {"steps": 9}, {}, {}).steps == 9
    assert resume_config(tiny_run, {"log_every": 5}, {}, {}).log_every == 5
    assert resume_config(tiny_run, {"watch.every": 0}, {}, {}).watch.every == 0
    for change in ({"steps": 2}, {"seed": 1}, {"boot.delta": 0.2}, {"batch_size": 16}):
        with pytest.raises(UsageError, match=f"cannot change {next(iter(change))}"):
            resume_config(tiny_run, change, {}, {})


def test_a_folder_that_is_not_empty_is_refused(settings: dict[str, object], tmp_path: Path) -> None:
    config = resolve_config(settings, {}, {})
    keep = tmp_path / "precious.txt"
    keep.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            next(distill(config, tmp_path, overwrite=overwrite))
    assert list(tmp_path.iterdir()) == [keep]


def test_overwrite_replaces_an_earlier_run(settings: dict[str, object], tmp_path: Path) -> None:
    config = resolve_config({**settings, "steps": 2}, {}, {})
    list(distill(config, tmp_path / "run"))
    with pytest.raises(UsageError, match="not empty"):
        next(distill(config, tmp_path / "run"))
    list(distill(resolve_config({**settings, "steps": 1}, {}, {}), tmp_path / "run", overwrite=True))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "prompts.txt"}, "takes no prompts"),
        ({"classes": (1,)}, "has no classes"),
        ({"guidance_scale": 3.0}, "unconditional"),
        ({"negative_prompt": "blurry"}, "takes no prompts"),
        ({"student.max_gain": 2.0, "student.t_min": 0.5}, "no time range"),
        ({"student.max_gain": 0.001}, "no time range"),
        ({"student.path_start": "noise"}, r"paths begin at t = 0\.\d\d\."),
    ],
)
def test_what_the_teacher_cannot_honour_is_refused(
    settings: dict[str, object], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = resolve_config({**settings, **change}, {}, {})
    with pytest.raises(UsageError, match=message):
        next(distill(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_weights_that_end_up_broken_are_no_student(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update has no loss after it that could show a NaN."""

    def run(self: Trainer) -> Iterator[StepReport]:
        yield self._update(1)
        next(iter(self.ema.weights.values())).fill_(float("nan"))

    monkeypatch.setattr(Trainer, "run", run)
    with pytest.raises(BootError, match="not finite after step 1: no student"):
        list(distill(resolve_config(settings | {"steps": 1}, {}, {}), tmp_path / "run"))
    assert not (tmp_path / "run" / "student").exists()


def test_the_log_is_strict_json(settings: dict[str, object], tmp_path: Path) -> None:
    """One sample leaves four of the five time bins empty."""
    list(distill(resolve_config(settings | {"batch_size": 1, "steps": 1}, {}, {}), tmp_path / "run"))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["residual_bins"].count(None) == 4


def test_a_nan_keeps_the_last_good_state(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Trainer.run

    def poisoned(self: Trainer) -> Iterator[StepReport]:
        for report in honest(self):
            yield report
            if report.step == 3:
                with torch.no_grad():
                    next(iter(self.work.student.parameters())).fill_(float("nan"))

    monkeypatch.setattr(pipeline.Trainer, "run", poisoned)
    with pytest.raises(BootError, match=r"step 4.*step-00000003"):
        list(distill(resolve_config(settings, {}, {}), tmp_path / "run"))
    assert not RunDir(tmp_path / "run").student.exists()


def test_init_from_starts_at_the_other_students_weights(
    settings: dict[str, object], tiny_run: Path, tmp_path: Path
) -> None:
    config = resolve_config({**settings, "steps": 1, "learning_rate": 1e-12, "init_from": str(tiny_run)}, {}, {})
    list(distill(config, tmp_path / "run"))
    one, two = load_file(RunDir(tiny_run).student), load_file(RunDir(tmp_path / "run").student)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_dry_run_takes_updates_as_they_are_later(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the critic and the judge that come in late, and the teacher's paths by their share."""
    words = {"objective": "kd", "corrector": True, "correction.start": 600, "adversary.start": 600, "kd.reuse": 10}
    words |= {"kd.adversary": 0.5, "kd.teacher_steps": 2, "batch_size": 8, "steps": 1000}
    heard, reports = [], iter([1.0, 0.7, 0.2])
    for part in (Corrector, Adversary):
        loss = part.loss
        monkeypatch.setattr(
            part, "loss", lambda *a, loss=loss, **k: heard.append(k["listens"]) or loss(*a, **k)
        )  # fmt: skip
    update = Trainer._update
    monkeypatch.setattr(
        Trainer, "_update", lambda self, step: dataclasses.replace(update(self, step), seconds=next(reports))
    )
    estimate = dry_run(resolve_config(settings | words, {}, {}))
    assert heard == [True] * 6
    assert estimate.seconds_per_step == pytest.approx(0.2 + 0.5 / 10)
    assert estimate.total_seconds == pytest.approx(250 + 16 * 0.5), "with the paths of 16 batches in the first"
    assert estimate.config["correction"]["start"] == 600  # type: ignore[index]
    assert estimate.config["kd"]["reuse"] == 10  # type: ignore[index]
    for changed, seconds in (({"steps": 4}, 4 * 0.25 + 4 * 0.5), ({"max_minutes": 1.0}, 60)):
        reports = iter([1.0, 0.7, 0.2])
        estimate = dry_run(resolve_config(settings | words | changed, {}, {}))
        assert estimate.total_seconds == pytest.approx(seconds)
    reports = iter([1.0, 0.7, 0.4])
    monkeypatch.setattr(EMA, "update", lambda *_: time.sleep(0.1))
    away = dry_run(resolve_config(settings | words | {"memory.offload_ema": True}, {}, {}))
    assert away.seconds_per_step == pytest.approx(0.4 + 0.3 / 10 - 0.1 * 9 / 10, abs=0.03), "it moves every tenth time"


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_dry_run_makes_paths_in_two_updates_of_three(
    settings: dict[str, object], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small a part of the batch they are: the third tells what an update takes without."""
    made: list[int] = []
    follow, update = KD._follow, Trainer._update

    def follow_and_count(self: KD, *args: Any) -> torch.Tensor:
        made[-1] += 1
        return follow(self, *args)

    def update_and_count(self: Trainer, step: int) -> StepReport:
        made.append(0)
        return update(self, step)

    monkeypatch.setattr(KD, "_follow", follow_and_count)
    monkeypatch.setattr(Trainer, "_update", update_and_count)
    dry_run(resolve_config(settings | {"objective": "boot", "replay.share": share, "batch_size": 32}, {}, {}))
    assert [count > 0 for count in made[-3:]] == [True, True, False]


def test_dry_run_measures_and_writes_nothing(settings: dict[str, object], tmp_path: Path) -> None:
    estimate = dry_run(resolve_config(settings | {"objective": "boot"}, {}, {}))
    assert estimate.seconds_per_step > 0
    assert estimate.total_seconds == pytest.approx(6 * estimate.seconds_per_step)
    assert estimate.memory_bytes > 1e6
    assert estimate.parameters > 1000
    assert estimate.config["teacher"] == settings["teacher"]
    assert list(tmp_path.iterdir()) == []


def test_a_stored_run_needs_no_teacher_weights_to_sample(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bootcli.sampler import prior_noise
    from bootcli.store.artifact import load_student
    from bootcli.teachers import registry
    from bootcli.teachers.protocol import Cond

    monkeypatch.setattr(registry, "load", None)
    student = load_student(tiny_run).student
    eps = prior_noise([1, 2], (1, 8, 8))
    assert student.sample(eps, Cond()).shape == (2, 1, 8, 8)
    at_t_min = student(eps, torch.zeros(2, dtype=torch.float64), Cond())
    assert torch.equal(at_t_min, student.sample(eps, Cond())), "the time branch is exactly 0 at t_min"


def test_a_resumed_run_does_not_need_what_it_started_from(settings: dict[str, object]) -> None:
    config, engine = resolve_config(settings, {}, {}), Engine("cpu", "no")
    config = dataclasses.replace(config, init_from="gone")
    set_up(load(config.teacher).teacher, config, engine, fresh=False)
    with pytest.raises(BootError, match="gone"):
        set_up(load(config.teacher).teacher, config, engine)


@pytest.mark.parametrize(
    ("schedule", "prediction", "said", "level"),
    [
        (DDPM, "eps", None, 20.0),
        (DDPM, "eps", 5.0, 5.0),
        (VarianceExploding(), "x0", None, 20.0),
        (VarianceExploding(), "x0", 10.0, 10.0),
        (VarianceExploding(), "x0", 100.0, 80.0),
        (DDPM, "v", None, 157.4),  # all there is
        (DDPM, "v", 10.0, 10.0),
    ],
)
def test_the_noise_level_where_paths_begin(
    schedule: Schedule, prediction: PredictionType, said: float | None, level: float
) -> None:
    teacher = GaussianTeacher(MEAN, 0.5, schedule, prediction)
    at = schedule(torch.tensor(start_time(teacher, config_of(**{"student.max_gain": said})), dtype=torch.float64))
    assert float(at.sigma / at.alpha) == pytest.approx(level, rel=1e-3)


def test_paths_that_begin_with_noise_alone_begin_at_its_level() -> None:
    teacher = GaussianTeacher(MEAN, 0.5, VarianceExploding())
    assert start_time(teacher, config_of(**{"student.path_start": "noise"})) == 1.0


def test_a_teacher_named_with_its_family_is_found_from_anywhere(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(str(settings["teacher"]).removeprefix("ddpm:"))
    monkeypatch.chdir(whole.parent)
    for given, kept in ((f"ddpm:{whole.name}", f"ddpm:{whole}"), (whole.name, str(whole)), ("ddpm:fashion",) * 2):
        assert resolve_config({**settings, "teacher": given}, {}, {}).teacher == kept


def test_a_reference_is_found_from_anywhere(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("images", "teacher"):
        (tmp_path / name).mkdir()
    for given, kept in (
        ("images", str(tmp_path / "images")),
        ("inception-clean:images", f"inception-clean:{tmp_path / 'images'}"),
        ("teacher", "teacher"),
        ("inception-clean:teacher", "inception-clean:teacher"),
    ):
        assert resolve_config({**settings, "watch.reference": given}, {}, {}).watch.reference == kept
