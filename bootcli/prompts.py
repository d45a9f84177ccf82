"""What a text teacher is asked for: prompts from files, from standard input, or those that come with bootcli.

| form | a prompt is |
|---|---|
| text | a line, a negative prompt behind a tab if there is one; no line is blank or begins with # |
| ``.jsonl`` | a JSON object a line: ``prompt``, and if you like ``negative_prompt`` and ``seed`` |
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bootcli.errors import UsageError

DEFAULT = Path(__file__).with_name("prompts.txt")
"""Two hundred varied prompts, written for bootcli."""
STDIN = "-"
_KEYS = {"prompt", "negative_prompt", "seed"}


@dataclass(frozen=True)
class Prompt:
    """One request.

    Args:
        text: what to draw.
        negative: what guidance leads away from; None: what the run says.
        seed: of its image, where it wants a certain one.
    """

    text: str
    negative: str | None = None
    seed: int | None = None


def read_prompts(source: str | None) -> list[Prompt]:
    """The prompts of a file, of all files of a pattern (``prompts/*.txt``), or of standard input (``-``).

    Args:
        source: None is `DEFAULT`.

    Raises `UsageError` for a source without prompts and for a line that is none, which it names.
    """
    found = [prompt for name, lines in _sources(source) for prompt in _parse(name, lines)]
    if not found:
        raise UsageError(f"{source} holds no prompts.", "Write one prompt per line.")
    return found


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Keep prompts as JSON lines, whatever form they came in."""
    lines = []
    for prompt in prompts:
        facts = {"prompt": prompt.text, "negative_prompt": prompt.negative, "seed": prompt.seed}
        lines.append(json.dumps({key: value for key, value in facts.items() if value is not None}, ensure_ascii=False))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _sources(source: str | None) -> Iterator[tuple[str, Iterable[str]]]:
    if source == STDIN:
        yield "standard input", _standard_input()
        return
    path = DEFAULT if source is None else Path(source).expanduser()
    paths = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path)))]  # noqa: PTH207  # which takes no absolute one
    if not paths:
        raise UsageError(f"Cannot read prompts from {source}: there is no such file.", "Check the path or the pattern.")
    for each in paths:
        try:
            yield str(each), each.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"Cannot read prompts from {each}: {error}.", "Give a text file in UTF-8.") from error


@cache
def _standard_input() -> tuple[str, ...]:
    """It can be read once only."""
    return tuple(sys.stdin)


def _parse(name: str, lines: Iterable[str]) -> Iterator[Prompt]:
    structured = name.endswith(".jsonl")
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if not line or (line.startswith("#") and not structured):
            continue
        yield _from_json(f"{name}, line {number}", line) if structured else _from_text(line)


def _from_text(line: str) -> Prompt:
    text, _, negative = line.partition("\t")
    return Prompt(text.strip(), negative.strip() or None)


def _from_json(where: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {error}.", "Each line is a JSON object with a prompt.") from None
    table = entry if isinstance(entry, dict) else {}
    text, negative, seed = (table.get(key) for key in ("prompt", "negative_prompt", "seed"))
    if not isinstance(text, str) or not isinstance(negative, str | None) or type(seed) not in (int, type(None)):
        raise UsageError(f"{where} is no prompt.", 'Each line is like {"prompt": "a fox", "negative_prompt": "snow"}.')
    if unknown := sorted(table.keys() - _KEYS):
        raise UsageError(f"{where}: unknown key {unknown[0]!r}.", f"There are: {', '.join(sorted(_KEYS))}.")
    return Prompt(text.strip(), negative, seed)
