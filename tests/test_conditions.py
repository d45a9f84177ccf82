"""Text embeddings on disk: filled once, by whoever comes first, and read by everybody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bootcli import conditions
from bootcli.conditions import Embeddings, PromptPool
from bootcli.plugin import BootError, Cond
from bootcli.prompts import Prompt, Prompts


class Words:
    """The part of a text teacher that embeddings need: a text of n letters is a row of n."""

    def __init__(self, mark: str | None = "words", scale: float = 1.0, pause: float = 0.0) -> None:
        self.mark = mark
        self.scale = scale
        self.pause = pause
        self.encoded: list[str | None] = []
        self.net = torch.nn.Linear(1, 1)

    def fingerprint(self) -> str | None:
        return self.mark

    def condition(self, texts: Sequence[str | None]) -> Cond:
        self.encoded += texts
        time.sleep(self.pause)
        lengths = torch.tensor([float(len(text or "")) for text in texts])
        text = self.scale * lengths[:, None, None].expand(-1, 3, 4)
        return Cond({"text": text, "pooled": -lengths[:, None].expand(-1, 2), "tokens": lengths[:, None].long()})

    def too_long(self, texts: Sequence[str]) -> list[int]:
        return [place for place, text in enumerate(texts) if len(text) > 150]


def of(teacher: Words, count: int = 200) -> Embeddings:
    return Embeddings(teacher, count, lambda number: "x" * number, "digest")  # type: ignore[arg-type]


def index(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def fill(embeddings: Embeddings, rows: Tensor) -> int:
    return sum(embeddings.fill(rows))


def right(embeddings: Embeddings, rows: Tensor, scale: float = 1.0) -> bool:
    found = embeddings.rows(rows)
    return (
        found["text"].equal(scale * rows.float()[:, None, None].expand(-1, 3, 4))
        and found["pooled"].equal(-rows.float()[:, None].expand(-1, 2))
        and found["tokens"].equal(rows[:, None])
    )


def test_rows_are_made_once_and_kept() -> None:
    first, second = Words(), Words()
    ours = of(first)
    assert right(ours, index(7, 3, 7, 100))
    assert sorted(len(text or "") for text in first.encoded) == [3, 7, 100]
    theirs = of(second)
    assert right(theirs, index(100, 3))
    assert not second.encoded
    assert fill(theirs, torch.arange(200)) == 197
    assert right(ours, torch.arange(200)), "what another run made is seen at once"
    assert len(first.encoded) == 3


def test_progress_ends_when_another_run_makes_the_rest() -> None:
    def pool() -> PromptPool:
        prompts = Prompts(Prompt("x" * number) for number in range(1, 151))
        return PromptPool(Words(), prompts, None, guided=False)  # type: ignore[arg-type]

    rows = torch.arange(150)
    ours, theirs = pool().fill(rows), pool().fill(rows)
    assert next(ours) == (64, 150)
    assert list(theirs)[-1] == (150, 150)
    assert list(ours) == [(150, 150)]


def test_it_is_a_safetensors_file_with_holes() -> None:
    ours = of(Words(), 1_000_000)
    ours.rows(index(5, 999_999))
    assert ours.path is not None
    assert ours.path.stat().st_blocks * 512 < 2**20 < ours.path.stat().st_size
    small = of(Words())
    small.rows(index(5, 160))
    assert small.path is not None
    stored = load_file(small.path)
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "text": torch.float16, "pooled": torch.float16, "tokens": torch.int64, "done": torch.uint8,
    }  # fmt: skip
    assert stored["done"].nonzero().flatten().tolist() == [5, 160]
    assert stored["text"][5].eq(5).all()
    assert small.counts() == (2, 1, 160)


def test_other_texts_or_another_teacher_are_another_file() -> None:
    paths = {
        Embeddings(teacher, count, str, digest).path  # type: ignore[arg-type]
        for teacher in (Words("a"), Words("b"))
        for count, digest in ((3, "x"), (3, "y"), (4, "x"))
    }
    assert len(paths) == 6


def test_without_a_fingerprint_nothing_is_kept(tmp_path: Path) -> None:
    ours = of(Words(None))
    assert right(ours, index(2, 9))
    assert right(ours, index(9))
    assert len(ours.teacher.encoded) == 2  # type: ignore[attr-defined]
    assert not list((tmp_path / "xdg" / "bootcli" / "prompts").iterdir())


def test_large_numbers_are_kept_in_full() -> None:
    """Half precision ends at 65,504; a file that was begun with smaller numbers is made again."""
    ours = of(Words(scale=1024.0))
    assert right(ours, torch.arange(50), 1024.0)
    assert right(ours, torch.arange(200), 1024.0)
    assert ours.path is not None
    assert load_file(ours.path)["text"].dtype == torch.float32
    assert right(of(Words()), torch.arange(200), 1024.0)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BootError, match="cannot be kept in") as error:
        of(Words()).rows(index(1))
    assert "XDG_CACHE_HOME" in error.value.hint


def test_a_cache_of_another_user_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Embeddings, path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    of(Words()).rows(index(1))
    monkeypatch.setattr(Embeddings, "_open", denied)
    with pytest.raises(BootError, match=r"cannot be kept in .*safetensors: Permission denied") as error:
        of(Words())
    assert "XDG_CACHE_HOME" in error.value.hint


@pytest.mark.parametrize("damage", ["cut", "header", "other", "empty"])
def test_a_damaged_file_is_made_again(damage: str) -> None:
    ours = of(Words())
    ours.rows(index(1))
    path = ours.path
    assert path is not None
    content = path.read_bytes()
    broken = {
        "cut": content[:-7],
        "header": content[:8] + b"\xff" + content[9:],
        "other": content.replace(b"bootcli", b"whoever"),
        "empty": b"",
    }
    path.write_bytes(broken[damage])
    again = of(Words())
    assert again.damaged == path
    assert right(again, torch.arange(50))
    assert of(Words()).damaged is None


def test_a_row_counts_after_its_numbers_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while numbers are written leaves rows that are made again."""
    ours = of(Words())
    ours.rows(index(3))
    write, count = Embeddings._write, [0]

    def crash(self: Embeddings, name: str, place: int, content: bytes) -> None:
        count[0] += 1
        if count[0] == 9:
            raise OSError(28, "No space left on device")
        assert name != "done"
        write(self, name, place, content)

    with monkeypatch.context() as patch:
        patch.setattr(Embeddings, "_write", crash)
        with pytest.raises(OSError, match="No space"):
            ours.rows(torch.arange(10, 15))
    assert of(Words()).missing(torch.arange(20)).tolist() == [number for number in range(20) if number != 3]
    assert right(ours, torch.arange(20))


