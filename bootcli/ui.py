"""What people see: tables on stdout, progress on stderr. The only file of bootcli that imports rich.

A progress bar needs a terminal; anywhere else progress is a plain line now and then. rich honours NO_COLOR.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TextIO, cast

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from bootcli.pipelines.events import Comparing, Encoded, Event, Previewed, Scored, Started, Stepped, Warned

LINE_EVERY = 10.0
"""Seconds between plain progress lines."""
UNWRAPPED = 10_000
"""Columns of an output that is no terminal: nothing is ever wrapped."""


def duration(seconds: float) -> str:
    """``75`` -> ``1m 15s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, left = divmod(whole, 60)
    return f"{minutes}m {left:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def size(count: int) -> str:
    """``1610612736`` -> ``1.50 GiB``; below a hundredth of that in MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 100 else f"{count / 2**20:.2f} MiB"


def print_facts(facts: Mapping[str, object], title: str = "") -> None:
    """Labels and values in two columns on stdout, under a title if there is one."""
    console = _stdout()
    if title:
        console.print(Text(f"\n{title}", style="bold"))
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in facts.items():
        grid.add_row(Text(label), Text(_text(value)))
    console.print(grid)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is words, columns of numbers are aligned right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = index > 0 and all(not row[index] or row[index][0].isdigit() for row in rows)
        table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _stdout().print(table)


def print_next(*commands: str) -> None:
    """Commands to go on with, on stdout."""
    for index, command in enumerate(commands):
        print("Next:" if index == 0 else "     ", command)


@contextmanager
def counter() -> Iterator[Callable[[str, int, int], None]]:
    """Progress of drawing images, in stages: call the result with (stage, done, total)."""
    with _display() as display:
        yield display.advance


@contextmanager
def training() -> Iterator[Callable[[Event], None]]:
    """Progress of a distillation: call the result with every event."""
    with _display() as display:
        yield _Training(display).show


class _Training:
    """Words for the events of a distillation."""

    def __init__(self, display: _Display) -> None:
        self.display = display
        self.steps = 0

    def show(self, event: Event) -> None:
        if isinstance(event, Started):
            self.steps = event.steps
            for label, value in {**event.facts, "run": event.run}.items():
                self.display.note(f"{label:<10} {value}")
            if event.first_step:
                self.display.note(f"going on after step {event.first_step}")
        elif isinstance(event, Encoded):
            self.display.advance("prompts", event.done, event.total, unit="prompts/s")
        elif isinstance(event, Stepped):
            report = event.report
            details = f"loss {report.loss:.4g}  residual {report.residual:.4g}"
            self.display.advance("step", report.step, self.steps, details, images=report.images)
        elif isinstance(event, Comparing):
            self.display.note(f"the teacher draws {event.num_images} images to compare with")
        elif isinstance(event, Scored):
            score, kept = event.score, ", kept" if event.is_kept else ""
            fid = "" if score.fid is None else f"watched FID {score.fid:.3g}{kept}, "
            self.display.note(f"step {score.step}: {fid}diversity {score.diversity:.2f} of the teacher's")
        elif isinstance(event, Warned):
            self.display.note(f"Warning: step {event.step}: {event.message}")
        elif isinstance(event, Previewed):
            self.display.note(f"step {event.step}: {event.path}, squared error to the teacher {event.paired_error:.4f}")


class _Pace:
    """Speed over the last few dozen reports of a stage."""

    def __init__(self) -> None:
        self.marks: deque[tuple[float, int]] = deque(maxlen=50)

    def words(self, done: int, total: int, images: int, unit: str) -> str:
        """Images per second, and the time left; empty until there are two reports."""
        self.marks.append((time.monotonic(), done))
        (began, first), (now, last) = self.marks[0], self.marks[-1]
        if last <= first or now <= began:
            return ""
        rate = (last - first) / (now - began)
        left = f"  {duration((total - done) / rate)} left" if done < total else ""
        speed = rate * images
        return f"{speed:.{0 if speed >= 10 else 1}f} {unit}{left}"


class _Lossy:
    """A stream that never fails: where its reader is gone, a ``tee`` or the terminal, words are lost."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)  # what else rich asks a stream: isatty, encoding


class _Display:
    """Progress as plain lines: the first of a stage, the last, and one every few seconds."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.paces: dict[str, _Pace] = {}
        self.shown = 0.0

    def advance(
        self, stage: str, done: int, total: int, details: str = "", images: int = 1, unit: str = "img/s"
    ) -> None:
        """``done`` of ``total`` of a stage, each worth so many images."""
        first = stage not in self.paces
        pace = self.paces.setdefault(stage, _Pace()).words(done, total, images, unit)
        self.draw(stage, done, total, "  ".join(part for part in (details, pace) if part), first)

    def draw(self, stage: str, done: int, total: int, details: str, first: bool) -> None:
        """Show it."""
        now = time.monotonic()
        if first or done == total or now - self.shown >= LINE_EVERY:
            self.shown = now
            self.note(f"{stage} {done}/{total}  {details}".rstrip())

    def note(self, text: str) -> None:
        """A line that stays."""
        print(text, file=self.stream, flush=True)


class _Bars(_Display):
    """Progress as one live bar for each stage, below the lines that stay."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress.console.file)
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def draw(self, stage: str, done: int, total: int, details: str, first: bool) -> None:
        """Show it."""
        if first:
            self.tasks[stage] = self.progress.add_task(stage, total=total, details=details)
        self.progress.update(self.tasks[stage], completed=done, total=total, details=details)

    def note(self, text: str) -> None:
        """A line that stays."""
        self.progress.console.print(Text(text), soft_wrap=True)


@contextmanager
def _display() -> Iterator[_Display]:
    stream = cast(IO[str], _Lossy(sys.stderr))  # progress never stops the work
    console = Console(file=stream)
    if not stream.isatty() or console.is_dumb_terminal:
        yield _Display(stream)
        return
    details = TextColumn("{task.fields[details]}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), details)
    with Progress(*columns, console=console, expand=True, refresh_per_second=4) as progress:
        yield _Bars(progress)


def _stdout() -> Console:
    return Console(width=None if sys.stdout.isatty() else UNWRAPPED, highlight=False, emoji=False)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
