"""What a text teacher is asked for: prompts from files, from standard input, or those that come with bootcli.

| form | a prompt is |
|---|---|
| text | a line, a negative prompt behind a tab if there is one; blank lines and those that begin with # are none |
| ``.jsonl`` | a JSON object a line: ``prompt``, and if you like ``negative_prompt`` and ``seed`` |

A line of text that begins like JSON is refused: it is meant for the other form. Standard input has that form where its
first line begins so. Lines are UTF-8, and end with a newline, a carriage return or both.

A prompt with a seed is drawn from that seed whenever its turn comes, in samples, evaluations and previews; training
draws its own noise. There may be millions of prompts: they are read line by line, and kept on disk.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile

from bootcli.errors import UsageError
from bootcli.paths import expanded

DEFAULT = Path(__file__).with_name("prompts.txt")
"""Two hundred varied prompts, written for bootcli."""
STDIN = "-"
OTHER_FORMS = {".csv", ".json", ".parquet", ".tsv", ".yaml", ".yml"}
"""Endings of files that would be read as prompts that nobody wrote."""
IN_MEMORY = 2**20
"""Bytes of prompts that are not worth a file."""
_JSON = re.compile(r'\s*[\[{]\s*\{?\s*("|$)')
"""How JSON begins; prompts begin with brackets too, as in ``[a red:a blue:0.5] shoe`` and ``{{masterpiece}}``."""
_KEYS = {"prompt", "negative_prompt", "seed"}
_to_json = json.JSONEncoder(ensure_ascii=False).encode
_LIKE = 'like {"prompt": "a fox", "negative_prompt": "snow", "seed": 7}.'
_EXAMPLE = f"Each line is {_LIKE}"
_FORMS = f"Give a text file with a prompt a line, or a .jsonl file with lines {_LIKE}"


@dataclass(frozen=True)
class Prompt:
    """One request.

    Args:
        text: what to draw.
        negative: what guidance leads away from; None: what the run says.
        seed: what its image is drawn from; None: the seed of the image.
    """

    text: str
    negative: str | None = None
    seed: int | None = None

    @property
    def line(self) -> str:
        """As a JSON object."""
        facts = {"prompt": self.text, "negative_prompt": self.negative, "seed": self.seed}
        return _to_json({key: value for key, value in facts.items() if value is not None})


class Prompts:
    """Prompts by their number, as JSON lines in a temporary file: in memory each takes eight bytes.

    Args:
        prompts: read once, in order.
    """

    digest: str
    """A hash of the texts."""
    own_negatives: bool
    """Whether any prompt has a negative one of its own."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  # it lives as long as this object
        self._starts = array("Q")
        self.own_negatives = False
        digest, end = hashlib.blake2b(digest_size=16), 0
        for prompt in prompts:
            self._starts.append(end)
            end += self._file.write(f"{prompt.line}\n".encode())
            self.own_negatives |= prompt.negative is not None
            text = prompt.text.encode()
            digest.update(b"%d " % len(text) + text)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Prompt:
        self._file.seek(self._starts[number])
        entry = json.loads(self._file.readline())
        return Prompt(entry["prompt"], entry.get("negative_prompt"), entry.get("seed"))

    def __iter__(self) -> Iterator[Prompt]:
        return map(self.__getitem__, range(len(self)))

    def in_turn(self, number: int) -> Prompt:
        """The prompt of an image, one after the other."""
        return self[number % len(self)]

    def seed_of(self, number: int) -> int:
        """What the image of that number is drawn from."""
        seed = self.in_turn(number).seed
        return number if seed is None else seed

    def write(self, path: Path) -> None:
        """Keep them as JSON lines, whatever form they came in."""
        self._file.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(self._file, file)


