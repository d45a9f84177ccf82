"""Keeping the best student, warnings, and the ends of a run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.evaluate import frechet
from bootcli.pipelines import distill as pipeline
from bootcli.pipelines import scoring
from bootcli.pipelines.defaults import without_auto
from bootcli.pipelines.distill import distill
from bootcli.pipelines.events import Comparing, Finished, Scored, Stepped, Warned
from bootcli.pipelines.scoring import Scorer
from bootcli.pipelines.settings import resolve_config, resume_config
from bootcli.pipelines.setup import set_up
from bootcli.plugin import Teacher
from bootcli.reference import reference_for
from bootcli.sampler import prior_noise
from bootcli.store.artifact import load_student
from bootcli.store.checkpoint import checkpoints
from bootcli.store.rundir import RunDir
from bootcli.store.tensors import read_tensors
from bootcli.teachers.registry import load
from bootcli.trainer import StepReport, Trainer
from bootcli.ui import training
from bootcli.watch import COLLAPSED, NOISY, RISEN, Score, Watch
from tests.training.short import config_of


def test_best_is_the_newest_of_those_that_chance_cannot_tell_apart() -> None:
    watch = Watch()
    assert watch.best is None
    found = [watch.add(Score(step, fid, 1.0)) for step, fid in enumerate([5.0, 3.0, math.nan, 4.0, 3.2, 3.4, 2.0])]
    assert found == [True, True, False, False, True, False, True]
    assert watch.best == Score(6, 2.0, 1.0)
    assert Watch(watch.scores[:6]).best == Score(4, 3.2, 1.0)
    assert Watch(watch.scores[:6]).since_lowest() == 4
    unmeasured = Watch()
    assert not unmeasured.add(Score(1, None, 1.0))
    assert unmeasured.since_lowest() == 0


def test_best_does_not_creep_away_from_the_lowest() -> None:
    watch = Watch()
    assert [watch.add(Score(step, 1.08**step, 1.0)) for step in range(4)] == [True, True, False, False]


def test_diversity_warns_once_an_episode() -> None:
    watch = Watch()
    low, high = COLLAPSED - 0.1, NOISY + 0.1
    said = [watch.judge(diversity) for diversity in (1.0, low, low, 1.0, low, high, high)]
    assert [text is not None for text in said] == [False, True, False, False, True, True, False]
    assert "becoming alike" in str(said[1])
    assert "noise" in str(said[5])


def test_residual_warns_when_it_rises_far_above_its_lowest() -> None:
    watch = Watch()
    falling = [watch.follow(1.0 / (1 + step / 50)) for step in range(500)]
    assert not any(falling)
    assert watch.follow(0.5) is None, "one bad batch is none"
    rising = [watch.follow(2.0) for _ in range(200)]
    assert sum(text is not None for text in rising) == 1
    assert "4.2 times" in str(next(filter(None, rising))), RISEN
    assert not any(watch.follow(0.05) for _ in range(500))
    assert sum(watch.follow(2.0) is not None for _ in range(200)) == 1, "a new episode"


def test_the_first_batches_are_nothing_to_compare_with() -> None:
    """A lucky one, of a run that goes on with small batches."""
    watch = Watch()
    assert not any(watch.follow(residual) for residual in (0.01, *[1.0] * 300))


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(scoring, "DIVERSE", 32)  # the teacher draws as many in each run
    return {
        "teacher": "fashion",
        "steps": 6,
        "batch_size": 8,
        "device": "cpu",
        "preview_every": 0,
        "preview_teacher_steps": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "watch.every": 2,
        "watch.num_images": 128,
        "correction.warmup": 1,
        "kd.teacher_steps": 1,
        "kd.buffer": 16,
    }


def test_a_score_is_of_what_sample_draws(settings: dict[str, object]) -> None:
    """In float32, whatever the student is trained in."""
    scores = []
    for precision in ("no", "bf16"):
        config = resolve_config({**settings, "mixed_precision": precision}, {}, {})
        engine = Engine("cpu", config.mixed_precision)
        scores.append(Scorer(set_up(load(config.teacher).teacher, config, engine), engine).score(0))
    assert scores[0] == scores[1]


def test_the_teachers_own_images_are_what_a_score_is_of(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a teacher without data has a best student too: its distance is to what that student is to match."""
    drawn: list[int] = []

    def spy(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
        drawn.extend(seeds)
        return prior_noise(seeds, shape)

    monkeypatch.setattr(scoring, "prior_noise", spy)
    config = resolve_config({**settings, "batch_size": 128, "watch.reference": "teacher"}, {}, {})
    engine = Engine("cpu", "bf16")
    scorer = Scorer(set_up(load(config.teacher).teacher, config, engine), engine)
    assert scorer.reference is not None
    assert (scorer.reference.source, scorer.reference.statistics.num_images) == ("the teacher's own, 50 steps", 128)
    assert drawn == [*range(2**31 + 2**30, 2**31 + 2**30 + 128)], "noise that no student is scored on"
    known = reference_for(scorer.work.view.teacher, None, engine.device)
    chance = frechet(scorer.reference.statistics, known.statistics)
    fresh = scorer.score(0).fid
    assert fresh is not None
    assert chance < 10 < 40 < fresh, "real images are near the teacher's, those of a fresh student are not"


@pytest.mark.parametrize(
    ("words", "reference"),
    [
        ({"guidance_scale": 2.0}, "teacher"),
        ({"guidance_range": (1.0, 2.0)}, "teacher"),
        ({}, None),
        ({"guidance_scale": 2.0, "watch.reference": "inception-clean:photos"}, "inception-clean:photos"),
    ],
)
def test_a_guided_student_is_compared_with_its_teacher(words: dict[str, object], reference: str | None) -> None:
    """Its distance to real images rises as it becomes better: the best student was the first one."""
    config = resolve_config({"teacher": "fashion-edm", "device": "cpu"} | words, {}, {})
    teacher, engine = load(config.teacher).teacher, Engine("cpu", "no")
    assert without_auto(teacher, config, engine).watch.reference == reference
    with mock.patch.object(teacher, "feature_space", return_value=None):
        assert without_auto(teacher, config, engine).watch.reference == words.get("watch.reference")


def test_drawing_what_a_score_is_of_is_told_of(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "OWN_STEPS", 2)
    few = settings | {"steps": 4, "watch.reference": "teacher", "corrector": False, "kd.adversary": 0.0}
    told = [e for e in distill(resolve_config(few, {}, {}), tmp_path / "run") if isinstance(e, (Comparing, Scored))]
    assert [type(e) for e in told] == [Comparing, Scored, Scored]
    with training() as show:
        show(told[0])
        for kept in (True, False):
            show(Scored(Score(4, 2.5, 1.0), kept))
    said = capsys.readouterr().err
    assert "the teacher draws 128 images to compare with" in said
    assert "step 4: watched FID 2.5, kept, diversity" in said
    assert "step 4: watched FID 2.5, diversity" in said


def scripted(monkeypatch: pytest.MonkeyPatch, *fids: float) -> None:
    """The distances that the scores will find, by their number."""
    honest, script = Scorer.score, {2 * (i + 1): fid for i, fid in enumerate(fids)}
    monkeypatch.setattr(
        Scorer, "score", lambda self, step: dataclasses.replace(honest(self, step), fid=script[step])
    )  # fmt: skip


def test_the_best_student_is_kept(settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 9.0, 5.0, 7.0)
    run = RunDir(tmp_path / "run")
    weights: dict[int, torch.Tensor] = {}
    events = []
    honest = pipeline.Trainer._update

    def update(self: Trainer, step: int) -> StepReport:
        report = honest(self, step)
        weights[step] = self.ema.weights["net.conv_in.weight"].clone()
        return report

    monkeypatch.setattr(pipeline.Trainer, "_update", update)
    events = list(distill(resolve_config(settings, {}, {}), run.path))
    assert [(e.score.step, e.is_kept) for e in events if isinstance(e, Scored)] == [(2, True), (4, True), (6, False)]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.best is not None
    assert (finished.best.step, finished.best.fid, finished.ended_by) == (4, 5.0, "steps")
    assert torch.equal(load_file(run.student)["net.conv_in.weight"], weights[4])
    assert not torch.equal(weights[4], weights[6])
    assert [line["step"] for line in run.scores()] == [2, 4, 6]


def test_best_survives_a_resume(settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 5.0, 9.0, 7.0, 8.0)
    run = tmp_path / "run"
    list(distill(resolve_config(settings | {"steps": 4}, {}, {}), run))
    kept = load_file(RunDir(run).student)
    *_, finished = distill(resume_config(run, {"steps": 8}, {}, {}), run, resume=True)
    assert isinstance(finished, Finished)
    assert finished.best is not None
    assert finished.best.step == 2
    assert all(torch.equal(kept[name], tensor) for name, tensor in load_file(RunDir(run).student).items())


def test_a_best_student_that_is_damaged_is_not_missed(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are scores that somebody wrote over: the run ends with its last student."""
    scores = iter([3.0, 4.0])
    monkeypatch.setattr(Scorer, "score", lambda self, step: Score(step, next(scores), 1.0))
    run = RunDir(tmp_path / "run")
    list(distill(resolve_config({**settings, "steps": 2}, {}, {}), run.path))
    run.best.write_bytes(b"cut off")
    with run.scores_file.open("a") as file:
        file.write('{"step": 1}\n{"step": 1, "fid": "x", "diversity": 1.0}\n')
    *_, finished = distill(resume_config(run.path, {"steps": 4}, {}, {}), run.path, resume=True)
    assert isinstance(finished, Finished)
    assert finished.best is None
    assert load_student(run.path).step == 4


def test_a_reference_that_fails_later_costs_no_student(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(self: Scorer, step: int) -> Score:
        raise BootError("No network.", "Try again.")

    monkeypatch.setattr(Scorer, "score", unreachable)
    *events, finished = distill(resolve_config({**settings, "steps": 2}, {}, {}), tmp_path / "run")
    assert isinstance(finished, Finished)
    assert "The student was not scored: No network. Try again." in [e.message for e in events if isinstance(e, Warned)]
    assert load_student(tmp_path / "run").step == 2


def test_a_reference_that_means_nothing_is_refused_before_the_first_update(
    settings: dict[str, object], tmp_path: Path
) -> None:
    for reference in ("nope", "inception-clean:nope", ""):
        with pytest.raises(UsageError, match=f"watch.reference '?{reference}"):
            list(distill(resolve_config({**settings, "watch.reference": reference}, {}, {}), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_best_student_of_updates_that_a_crash_took_is_not_passed_off(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is newer than the scores after a resume from an older state: what was scored then is not there."""
    scripted(monkeypatch, 5.0, 4.0, 7.0)
    run = RunDir(tmp_path / "run")
    list(distill(resolve_config(settings | {"steps": 2}, {}, {}), run.path))
    early = run.best.read_bytes()
    *_, finished = distill(resume_config(run.path, {"steps": 4}, {}, {}), run.path, resume=True)
    assert run.best.read_bytes() != early
    run.trim(2)
    run.checkpoints.joinpath("step-00000004.safetensors").unlink()
    scripted(monkeypatch, 5.0, 8.0, 7.0)
    *_, finished = distill(resume_config(run.path, {"steps": 4}, {}, {}), run.path, resume=True)
    assert isinstance(finished, Finished)
    assert finished.best is None
    assert read_tensors(run.student)[1]["step"] == 4


def test_a_score_that_fails_loses_no_update(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Scorer, step: int) -> Score:
        raise MemoryError

    monkeypatch.setattr(Scorer, "score", fails)
    with pytest.raises(MemoryError):
        list(distill(resolve_config(settings, {}, {}), tmp_path / "run"))
    assert [path.stem for path in checkpoints(RunDir(tmp_path / "run").checkpoints)] == ["step-00000002"]


def test_nor_does_the_last_one(settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last update is saved first, too, in a run that saves nothing before its end."""

    def fails(self: Scorer, step: int) -> Score:
        raise MemoryError

    monkeypatch.setattr(Scorer, "score", fails)
    with pytest.raises(MemoryError):
        list(distill(resolve_config(settings | {"steps": 2, "checkpoint_every": 0}, {}, {}), tmp_path / "run"))
    assert [path.stem for path in checkpoints(RunDir(tmp_path / "run").checkpoints)] == ["step-00000002"]
    assert load_student(tmp_path / "run").step == 2


def test_a_run_that_scores_no_more_keeps_its_last_student(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 5.0)
    run = tmp_path / "run"
    list(distill(resolve_config(settings | {"steps": 2}, {}, {}), run))
    *_, finished = distill(resume_config(run, {"steps": 3, "watch.every": 0}, {}, {}), run, resume=True)
    assert isinstance(finished, Finished)
    assert finished.best is None
    assert load_student(run).step == 3


def test_patience_without_scores_is_refused(settings: dict[str, object], tiny_ddpm: Path, tmp_path: Path) -> None:
    for words in ({"watch.every": 0}, {"teacher": str(tiny_ddpm)}):
        config = resolve_config(settings | words | {"watch.patience": 2}, {}, {})
        with pytest.raises(UsageError, match=r"watch\.patience"):
            next(iter(distill(config, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_patience_ends_a_run(settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 5.0, 6.0, 7.0)
    *_, finished = distill(resolve_config(settings | {"steps": 100, "watch.patience": 2}, {}, {}), tmp_path / "run")
    assert isinstance(finished, Finished)
    assert (finished.steps, finished.ended_by) == (6, "patience")


def test_a_real_score_sees_noise_and_collapse(settings: dict[str, object], tmp_path: Path) -> None:
    """Untrained, the student of `fashion` draws nearly one picture: a warning, and a distance like no other."""
    events = list(distill(resolve_config(settings | {"steps": 2}, {}, {}), tmp_path / "run"))
    (scored,) = (e for e in events if isinstance(e, Scored))
    assert scored.score.fid is not None
    assert scored.score.fid > 50
    assert scored.score.diversity < 0.3
    assert any("becoming alike" in e.message for e in events if isinstance(e, Warned))


def test_a_beginner_is_not_warned(settings: dict[str, object], tmp_path: Path) -> None:
    short = settings | {"steps": 3, "watch.every": 2, "corrector": False, "kd.adversary": 0}
    events = list(distill(resolve_config(short, {}, {}), tmp_path / "run"))
    assert [e.score.step for e in events if isinstance(e, Scored)] == [2, 3]
    assert [e.step for e in events if isinstance(e, Warned)] == [3]


@pytest.mark.parametrize(("steps", "warned"), [(5, True), (6, False)])
@pytest.mark.parametrize(
    ("name", "keys", "switch"), [("critic", "correction", {"corrector": True}), ("judge", "adversary", {})]
)
def test_a_companion_that_would_never_be_heard_is_told(
    steps: int, warned: bool, name: str, keys: str, switch: dict[str, object],
    settings: dict[str, object], tmp_path: Path,
) -> None:  # fmt: skip
    late = {"corrector": False, "kd.adversary": 0.5, f"{keys}.start": 3, f"{keys}.warmup": 2, "watch.every": 0}
    config = resolve_config(settings | late | switch | {"steps": steps}, {}, {})
    told = [e.message for e in distill(config, tmp_path / "run") if isinstance(e, Warned)]
    assert warned == any(f"listens to the {name} after 5 updates ({keys}.start" in text for text in told)


def test_without_a_reference_only_diversity_is_watched(tiny_ddpm: Path, tmp_path: Path) -> None:
    config = resolve_config(
        {"teacher": str(tiny_ddpm), "steps": 2, "batch_size": 8, "preview_teacher_steps": 2}, {}, {}
    )
    events = list(distill(config, tmp_path / "run"))
    (scored,) = (e for e in events if isinstance(e, Scored))
    assert scored.score.fid is None
    assert not scored.is_kept
    assert isinstance(events[-1], Finished)
    assert events[-1].best is None
    assert RunDir(tmp_path / "run").student.is_file()


def test_no_watch_costs_nothing(tiny_ddpm: Path, tmp_path: Path) -> None:
    settings = {"teacher": str(tiny_ddpm), "steps": 2, "batch_size": 8, "preview_teacher_steps": 2, "watch.every": 0}
    events = list(distill(resolve_config(settings, {}, {}), tmp_path / "run"))
    assert not any(isinstance(e, Scored) for e in events)
    assert not RunDir(tmp_path / "run").scores_file.exists()


def test_time_ends_a_run_and_more_of_it_goes_on(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training seconds count, also those before a resume; the learning rate decays to its end by whichever is first."""
    honest = pipeline.Trainer._update

    def update(self: Trainer, step: int) -> StepReport:
        before, report = self.seconds, honest(self, step)
        self.seconds = before + 30.0
        return report

    monkeypatch.setattr(pipeline.Trainer, "_update", update)
    run, words = tmp_path / "run", settings | {"steps": 1000, "watch.every": 0, "optimizer.decay": "cosine"}
    events = list(distill(resolve_config(words | {"max_minutes": 2.0, "optimizer.warmup_steps": 0}, {}, {}), run))
    finished, rates = events[-1], [e.report.learning_rate for e in events if isinstance(e, Stepped)]
    assert isinstance(finished, Finished)
    assert (finished.steps, finished.ended_by) == (4, "max_minutes")
    assert [rate / rates[0] for rate in rates] == pytest.approx([1.0, 0.854, 0.5, 0.146], abs=2e-3)
    with pytest.raises(UsageError, match="cannot change max_minutes"):
        resume_config(run, {"max_minutes": 1.0}, {}, {})
    *_, finished = distill(resume_config(run, {"max_minutes": 3.0}, {}, {}), run, resume=True)
    assert isinstance(finished, Finished)
    assert finished.steps == 6


def test_warnings_are_in_the_story(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Trainer.run

    def rising(self: Trainer) -> Iterator[StepReport]:
        for report in honest(self):
            yield dataclasses.replace(report, residual=report.residual * 1000.0**report.step)

    monkeypatch.setattr(pipeline.Trainer, "run", rising)
    monkeypatch.setattr("bootcli.watch.SMOOTHING", 2)
    events = list(distill(resolve_config(settings | {"watch.every": 0}, {}, {}), tmp_path / "run"))
    assert sum("leaving the teacher's paths" in e.message for e in events if isinstance(e, Warned)) == 1
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 6


@pytest.mark.parametrize(("processes", "accumulation", "size"), [(1, None, 32), (1, 4, 8), (2, 4, 4), (64, 1, 1)])
def test_scores_take_what_training_has_room_for(
    tiny_teacher: Teacher, processes: int, accumulation: int | None, size: int
) -> None:
    config = config_of(batch_size=32, **{"optimizer.accumulation": accumulation})
    scorer = mock.Mock(engine=mock.Mock(num_processes=processes, device=torch.device("cpu")))
    scorer.work = mock.Mock(config=config)
    scorer.work.view.teacher = tiny_teacher
    assert [len(seeds) for _, seeds in Scorer._noise(scorer, 64)] == [size] * (64 // size)