def _fill(folder: str, started: object, first: int) -> None:
    os.environ["XDG_CACHE_HOME"] = folder
    ours = of(Words(pause=0.01))
    started.wait()  # type: ignore[attr-defined]
    fill(ours, (torch.arange(200) + first) % 200)


def test_several_processes_fill_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_fill, args=(str(tmp_path), barrier, first)) for first in (0, 0, 90)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    teacher = Words()
    assert right(of(teacher), torch.arange(200))
    assert not teacher.encoded
    assert len(list((tmp_path / "bootcli" / "prompts").iterdir())) == 1


def test_a_killed_process_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "CHUNK", 2)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    worker = context.Process(target=_fill, args=(str(tmp_path), barrier, 0))
    worker.start()
    barrier.wait(30)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    while not (tmp_path / "bootcli" / "prompts").is_dir() or not (ours := of(Words())).counts()[0]:
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    there = ours.counts()[0]
    assert 0 < there < 200
    rows = torch.from_numpy(np.flatnonzero(ours._table["done"]))
    assert right(of(Words()), rows)
    assert right(ours, torch.arange(200))


def test_negative_prompts_are_encoded_once() -> None:
    teacher = Words()
    prompts = Prompts([Prompt("a"), Prompt("bb", "red"), Prompt("ccc", ""), Prompt("dddd", "red")])
    pool = PromptPool(teacher, prompts, "grey!", guided=True)  # type: ignore[arg-type]
    general = pool.negative()
    assert general is not None
    assert general.tensors["tokens"].tolist() == [[5]]
    assert list(pool.fill(torch.arange(4)))[-1] == (6, 6)
    cond = pool.rows(index(3, 2, 0))
    assert cond.tensors["tokens"].flatten().tolist() == [4, 3, 1]
    assert cond.negative is not None
    assert cond.negative.tensors["tokens"].flatten().tolist() == [3, 0, 5]
    assert sorted(filter(None, teacher.encoded)) == ["a", "bb", "ccc", "dddd", "grey!", "red"]
    unguided = PromptPool(teacher, prompts, None, guided=False)  # type: ignore[arg-type]
    assert unguided.negative() is unguided.rows(index(1)).negative is None


def test_prompts_that_are_cut_are_told_of_a_few_times() -> None:
    prompts = Prompts(Prompt("x" * (151 if number else 1)) for number in range(100))
    pool = PromptPool(Words(), prompts, None, guided=False)  # type: ignore[arg-type]
    told = []
    for number in range(100):
        list(pool.fill(index(number)))
        told += pool.warnings()
    assert [int(text.split()[0]) for text in told] == [1, 2, 4, 8, 16, 32, 64, 99]
    assert told[0].startswith("1 of 2 prompts encoded so far are longer than the teacher reads")
    assert told[-1].startswith("99 of 100 prompts are longer")
