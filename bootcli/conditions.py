"""Text embeddings on disk: computed once by the teacher, kept in the user's cache, and read from there by training.

One safetensors file for each set of texts and teacher, named by the hash of both. It is made at its full size, of holes
that take no room, and rows are filled as they are needed; a row counts from the moment its entry in ``done`` says so,
after its numbers have reached the disk. So several runs may fill the same file at once: at worst they write the same
row twice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bootcli.errors import BootError
from bootcli.prompts import Prompts
from bootcli.teachers.protocol import Cond, Teacher

FORMAT = 1
CHUNK = 64
"""Texts that are encoded, and count as done, at a time."""
DONE, CUT = 1, 2
"""In ``done``: a row is there; it is, of a text that the teacher does not read to its end."""
HALF = 6e4
"""Largest number that is kept in half precision."""
_TYPES: dict[str, type[np.generic]] = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U8": np.uint8}


class Embeddings:
    """What a teacher makes of texts, by their number, in half precision where its numbers fit.

    Args:
        teacher: loads its text encoder only where a row is not there.
        count: number of texts.
        text_of: the text of a number; None is no text.
        digest: a hash of all texts.
    """

    damaged: Path | None = None
    """A file that was there and could not be read; another takes its place."""

    def __init__(self, teacher: Teacher, count: int, text_of: Callable[[int], str | None], digest: str) -> None:
        self.teacher = teacher
        self.count = count
        self.text_of = text_of
        known = teacher.fingerprint()
        name = hashlib.blake2b(json.dumps([FORMAT, known, count, digest]).encode(), digest_size=20).hexdigest()
        self.path = None if known is None else user_cache_path("bootcli") / "prompts" / f"{name}.safetensors"
        self._file: BinaryIO | None = None
        self._offsets: dict[str, int] = {}
        self._table: dict[str, np.memmap[Any, Any]] = {}
        if self.path is not None and self.path.exists():
            try:
                self._open(self.path)
            except (SafetensorError, ValueError, LookupError, TypeError):
                self.damaged = self.path
                self.path.unlink(missing_ok=True)
            except OSError as error:
                raise _unusable(self.path, error) from error

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """The embeddings at ``index`` (b,) by name, on the CPU, in float32; those that are not there are made."""
        for _ in self.fill(index):
            pass
        found = {name: torch.from_numpy(rows[index.numpy()]) for name, rows in self._table.items() if name != "done"}
        return {name: rows.float() if rows.is_floating_point() else rows for name, rows in found.items()}

    def missing(self, index: Tensor) -> Tensor:
        """Which of the rows ``index`` are not there, each once, rising."""
        wanted: Tensor = torch.unique(index)
        return wanted[torch.from_numpy(self._table["done"][wanted.numpy()]) == 0] if self._table else wanted

    def counts(self) -> tuple[int, int, int]:
        """How many rows are there, how many of them are of texts that the teacher cuts, and the first of these."""
        done = self._table["done"] if self._table else np.zeros(1, np.uint8)
        return int((done != 0).sum()), int((done == CUT).sum()), int((done == CUT).argmax())

    def fill(self, index: Tensor) -> Iterator[int]:
        """Make the rows at ``index`` that are not there, a chunk at a time; yields how many there are in each."""
        while len(missing := self.missing(index)):  # looked at anew: another run may be making them, too
            yield self._encode(missing[:CHUNK])

    def _encode(self, index: Tensor) -> int:
        numbers = index.tolist()
        texts = [self.text_of(number) for number in numbers]
        device = next(self.teacher.net.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):  # whoever asks, rows are the same
            made = {name: tensor.cpu() for name, tensor in self.teacher.condition(texts).tensors.items()}
        kinds = {name: _kind(tensor) for name, tensor in made.items()}
        if not self._table or any(kinds[name] == "F32" and self._table[name].dtype != np.float32 for name in made):
            self._make({name: (kinds[name], tensor.shape[1:]) for name, tensor in made.items()})
        for name, tensor in made.items():
            rows = (tensor.float() if tensor.is_floating_point() else tensor).numpy().astype(self._table[name].dtype)
            for number, row in zip(numbers, rows, strict=True):
                self._write(name, number * row.nbytes, row.tobytes())
        assert self._file is not None
        os.fsync(self._file.fileno())
        cut = set(self.teacher.too_long([text or "" for text in texts]))
        for place, number in enumerate(numbers):
            self._write("done", number, bytes([CUT if place in cut else DONE]))
        return len(numbers)

    def _write(self, name: str, place: int, content: bytes) -> None:
        """By the file and not by the map: a full disk is an error then, and not the end of the process."""
        assert self._file is not None
        self._file.seek(self._offsets[name] + place)
        if self._file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def _make(self, rows: Mapping[str, tuple[str, Sequence[int]]]) -> None:
        """A file without a row, for rows of these types and shapes; if another run was faster, its file is taken."""
        folder = user_cache_path("bootcli") / "prompts"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".safetensors")
        except OSError as error:
            raise _unusable(folder, error) from error
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                size = file.write(_header({**rows, "done": ("U8", ())}, self.count))
                file.truncate(size + self.count * (1 + sum(_bytes(kind, shape) for kind, shape in rows.values())))
            temporary.chmod(0o644)
            if self.path is not None:
                if self._table:  # numbers that do not fit into what was there
                    self.path.unlink(missing_ok=True)
                try:
                    os.link(temporary, self.path)
                except FileExistsError:
                    pass
                except OSError:  # a file system without links
                    temporary.replace(self.path)
            self._open(self.path or temporary)
        finally:
            temporary.unlink(missing_ok=True)  # without a path the open file is all there is

    def _open(self, path: Path) -> None:
        """Map a file. Raises `SafetensorError`, or whatever else a broken header makes of it."""
        with safe_open(path, framework="np"):  # checks that types, shapes, offsets and the file fit each other
            pass
        with path.open("rb") as reader:
            length = int.from_bytes(reader.read(8), "little")
            header = json.loads(reader.read(length))
        if header.pop("__metadata__") != {"bootcli": str(FORMAT)} or header["done"]["dtype"] != "U8":
            raise ValueError("not a file of embeddings")
        file = path.open("r+b", buffering=0)
        table, offsets = {}, {}
        for name, entry in header.items():
            if entry["shape"][0] != self.count:
                raise ValueError("not as many embeddings as texts")
            offsets[name] = 8 + length + entry["data_offsets"][0]
            table[name] = np.memmap(file, _TYPES[entry["dtype"]], "r", offsets[name], tuple(entry["shape"]))
        self._file, self._table, self._offsets = file, table, offsets


def _unusable(path: Path, error: OSError) -> BootError:
    """What is wrong with the cache."""
    hint = "Set XDG_CACHE_HOME to a folder that can be written."
    return BootError(f"Text embeddings cannot be kept in {path}: {error.strerror}.", hint)


def _kind(tensor: Tensor) -> str:
    """How safetensors names the type that a tensor is kept in."""
    if not tensor.is_floating_point():
        return "I64"
    return "F16" if bool((tensor.abs() <= HALF).all()) else "F32"


def _bytes(kind: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * np.dtype(_TYPES[kind]).itemsize


def _header(rows: Mapping[str, tuple[str, Sequence[int]]], count: int) -> bytes:
    """The beginning of a safetensors file of ``count`` rows."""
    entries: dict[str, object] = {"__metadata__": {"bootcli": str(FORMAT)}}
    end = 0
    for name, (kind, shape) in rows.items():
        start, end = end, end + count * _bytes(kind, shape)
        entries[name] = {"dtype": kind, "shape": [count, *shape], "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class PromptPool:
    """The conditions of a text teacher's run, by the number of the prompt.

    Args:
        teacher: whose.
        prompts: of the run.
        negative: what guidance leads away from where a prompt says nothing else; None: no text.
        guided: whether negative prompts matter.
    """

    def __init__(self, teacher: Teacher, prompts: Prompts, negative: str | None, *, guided: bool) -> None:
        self.prompts = prompts
        self.embeddings = Embeddings(teacher, len(prompts), lambda number: prompts[number].text, prompts.digest)
        self._negatives: Embeddings | None = None
        self._which: Tensor | None = None
        self._told = 0
        if guided:
            places = {negative: 0}  # most are the same
            if prompts.own_negatives:
                own = (negative if prompt.negative is None else prompt.negative for prompt in prompts)
                self._which = torch.tensor([places.setdefault(text, len(places)) for text in own])
            texts = list(places)
            digest = hashlib.blake2b(json.dumps(texts).encode()).hexdigest()
            self._negatives = Embeddings(teacher, len(texts), texts.__getitem__, digest)

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> Cond:
        """The conditions at ``index`` (b,), with negative ones where any prompt has its own; on the CPU."""
        negative = None
        if self._negatives is not None and self._which is not None:
            negative = Cond(self._negatives.rows(self._which[index]))
        return Cond(self.embeddings.rows(index), negative)

    def negative(self) -> Cond | None:
        """What guidance leads away from in general, one row; None without guidance."""
        return None if self._negatives is None else Cond(self._negatives.rows(torch.zeros(1, dtype=torch.long)))

    def fill(self, index: Tensor) -> Iterator[tuple[int, int]]:
        """Encode what is missing of the prompts ``index``, and their negative ones; yields (done, total)."""
        parts = [(self.embeddings, index)]
        if self._negatives is not None and self._which is not None:
            parts.append((self._negatives, self._which[index]))
        total = left = sum(len(each.missing(rows)) for each, rows in parts)
        for each, rows in parts:
            for _ in each.fill(rows):
                left = sum(len(each.missing(rows)) for each, rows in parts)  # another run may be making them, too
                yield total - left, total
        if left:
            yield total, total

    def warnings(self) -> Iterator[str]:
        """What a user should know of the prompts that are encoded so far."""
        for each in (self.embeddings, self._negatives):
            if each is not None and each.damaged is not None:
                yield f"The embeddings kept in {each.damaged} were damaged and are made again."
                each.damaged = None
        there, cut, first = self.embeddings.counts()
        if cut >= max(1, 2 * self._told) or (there == len(self) and cut > self._told):  # a few times, however many
            self._told = cut
            far = "" if there == len(self) else " encoded so far"
            text = f"{cut} of {there} prompts{far} are longer than the teacher reads, and are cut"
            yield f"{text}, the first of them: {self.prompts[first].text:.60}"
