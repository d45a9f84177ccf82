"""The whole road on the embedded teacher: distil, resume, sample, evaluate, export; real processes where it matters."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import Cli, Done, environment

Inside = Callable[..., Done]

QUICK = ["--batch-size", "4", "--device", "cpu", "--set", "preview_teacher_steps=2", "--set", "watch.every=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with one run in it."""
    folder = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "bootcli", "distill", *QUICK, "--steps", "2", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 2
    assert (folder / result["student"]).is_file()
    assert (folder / result["preview"]).is_file()
    assert "step 2/2  loss" in done.stderr
    assert "\x1b" not in done.stderr
    return folder


def test_the_run_folder_has_a_telling_name(home: Path) -> None:
    (run,) = (home / "runs").iterdir()
    assert run.name.startswith("fashion-")


def test_sample_takes_the_newest_run_and_says_so(home: Path, cli: Cli) -> None:
    done = cli("sample", "-n", "3", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "Using run runs/fashion-" in done.stderr
    result = json.loads(done.stdout)
    assert result["nfe"] == 1
    assert [(home / name).suffix for name in result["files"]] == [".png"] * 3
    assert (home / result["grid"]).is_file()


def test_evaluate_has_a_gate(home: Path, inside: Inside) -> None:
    done = inside("evaluate", "-n", "80", "--teacher-steps", "2", "--max-fid", "0.001", "--json", cwd=home)
    assert done.returncode == 1
    assert "above --max-fid" in done.stderr
    result = json.loads(done.stdout)
    assert result["student"]["nfe"] == 1
    assert [row["steps"] for row in result["teacher"]] == [2]


def test_evaluate_prints_a_table(home: Path, inside: Inside) -> None:
    done = inside("evaluate", "-n", "80", "--teacher-steps", "", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "student" in done.stdout
    assert "not comparable with Inception FID" in done.stdout


def test_evaluate_measures_all_it_is_asked_for(home: Path, inside: Inside) -> None:
    words = ["evaluate", "--metric", "paired", "--metric", "pr", "-n", "6", "--teacher-steps", "2"]
    done = inside(*words, "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metrics"] == ["pr", "paired"]
    assert result["student"].keys() >= {"precision", "recall", "paired_mse"}
    assert result["teacher"][0].keys() >= {"precision", "recall"}
    assert "paired_mse" not in result["teacher"][0]
    assert "fid" not in result["student"]
    assert result["manifold"] == {"images": 6, "neighbours": 3}
    assert list(home.glob("runs/*/evaluations/pr-paired-2*.json"))


def test_evaluate_shows_the_columns_that_were_asked_for(home: Path, inside: Inside) -> None:
    words = ["evaluate", "-n", "70", "--teacher-steps", "1", "--repeats", "2"]
    done = inside(*words, "--metric", "fid", "--metric", "pr", cwd=home)
    assert done.returncode == 0, done.stderr
    title, student = (
        next(line for line in done.stdout.splitlines() if word in line) for word in ("images of", "student")
    )
    for word in ("FID in fashion-cnn-64", "precision", "recall"):
        assert word in title
    assert "squared error" not in title
    assert student.count("±") == 3
    alone = inside("evaluate", "-n", "2", "--metric", "paired", cwd=home)
    assert alone.returncode == 0, alone.stderr
    assert "squared error to the teacher" in alone.stdout
    assert "FID" not in alone.stdout
    assert "precision" not in alone.stdout.replace("precision float32", "")


def test_precision_and_recall_need_features(home: Path, inside: Inside) -> None:
    from bootcli.reference import reference_for, write_reference
    from bootcli.teachers.registry import load

    own = reference_for(load("fashion").teacher, None, torch.device("cpu"))
    write_reference(home / "bare.safetensors", dataclasses.replace(own, features=None))
    done = inside("evaluate", "--metric", "pr", "--reference", "bare.safetensors", cwd=home)
    assert done.returncode == 2
    assert "a mean and a covariance only" in done.stderr


def test_export(home: Path, inside: Inside) -> None:
    done = inside("export", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["max_abs_difference"] <= 1e-4
    assert (home / result["output"]).is_dir()
    assert inside("export", cwd=home).returncode == 2


def test_resume_goes_on_and_refuses_another_run(home: Path, cli: Cli, inside: Inside) -> None:
    refused = inside("distill", "--resume", "--learning-rate", "0.5", cwd=home)
    assert refused.returncode == 2
    assert "--resume cannot change learning_rate" in refused.stderr
    done = cli("distill", "--resume", "--steps", "3", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "Using run" in done.stderr
    assert "going on after step 2" in done.stderr
    assert "bootcli sample runs/" in done.stdout


def test_a_dry_run_prints_a_config_file_and_writes_nothing(inside: Inside, tmp_path: Path) -> None:
    done = inside("distill", *QUICK, "--dry-run", "--steps", "7")
    assert done.returncode == 0, done.stderr
    assert "s a step" in done.stdout
    assert list(tmp_path.iterdir()) == []
    from bootcli.config import read_file, resolve

    (tmp_path / "mine.toml").write_text(done.stdout)
    settings = resolve(read_file(tmp_path / "mine.toml"))
    assert (settings.steps, settings.batch_size, settings.preview_teacher_steps) == (7, 4, 2)


def test_flags_beat_set_beats_the_file(inside: Inside, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("steps = 5\nbatch_size = 5\nseed = 5\ndevice = 'cpu'\n")
    layers = ["--steps", "3", "--set", "steps=4", "--set", "batch_size=4", "--config", "mine.toml"]
    done = inside("distill", *layers, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["config"]
    assert (config["steps"], config["batch_size"], config["seed"]) == (3, 4, 5)


@pytest.mark.parametrize("flags", [["--prompts", "words.txt"], ["--classes", "1"], ["--guidance-scale", "2"]])
def test_a_flag_that_the_teacher_cannot_honour_is_an_error(inside: Inside, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "words.txt").write_text("a shoe\n")
    done = inside("distill", *QUICK, *flags)
    assert done.returncode == 2
    assert f"{flags[0]}: the teacher fashion" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_teacher_is_described(inside: Inside) -> None:
    result = json.loads(inside("teachers", "fashion", "--json").stdout)
    assert result["sample_shape"] == [1, 16, 16]
    assert result["prediction"] == "eps"
    assert 0 < result["terminal_snr"] < 1e-3
    assert result["export_formats"] == ["diffusers", "safetensors"]
    shown = inside("teachers", "fashion").stdout
    assert 'objective = "kd"' in shown, "as a config file has it"


def test_env(inside: Inside) -> None:
    done = inside("env", "--json")
    result = json.loads(done.stdout)
    assert {"python", "torch", "diffusers", "bootcli"} <= set(result["versions"])
    assert "cpu" in result["devices"]
    assert "HF_HOME" in result["caches"]
    assert any(name.startswith("ddpm") for name in result["plugins"])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_is_saved_and_says_how_to_go_on(tmp_path: Path, signum: int, code: int) -> None:
    command = [sys.executable, "-m", "bootcli", "distill", *QUICK, "--steps", "100000", "--output", "mine", "--json"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    time.sleep(0.2)
    process.send_signal(signum)
    out, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert out == ""
    assert "bootcli distill --resume --output mine" in said
    assert list((tmp_path / "mine" / "checkpoints").iterdir())
