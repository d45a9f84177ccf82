"""Prompts from files of several forms, and what a broken line says."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from bootcli import prompts
from bootcli.errors import UsageError
from bootcli.prompts import Prompt, Prompts, read_prompts


def test_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# a comment\n  a fox \r\n\n a sign # 7\nein Fuß\tSchnee, Regen\na #1\n".encode())
    assert list(read_prompts(str(file))) == [
        Prompt("a fox"),
        Prompt("a sign # 7"),
        Prompt("ein Fuß", "Schnee, Regen"),
        Prompt("a #1"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_lines_end_as_any_system_ends_them(tmp_path: Path, name: str, end: str) -> None:
    """Two files that were joined, each with its mark; a line that Unicode alone ends goes on."""
    texts = ["a fox", "a\u2028hare", "a crow"]
    lines = texts if name.endswith(".txt") else [Prompt(text).line for text in texts]
    content = f"\ufeff{lines[0]}{end}{lines[1]}{end}\ufeff{lines[2]}{end}"
    (tmp_path / name).write_bytes(content.encode())
    assert [prompt.text for prompt in read_prompts(str(tmp_path / name))] == texts
    (tmp_path / name).write_bytes(content.encode() + b"\xff")
    with pytest.raises(UsageError, match="line 4 is not UTF-8"):
        read_prompts(str(tmp_path / name))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_another_encoding_is_said(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("a fox\na hare\n".encode(encoding))
    with pytest.raises(UsageError, match=r"Cannot read prompts from .*a\.txt: line 1 is not UTF-8\.$"):
        read_prompts(str(tmp_path / "a.txt"))


def test_a_folder_holds_files_and_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"Cannot read prompts from {tmp_path}: Is a directory.$") as error:
        read_prompts(str(tmp_path))
    assert "*.txt" in error.value.hint


def test_json_lines_and_back(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "a fox", "negative_prompt": ""}', "", r'{"prompt": "# a ☃\u2028b\u0085c", "seed": 7}', ""]
    file.write_text("\n".join(lines), encoding="utf-8")
    found = read_prompts(str(file))
    assert list(found) == [Prompt("a fox", ""), Prompt("# a ☃\u2028b\u0085c", seed=7)]
    assert found.own_negatives
    found.write(tmp_path / "again.jsonl")
    again = read_prompts(str(tmp_path / "again.jsonl"))
    assert list(again) == list(found)
    assert again.digest == found.digest


def test_prompts_by_their_number() -> None:
    some = Prompts(Prompt(f"number {i}", seed=i % 2 or None) for i in range(5))
    assert len(some) == 5
    assert [some[i].text for i in (3, 0, 4)] == ["number 3", "number 0", "number 4"]
    assert some.in_turn(12) == some[2]
    assert [some.seed_of(number) for number in (10, 11, 12, 13)] == [10, 1, 12, 1]
    assert not some.own_negatives
    assert some.digest == Prompts(map(Prompt, (f"number {i}" for i in range(5)))).digest, "of the texts alone"
    assert some.digest != Prompts(map(Prompt, (f"number {i}" for i in range(4)))).digest
    assert Prompts([Prompt("a"), Prompt("b")]).digest != Prompts([Prompt("ab")]).digest


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
        ('{"prompt": "a", "seed": -1}', "line 2: the seed is -1"),
        ('{"prompt": "a", "seed": 1.0}', "line 2: the seed is 1.0"),
        ('{"prompt": "a", "seed": true}', "line 2: the seed is True"),
        (r'{"prompt": "a \ud83d"}', "line 2 holds what is no character"),
        (r'{"prompt": "a \u0000"}', "line 2 holds what is no character"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a fox"}}\n{line}\n')
    with pytest.raises(UsageError, match=message):
        read_prompts(str(file))


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[\n"),
        ("a.CSV", "prompt,seed\na fox,3\n"),
        ("a.tsv", "Prompt\tCategory\na fox\tAnimals\n"),
        ("a.txt", '{"prompt": "a fox"}\n'),
        ("a.txt", '\n[{"prompt": "a fox"}]\n'),
        ("a", '[\n  "a fox"\n]\n'),
        ("a.txt", 'a hare\n{"prompt": "a fox"}\n'),
        ("a.txt", '# mine\n{"prompt": "a fox"}\n'),
    ],
)
def test_other_forms_are_not_read_as_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=r"Cannot read prompts.*(is no form of theirs|begins like JSON)") as error:
        read_prompts(str(tmp_path / name))
    assert "a text file with a prompt a line, or a .jsonl file" in error.value.hint


def test_text_in_brackets_is_text(tmp_path: Path) -> None:
    honest = ["[a red:a blue:0.5] shoe", "{{masterpiece}}, a fox", "{red|blue} shoe", '"a fox", in oil', "[[fog]] sea"]
    for line in honest:
        (tmp_path / "a.txt").write_text(line)
        assert list(read_prompts(str(tmp_path / "a.txt"))) == [Prompt(line)]


def test_json_lines_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text('{"prompt": "a fox"}\n')
    assert list(read_prompts(str(tmp_path / "A.JSONL"))) == [Prompt("a fox")]


def test_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"prompt": "first"}')
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "*"))] == ["first", "second"]


def test_standard_input_is_utf_8_in_either_form(monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, "\ufeffein Fuß\r\n# not\na hare\tdogs\n".encode())
    assert list(read_prompts("-")) == [Prompt("ein Fuß"), Prompt("a hare", "dogs")]
    standard_input(monkeypatch, b'\n{"prompt": "a fox"}\n')
    assert list(read_prompts("-")) == [Prompt("a fox")]
    standard_input(monkeypatch, b"{red|blue} shoe\n")
    assert list(read_prompts("-")) == [Prompt("{red|blue} shoe")]
    standard_input(monkeypatch, b'a hare\n{"prompt": "a fox"}\n')
    with pytest.raises(UsageError, match="standard input: line 2 begins like JSON"):
        read_prompts("-")
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


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path) -> None:
    """Eight bytes for each, whatever its length; measured in a process of its own."""
    file = tmp_path / "prompts.txt"
    with file.open("w") as stream:
        for number in range(200_000):
            stream.write(f"a red fox in deep snow at dawn, an oil painting of an old master, number {number}\n")
    script = """
import resource, sys
from bootcli.prompts import read_prompts
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prompts = read_prompts(sys.argv[1])
assert len(prompts) == 200_000 and prompts[123_456].text.endswith("number 123456")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 * 1024, "KiB; the file alone has 15 MiB"