def read_prompts(source: str | None) -> Prompts:
    """The prompts of a file, of all files of a pattern (``prompts/*.txt``), or of standard input (``-``).

    Args:
        source: None is `DEFAULT`.

    Raises `UsageError` for a source without prompts and for a line that is none, which it names.
    """
    found = Prompts(prompt for name, lines in _sources(source) for prompt in _parse(name, lines))
    if not len(found):
        raise UsageError(f"{source} holds no prompts.", "Write one prompt per line.")
    return found


def check_text(where: str, text: str) -> None:
    """Raise `UsageError` for what is not text: half of a character, as JSON may hold it, or bytes of another encoding,
    as a command line may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = "\0"  # which is none either
    if "\0" in text:
        raise UsageError(f"{where} holds what is no character.", "Give text in UTF-8, and characters whole.")


def _sources(source: str | None) -> Iterator[tuple[str, Iterator[str]]]:
    """Names and lines."""
    if source == STDIN:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError("--prompts -: several processes cannot share standard input.", "Give a file.")
        yield "standard input", _lines("standard input", sys.stdin.buffer)
        return
    path = DEFAULT if source is None else expanded(source)
    paths = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path)))]  # noqa: PTH207  # which takes no absolute one
    if not paths:
        raise UsageError(
            f"Cannot read prompts from {source}: there is no such file.",
            "Check the path or the pattern, or give others with --prompts.",
        )
    for each in paths:
        try:
            with each.open("rb") as file:
                yield str(each), _lines(str(each), file)
        except OSError as error:
            raise UsageError(
                f"Cannot read prompts from {each}: {error.strerror}.",
                "Give a text file, or a pattern like prompts/*.txt",
            ) from error


def _lines(name: str, file: Iterable[bytes]) -> Iterator[str]:
    """Lines of UTF-8, which end where a text file's do, and not at the other ends of lines that Unicode knows; without
    the mark that some programs begin a file with, also where files were joined."""
    for number, line in enumerate((line for part in file for line in part.splitlines()), 1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = "\0"  # which UTF-16 has too
        if "\0" in text:
            raise UsageError(
                f"Cannot read prompts from {name}: line {number} is not UTF-8.", "Save it as text in UTF-8."
            )
        yield text.removeprefix("\ufeff")


def _parse(name: str, lines: Iterator[str]) -> Iterator[Prompt]:
    ending = Path(name).suffix.lower()
    if ending in OTHER_FORMS:
        raise UsageError(f"Cannot read prompts from {name}: {ending} is no form of theirs.", _FORMS)
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    structured = ending == ".jsonl" or (name == "standard input" and _JSON.match(first[1]) is not None)
    for number, line in itertools.chain([first], numbered):
        where = f"{name}, line {number}"
        if structured:
            yield _from_json(where, line)
        elif _JSON.match(line):
            raise UsageError(f"Cannot read prompts from {name}: line {number} begins like JSON.", _FORMS)
        elif not line.lstrip().startswith("#"):
            yield _from_text(where, line)


def _from_text(where: str, line: str) -> Prompt:
    text, tab, negative = line.partition("\t")
    if not text.strip():
        raise UsageError(f"{where} has no prompt before the tab.", "A negative prompt stands behind one.")
    return Prompt(text.strip(), negative.strip() if tab else None)


def _from_json(where: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {error}.", "Each line is a JSON object with a prompt.") from None
    table = entry if isinstance(entry, dict) else {}
    text, negative, seed = table.get("prompt"), table.get("negative_prompt"), table.get("seed")
    if not isinstance(text, str) or not text.strip() or not isinstance(negative, str | None):
        raise UsageError(f"{where} is no prompt.", _EXAMPLE)
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise UsageError(f"{where}: the seed is {seed!r}, not a whole number from 0 to 2^63 - 1.", _EXAMPLE)
    if unknown := sorted(table.keys() - _KEYS):
        raise UsageError(f"{where}: unknown key {unknown[0]!r}.", f"There are: {', '.join(sorted(_KEYS))}.")
    check_text(where, f"{text}{negative}")
    return Prompt(text.strip(), negative, seed)
