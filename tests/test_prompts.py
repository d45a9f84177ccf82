"""Prompts from files of several forms, and what a broken line says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from bootcli import prompts
from bootcli.errors import UsageError
from bootcli.prompts import Prompt, read_prompts, write_prompts


def test_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# a comment\n  a fox \r\n\n a sign # 7\nein Fuß\tSchnee, Regen\na #1\n".encode())
    assert read_prompts(str(file)) == [
        Prompt("a fox"),
        Prompt("a sign # 7"),
        Prompt("ein Fuß", "Schnee, Regen"),
        Prompt("a #1"),
    ]


def test_json_lines_and_back(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "a fox", "negative_prompt": ""}', "", r'{"prompt": "# a ☃\u2028b\u0085c"}', ""]
    file.write_text("\n".join(lines), encoding="utf-8")
    found = read_prompts(str(file))
    assert found == [Prompt("a fox", ""), Prompt("# a ☃\u2028b\u0085c")]
    write_prompts(tmp_path / "again.jsonl", found)
    assert read_prompts(str(tmp_path / "again.jsonl")) == found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[1]", "line 2 is no prompt"),
        ('{"prompt": 3}', "line 2 is no prompt"),
        ('{"prompt": "  "}', "line 2 is no prompt"),
        ('{"prompt": "a", "negative_prompt": 1}', "line 2 is no prompt"),
        ('{"prompt": "a", "wings": 2}', "line 2: unknown key 'wings'"),
        ("[" * 5000, "line 2: "),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a fox"}}\n{line}\n')
    with pytest.raises(UsageError, match=message):
        read_prompts(str(file))


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def test_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"prompt": "first"}')
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "*"))] == ["first", "second"]


def test_standard_input_is_utf_8_in_either_form(monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, "\ufeffein Fuß\r\n# not\na hare\tdogs\n".encode())
    assert read_prompts("-") == [Prompt("ein Fuß"), Prompt("a hare", "dogs")]
    standard_input(monkeypatch, b'\n{"prompt": "a fox"}\n')
    assert read_prompts("-") == [Prompt("a fox")]
    standard_input(monkeypatch, b"\xff")
    with pytest.raises(UsageError, match="standard input"):
        read_prompts("-")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="cannot share standard input"):
        read_prompts("-")


def test_a_negative_prompt_alone_is_none(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\tblurry\n")
    with pytest.raises(UsageError, match="line 2 has no prompt before the tab"):
        read_prompts(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"\n# only this\n", "holds no prompts"), (b"\xff\xfe", "UTF-8|codec")],
)
def test_a_source_without_prompts(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_prompts(str(file))


def test_those_that_come_with_bootcli() -> None:
    found = read_prompts(None)
    assert len(found) == 200
    assert len({prompt.text for prompt in found}) == 200
    assert not any(prompt.negative for prompt in found)
    assert prompts.DEFAULT.is_file()
