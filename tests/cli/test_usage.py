"""Usage errors: exit code 2, one clear line, found before torch is imported. Other failures: their exit codes."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bootcli import cli as command_line
from bootcli.cli.common import fail, integers, print_json, to_toml
from bootcli.config import DistillConfig, read_file, read_overrides, to_dict
from bootcli.errors import BootError, Interrupted, UsageError

from .conftest import Cli, Done, environment, processor_seconds

Heavy = Callable[..., tuple[int, str, list[str]]]

WRONG = {
    "distill --teacher fasion": "Did you mean fashion, fashion-sd or fashion-edm?",
    "distill --teacher ./missing": "./missing does not exist",
    "distill --steps 0": "steps = 0",
    "distill --steps many": "--steps",
    "distill --learning-rate=-1": "learning_rate",
    "distill --teacher ~nobody123/x": "~nobody123/x does not exist",
    "distill --teacher ddpm:~nobody123/x": "~nobody123/x does not exist",
    "distill --negative-prompt caf\udce9": "--negative-prompt holds what is no character",
    "distill --classes 1,x": "whole numbers",
    "distill --objective magic": "--objective",
    "distill --set boot.dleta=1": "Did you mean boot.delta",
    "distill --set delta": "expected key=value",
    "distill --set student.start_t=0": "student.start_t = 0",
    "distill --set boot.delta=2": "boot.delta = 2",
    "distill --config missing.toml": "Cannot read config file missing.toml",
    "distill --config broken.toml": "is not TOML",
    "distill --config typo.toml": "Unknown setting: stpes",
    "distill --output full": "full is not empty",
    "distill --output a.file": "a.file is a file",
    "distill --resume": "No run found",
    "distill --resume --output missing": "There is no run missing",
    "distill --resume --output run --seed 3": "--resume cannot change seed",
    "distill --set optimizer.betas=[0.9,1.0]": "optimizer.betas",
    "distill --seed 99999999999999999999": "seed",
    "distill --learning-rate inf": "learning_rate",
    "distill --resume --overwrite": "--resume goes with neither",
    "distill --overwrite": "--overwrite needs --output",
    "distill --set steps=true": "Setting steps = True: input should be a number",
    "distill --set classes=[]": "classes = []",
    "distill --step 3": "--steps",
    "distil": "Did you mean 'distill'?",
    "sample": "No run found",
    "sample missing": "There is no run missing",
    "sample full --output full": "full is not empty",
    "sample -n 0": "--num-images",
    "sample run --overwrite": "--overwrite needs --output",
    "distill --set kd.solver=dpm": "Setting kd.solver = 'dpm': input should be 'euler'",
    "sample run --prompt caf\udce9": "--prompt holds what is no character",
    "sample run --prompts ~nobody123/x": "Cannot read prompts from ~nobody123/x: there is no such file",
    "evaluate --teacher-steps 4,0": "at least 1 step",
    "evaluate --metric beauty": "There are: fid, pr, accuracy, paired",
    "evaluate --metric fid --metric": "--metric",
    "evaluate --metric pr --max-fid 3": "Add --metric fid",
    "evaluate --max-fid nan": "--max-fid nan: expected a number",
    "evaluate --metric paired --nfe 1,2": "paired is of one call alone",
    "evaluate --metric paired --teacher-steps 7,9": "paired alone takes no numbers of the teacher",
    "export missing": "There is no run missing",
    "export full --output full": "full is not empty",
    "teachers fasion": "Did you mean fashion, fashion-sd or fashion-edm?",
    "teachers ddpm:fasion": "Did you mean fashion?",
    "teachers nonsense": "Unknown teacher 'nonsense'",
}


NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes."


@pytest.fixture
def clutter(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    (tmp_path / "a.file").write_text("")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    (tmp_path / "typo.toml").write_text("stpes = 3")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(DistillConfig())))


@pytest.mark.usefixtures("clutter")
@pytest.mark.parametrize("line", WRONG)
def test_usage_errors_are_clear_and_cheap(heavy: Heavy, line: str) -> None:
    code, said, imported = heavy(*line.split())
    assert code == 2, said
    assert WRONG[line] in " ".join(said.split()), said
    assert "Traceback" not in said
    assert not {"torch", "diffusers", "numpy", "scipy", "transformers"} & set(imported)


def test_usage_errors_take_less_than_a_second(cli: Cli) -> None:
    best = float("inf")
    for _ in range(10):
        before = processor_seconds()
        assert cli("distill", "--teacher", "fasion").returncode == 2
        best = min(best, processor_seconds() - before)
        if best < 1:
            return
    pytest.fail(f"took {best:.2f} s")


def test_a_folder_that_no_family_reads(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    done = cli("distill", "--teacher", "odd")
    assert done.returncode == 1
    assert "No installed teacher family reads odd" in done.stderr
    assert "ddpm: a diffusers pipeline folder" in done.stderr


def test_a_hub_id_without_network(cli: Cli, tmp_path: Path) -> None:
    done = cli("teachers", "someone/something", HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 1
    for word in ("someone/something", "HF_HUB_OFFLINE", "--teacher ./something"):
        assert word in done.stderr


def test_an_unexpected_error_is_one_line_and_a_traceback_on_demand(
    cli: Cli, plugin: Callable[..., Path], family: Callable[..., str]
) -> None:
    site = str(plugin("faulty", "faulty", family("faulty", "trap")))
    done = cli("teachers", "trap", PYTHONPATH=site)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: unexpected RuntimeError: a bug of the plugin")
    assert "Traceback" not in done.stderr
    assert "Traceback" in cli("--debug", "teachers", "trap", PYTHONPATH=site).stderr
    assert "Traceback" in cli("teachers", "trap", PYTHONPATH=site, BOOTCLI_DEBUG="1").stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (BootError("It broke.", "Mend it."), 1, "Error: It broke.\nMend it.\n"),
        (NotADirectoryError(20, "Not a directory", "f.txt/x"), 1, "Error: f.txt/x: Not a directory.\n"),
        (UsageError("Not so."), 2, "Error: Not so.\n"),
        (Interrupted("Saved.", "Go on.", signum=2), 130, "Saved.\nGo on.\n"),
        (Interrupted("Saved.", signum=15), 143, "Saved.\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "Error: No space left on device (a/b).\n"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "Error: No space left on device.\n"),
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), 1, "Error: Disk quota exceeded.\n"),
        (MemoryError(), 1, "Error: The device has not enough memory: out of memory\nTake a smaller --batch-size"),
        (RuntimeError(f"{NO_MEMORY}\nmore"), 1, f"Error: The device has not enough memory: {NO_MEMORY}\nTake"),
        (KeyError("x"), 1, "Error: unexpected KeyError: 'x'\n"),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], error: Exception, code: int, says: str) -> None:
    with pytest.raises(SystemExit) as left:
        fail(error)
    assert left.value.code == code
    assert capsys.readouterr().err.startswith(says)


@pytest.mark.parametrize(
    ("happening", "code"),
    [("os.kill(os.getpid(), signal.SIGTERM)", 143), ("raise KeyboardInterrupt", 130), ("sys.exit(3)", 3)],
)
def test_signals_outside_a_run(happening: str, code: int) -> None:
    script = f"""
