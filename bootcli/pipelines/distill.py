"""`bootcli distill`: teacher in, run folder with a one-step student out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from shlex import quote

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from bootcli.config import DistillConfig
from bootcli.engine import Engine
from bootcli.errors import BootError, Interrupted
from bootcli.images import enlarge, grid, save_png, to_uint8
from bootcli.pipelines.events import (
    Comparing,
    Encoded,
    Event,
    Finished,
    Previewed,
    Saved,
    Scored,
    Started,
    Stepped,
    Warned,
)
from bootcli.pipelines.scoring import FIRST_SEED, Scorer
from bootcli.pipelines.setup import Distillation, facts_of, set_up
from bootcli.prompts import Prompts, read_prompts
from bootcli.reference import is_own
from bootcli.sampler import prior_noise, teacher_endpoint
from bootcli.signals import watch_signals
from bootcli.store.artifact import save_student
from bootcli.store.checkpoint import load_newest, save_checkpoint
from bootcli.store.files import atomic_file, copy_file
from bootcli.store.rundir import RunDir
from bootcli.store.tensors import read_tensors
from bootcli.teachers.registry import load
from bootcli.trainer import AGAIN, StepReport, Trainer
from bootcli.watch import Score, Watch

TIME_IS_UP, NO_BETTER = 1000, 1001
ENDINGS = {TIME_IS_UP: "max_minutes", NO_BETTER: "patience"}
"""Why a run ends before its steps are done, by numbers that no signal has."""
SETTINGS_OF = {"critic": "correction", "judge": "adversary"}
"""The section of each companion of the trainer."""
PORTION = 20_000
"""Prompts that are encoded at a time, ahead of the updates that draw them."""
PREVIEWS = 10
"""Columns of a preview grid."""


def distill(config: DistillConfig, run: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Event]:
    """Distil a teacher, as a stream of events; files are written on the way.

    Args:
        config: resolved.
        run: the run folder; must be new or empty unless ``resume`` or ``overwrite``.
        resume: continue from the newest checkpoint, bit for bit.
        overwrite: replace an earlier run there.

    Raises `UsageError` for impossible settings, `BootError` at a loss that is not finite (after saving the last good
    state), `Interrupted` after Ctrl-C or SIGTERM (after saving).
    """
    rundir = RunDir(run)
    if not resume:
        rundir.check_free(overwrite=overwrite)
    engine = Engine(config.device, config.mixed_precision)
    engine.wait()  # every process has looked at the folder
    with rundir.locked() if engine.is_main else nullcontext():
        yield from _distill(config, rundir, engine, resume=resume)


def _distill(config: DistillConfig, rundir: RunDir, engine: Engine, *, resume: bool) -> Iterator[Event]:
    loaded = load(config.teacher)
    prompts = None
    if loaded.teacher.spec.conditioning == "text":  # kept with the run: their file may change, standard input is gone
        prompts = read_prompts(str(rundir.prompts) if resume and rundir.prompts.is_file() else config.prompts)
    work = set_up(loaded.teacher, config, engine, fresh=not resume, prompts=prompts)
    trainer = Trainer(work, work.config, engine)
    work = dataclasses.replace(work, config=trainer.config)
    if resume:
        _restore(trainer, rundir, prompts)
    engine.wait()  # every process has read what it goes on from
    if engine.is_main:
        if resume:
            rundir.trim(trainer.step)
        rundir.create(work.config, keep=resume)
        if prompts is not None and not resume:
            with atomic_file(rundir.prompts) as temporary:
                prompts.write(temporary)
    engine.wait()
    session = Session(rundir, work, trainer, loaded.family.name, engine)
    events = session.events()
    if engine.is_main:
        yield Started(rundir.path, facts_of(work, loaded.origin, engine), trainer.step, config.steps)
        yield from events
    else:  # the other processes compute, and say nothing
        for _ in events:
            pass


def _restore(trainer: Trainer, rundir: RunDir, prompts: Prompts | None) -> None:
    tensors, facts = load_newest(rundir.checkpoints)
    if prompts is not None and facts.get("prompts", prompts.digest) != prompts.digest:  # an older state has none
        raise BootError(f"{rundir.prompts} is not what this run began with.", "Put it back, or start a new run.")
    try:
        trainer.load_state(tensors, facts)
    except (KeyError, RuntimeError, ValueError) as error:
        raise BootError(f"The checkpoint in {rundir.checkpoints} does not fit this run: {error!s:.300}.") from error


class Session:
    """One call of `distill`: the trainer's reports turned into files and events."""

    def __init__(self, rundir: RunDir, work: Distillation, trainer: Trainer, family: str, engine: Engine) -> None:
        self.rundir = rundir
        self.work = work
        self.trainer = trainer
        self.family = family
        self.engine = engine
        self.config = work.config
        self._teacher_samples: Tensor | None = None
        self._previewed = -1
        self._watch = Watch([])
        self._scorer: Scorer | None = None
        self._encoded_to = 0

    def events(self) -> Iterator[Event]:
        """Train to the end, or to the signal that stops it."""
        began, first, ended_by = time.perf_counter(), self.trainer.step, "steps"
        self._watch = Watch(self._scores())
        for name, companion in self.trainer.companions.items():
            quiet, keys = companion.settings.start + companion.settings.warmup, SETTINGS_OF[name]
            if self.config.steps <= quiet:
                yield Warned(
                    first,
                    f"The student listens to the {name} after {quiet} updates ({keys}.start and {keys}.warmup), and "
                    f"this run ends at {self.config.steps}. Take more --steps, or a lower {keys}.start.",
                )
        with watch_signals() as wish:
            reports = self.trainer.run()
            while True:
                for event in self.encode():
                    yield event
                    if wish.signum and self.engine.num_processes == 1:
                        break  # what is missing is made when the run goes on
                ending = self.engine.largest(wish.signum or self._ending())  # all processes stop at the same step
                if ending in ENDINGS:
                    ended_by = ENDINGS[ending]
                    break
                if ending:
                    yield self._checkpoint()
                    raise Interrupted(
                        f"Stopped at step {self.trainer.step}; the state is saved in {self.rundir.checkpoints}.",
                        f"Go on with: bootcli distill --resume --output {quote(str(self.rundir.path))}",
                        signum=ending,
                    )
                try:
                    report = next(reports, None)
                except BootError as error:
                    path = self._checkpoint().path
                    raise BootError(f"{error.message} The last good state is {path}.", error.hint) from error
                if report is None:
                    break
                yield from self._after_step(report)
            yield from self._finish(began, first, ended_by)

    def encode(self) -> Iterator[Event]:
        """Make the text embeddings of the draws to come, where they are running out.

        All that the run draws, if that is not more than a portion; the teacher's text encoder is there meanwhile only.
        Each process makes its share.
        """
        config, trainer, engine, pool = self.config, self.trainer, self.engine, self.work.prompts
        left = (config.steps - trainer.step) * config.batch_size  # no update draws more than a batch
        needed = trainer.drawn + min(left, config.batch_size)
        if pool is None or trainer.deck is None or needed <= self._encoded_to:
            return
        count = min(left, max(PORTION, config.batch_size))
        rows = [trainer.deck.upcoming(trainer.drawn, count)]
        if not self._encoded_to:
            rows.append(torch.arange(PREVIEWS) % len(pool))
            if config.watch.every:
                rows.append((FIRST_SEED + torch.arange(config.watch.num_images)) % len(pool))
        if self.work.offload_teacher is not None:
            self.work.view.teacher.net.to(engine.device)  # its text encoder goes where it is
        for done, total in pool.fill(torch.unique(torch.cat(rows))[engine.rank :: engine.num_processes]):
            yield Encoded(done, total)
        engine.wait()
        self._encoded_to = trainer.drawn + count
        self.work.view.teacher.release()
        if self.work.offload_teacher is not None:
            self.work.offload_teacher()
        for warning in pool.warnings():
            yield Warned(trainer.step, warning)

    def _ending(self) -> int:
        """One of `ENDINGS`, or 0."""
        limit, patience = self.config.max_minutes, self.config.watch.patience
        if limit is not None and self.trainer.seconds >= 60 * limit:
            return TIME_IS_UP
        return NO_BETTER if patience and self._watch.since_lowest() >= patience else 0

    def _after_step(self, report: StepReport) -> Iterator[Event]:
        config, last = self.config, report.step == self.config.steps
        if self.engine.is_main and (report.step % config.log_every == 0 or report.step == 1 or last):
            self.rundir.log(dataclasses.asdict(report))
        yield Stepped(report)
        if warning := self._watch.follow(report.residual):
            yield Warned(report.step, warning)
        # First the state: pictures and scores take memory that training does not, and may fail.
        if last:
            return  # `_finish` saves, scores and shows it
        if config.checkpoint_every and report.step % config.checkpoint_every == 0:
            yield self._checkpoint()
        if config.preview_every and report.step % config.preview_every == 0:
            yield from self._preview()
        if config.watch.every and report.step % config.watch.every == 0:
            yield from self._score()

    def _scores(self) -> list[Score]:
        """Those of the run so far; lines of something else are passed over."""
        scores = []
        for line in self.rundir.scores():
            with suppress(ValidationError):
                scores.append(TypeAdapter(Score).validate_python(line))
        return scores

    def _score(self) -> Iterator[Event]:
        """Measure the student; keep it where none before is better. A reference that fails is no reason to stop."""
        try:
            yield from self._measure()
        except BootError as error:
            yield Warned(self.trainer.step, f"The student was not scored: {error.message} {error.hint}".strip())

    def _measure(self) -> Iterator[Event]:
        step = self.trainer.step
        if not self.engine.is_main or any(score.step == step for score in self._watch.scores):
            return
        if self._scorer is None:
            if is_own(self.config.watch.reference):
                yield Comparing(self.config.watch.num_images)
            self._scorer = Scorer(self.work, self.engine)
        with self.trainer.ema.applied_to(self.work.student):
            score = self._scorer.score(step)
        is_kept = self._watch.add(score)
        if is_kept:
            self._save(self.rundir.best)
        self.rundir.log_score(dataclasses.asdict(score))
        yield Scored(score, is_kept)
        beginner = len(self._watch.scores) == 1 and step < self.config.steps
        if not beginner and (warning := self._watch.judge(score.diversity)):
            yield Warned(step, warning)

    def _finish(self, began: float, first: int, ended_by: str) -> Iterator[Event]:
        if not all(bool(weight.isfinite().all()) for weight in self.trainer.ema.weights.values()):
            raise BootError(f"The weights are not finite after step {self.trainer.step}: no student is written.", AGAIN)
        if self.trainer.step > first:
            yield self._checkpoint()
        if self.engine.is_main:
            self._save(self.rundir.student)  # before what may fail
        if self.config.watch.every:
            yield from self._score()
        best = self._watch.best if self.config.watch.every else None  # a resumed run may score no more
        if best is not None and best.step < self.trainer.step and self._best_step() != best.step:
            best = None
        if self.engine.is_main and best is not None and best.step < self.trainer.step:
            copy_file(self.rundir.best, self.rundir.student)
        yield from self._preview()  # last: pictures may fail
        seconds = time.perf_counter() - began
        yield Finished(self.rundir.path, self.rundir.student, self.trainer.step, seconds, ended_by, best)

    def _best_step(self) -> object:
        """Updates of the best student that is kept: after a crash it may be a later one than the scores know of."""
        try:
            return read_tensors(self.rundir.best)[1].get("step") if self.rundir.best.is_file() else None
        except BootError:
            return None

    def _save(self, path: Path) -> None:
        weights = self.trainer.ema.weights
        save_student(path, self.work.student, weights, self.family, self.config, self.trainer.step)

    def _checkpoint(self) -> Saved:
        self.engine.wait()
        step = self.trainer.step
        path = self.rundir.checkpoints / f"step-{step:08d}.safetensors"
        if self.engine.is_main:
            tensors, facts = self.trainer.state()
            facts["prompts"] = self.work.prompts and self.work.prompts.prompts.digest
            path = save_checkpoint(self.rundir.checkpoints, step, tensors, facts, self.config.keep_checkpoints)
        return Saved(step, path)

    @torch.no_grad()
    def _preview(self) -> Iterator[Previewed]:
        """The teacher's samples above the student's one-step samples, from the same noise."""
        if not self.engine.is_main or self._previewed == self.trainer.step:
            return
        work, step = self.work, self.trainer.step
        teacher = work.view.teacher
        own = [None if work.prompts is None else work.prompts.prompts.in_turn(i).seed for i in range(PREVIEWS)]
        seeds = [self.config.seed + i if seed is None else seed for i, seed in enumerate(own)]
        eps = prior_noise(seeds, teacher.spec.sample_shape)
        eps = eps.to(self.engine.device)
        cond = work.shown(range(PREVIEWS)).to(self.engine.device)
        with self.trainer.ema.applied_to(work.student):
            if self._teacher_samples is None:
                steps = self.config.preview_teacher_steps
                self._teacher_samples = teacher_endpoint(work.view, eps, cond, work.t_max, steps)
            sample = work.student.sample(eps, cond)
        both = torch.cat([teacher.decode(self._teacher_samples), teacher.decode(sample)])
        teacher.release()
        tiles = grid(to_uint8(both).cpu(), columns=PREVIEWS)
        path = self.rundir.previews / f"step-{step:08d}.png"
        save_png(enlarge(tiles, max(1, 64 // both.shape[-1])), path)
        self._previewed = step
        yield Previewed(step, path, float((sample - self._teacher_samples).square().mean()))
