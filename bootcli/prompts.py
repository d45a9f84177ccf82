"""What a text teacher is asked for: prompts from files, from standard input, or those that come with bootcli.

| form | a prompt is |
|---|---|
| text | a line, a negative prompt behind a tab if there is one; no line is blank or begins with # |
| ``.jsonl`` | a JSON object a line: ``prompt``, and if you like ``negative_prompt`` |
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bootcli.errors import UsageError

DEFAULT = Path(__file__).with_name("prompts.txt")
"""Two hundred varied prompts, written for bootcli."""
STDIN = "-"
_KEYS = {"prompt", "negative_prompt"}


@dataclass(frozen=True)
class Prompt:
    """One request.

    Args:
        text: what to draw.
        negative: what guidance leads away from; None: what the run says.
    """

    text: str
    negative: str | None = None


def read_prompts(source: str | None) -> list[Prompt]:
    """The prompts of a file, of all files of a pattern (``prompts/*.txt``), or of standard input (``-``).

    Args:
        source: None is `DEFAULT`.

    Raises `UsageError` for a source without prompts and for a line that is none, which it names.
    """
    found = [prompt for name, content in _sources(source) for prompt in _parse(name, content)]
    if not found:
        raise UsageError(f"{source} holds no prompts.", "Write one prompt per line.")
    return found


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Keep prompts as JSON lines, whatever form they came in."""
    lines = []
    for prompt in prompts:
        facts = {"prompt": prompt.text, "negative_prompt": prompt.negative}
        lines.append(json.dumps({key: value for key, value in facts.items() if value is not None}, ensure_ascii=False))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _sources(source: str | None) -> Iterator[tuple[str, str]]:
    """Names and contents."""
    if source == STDIN:
        yield "standard input", _standard_input()
        return
    path = DEFAULT if source is None else Path(source).expanduser()
    paths = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path)))]  # noqa: PTH207  # which takes no absolute one
    if not paths:
        raise UsageError(f"Cannot read prompts from {source}: there is no such file.", "Check the path or the pattern.")
    for each in paths:
        try:
            yield str(each), each.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"Cannot read prompts from {each}: {error}.", "Give a text file in UTF-8.") from error


def _standard_input() -> str:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--prompts -: several processes cannot share standard input.", "Give a file.")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"Cannot read prompts from standard input: {error}.", "Give text in UTF-8.") from error


def _parse(name: str, content: str) -> Iterator[Prompt]:
    structured = name.endswith(".jsonl") or (name == "standard input" and content.lstrip().startswith("{"))
    for number, line in enumerate(content.split("\n"), 1):  # and not at the other ends of lines that Unicode knows
        where = f"{name}, line {number}"
        if line.strip() and (structured or not line.lstrip().startswith("#")):
            yield _from_json(where, line) if structured else _from_text(where, line)


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
    text, negative = table.get("prompt"), table.get("negative_prompt")
    if not isinstance(text, str) or not text.strip() or not isinstance(negative, str | None):
        raise UsageError(f"{where} is no prompt.", 'Each line is like {"prompt": "a fox", "negative_prompt": "snow"}.')
    if unknown := sorted(table.keys() - _KEYS):
        raise UsageError(f"{where}: unknown key {unknown[0]!r}.", f"There are: {', '.join(sorted(_KEYS))}.")
    return Prompt(text.strip(), negative)