import os, signal, sys
from bootcli import cli
from bootcli.teachers import registry
def happen():
    {happening}
registry.installed = happen
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script, "teachers"], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "bootcli", "teachers", "--json"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.wait()
    process.stderr.close()
    assert said == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_message(unbuffered: str) -> None:
    env = environment(PYTHONUNBUFFERED=unbuffered)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bootcli", "--version"], env=env, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.count("No space left on device") == 1
    assert "Traceback" not in done.stderr


def test_nobody_reads_what_went_wrong() -> None:
    command = [sys.executable, "-m", "bootcli", "distill", "--teacher", "fasion"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait() == 2


def test_an_interrupt_before_a_command_begins(inside: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "app", interrupt)
    assert inside() == Done(130, "", "")


@pytest.mark.parametrize(
    "line",
    [
        "distill --resume --output=~/y",
        "distill --config=~/x",
        "sample . --output=~/x",
        "export . --output=~/x",
        "evaluate . --save-reference=~/x",
        "teachers fashion --convert=~/x",
    ],
)
def test_home_is_found_behind_an_equals_sign(
    inside: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("= =")
    done = inside(*line.split())
    assert done.returncode == 2
    assert f"{tmp_path}/{line[-1]}" in done.stderr


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_is_no_error(
    inside: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    for closed in {"stdin", name}:  # what pytest has there is no stream to read
        monkeypatch.setattr(sys, closed, None)
    assert inside("sample", str(tmp_path), "--prompts", "-").returncode == 2, "no prompts"
    assert inside("teachers", "--json").returncode == 0


def test_what_a_stream_cannot_encode_is_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(command_line, "app", lambda: print("0.62 ± 0.01"))
    command_line.main()
    assert written.getvalue() == b"0.62 \\xb1 0.01\n"


def test_integers() -> None:
    assert integers(None, "--classes") is None
    assert integers("1, 3,5", "--classes") == (1, 3, 5)


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), Path("c")], "d": (1,)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, "c"], "d": [1]}


def test_a_recipe_that_is_shown_is_a_config_file(tmp_path: Path) -> None:
    recipe = {"objective": "kd", "optimizer.decay": "inverse-sqrt", "kd.adversary": 0.5, "guidance.interval": [0, 0.75]}
    (tmp_path / "recipe.toml").write_text(to_toml(recipe, comments={}))
    assert read_file(tmp_path / "recipe.toml") == recipe


def test_settings_survive_a_config_file(tmp_path: Path) -> None:
    from bootcli.config import DistillConfig, read_file, resolve, to_dict

    config = resolve({"teacher": 'a "b" \\ ü', "classes": (1, 2), "boot.delta": 1e-5, "optimizer.compile": True})
    assert config != DistillConfig()
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(to_dict(config), {"time": "1 s"}), encoding="utf-8")
    assert resolve(read_file(path)) == config


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("guidance.interval=0,0.75", [0, 0.75]),
        ("guidance.interval=[0, 0.75]", [0, 0.75]),
        ("boot.delta=0.1", 0.1),
        ("watch.reference=fashion", "fashion"),
        ("prompts=one, two.txt", "one, two.txt"),
        ('prompts="1,2"', "1,2"),
    ],
)
def test_overrides_are_toml_or_numbers_with_commas_or_text(word: str, value: object) -> None:
    assert list(read_overrides([word]).values()) == [value]
