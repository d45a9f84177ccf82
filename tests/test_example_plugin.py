"""The tutorial plugin, as a user meets it: installed from its folder, distilled and sampled by the real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "plugin"


def python(*arguments: object, path: Path | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the interpreter with ``path`` before everything else that it imports from."""
    places = [str(place) for place in (path, ROOT, ROOT / "plugins") if place]
    inherited = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*places, *filter(None, [inherited])]),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin in it as pip installs it: package, weights and entry point."""
    pytest.importorskip("hatchling", reason="builds the example; part of bootcli[test]")
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", target)
    result = python("-m", "pip", "install", *options, EXAMPLE)
    assert result.returncode == 0, result.stderr
    return target


def test_plugin_passes_its_own_tests(installed: Path) -> None:
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE / "tests", path=installed)
    assert result.returncode == 0, result.stdout


def test_plugin_is_listed_without_torch(installed: Path) -> None:
    lines = (
        "import sys",
        "from bootcli.teachers.registry import family_named, resolve",
        "assert family_named('glyphs').summary",
        "assert resolve('glyphs-8').family.name == 'glyphs'",
        "assert 'torch' not in sys.modules",
    )
    result = python("-c", "\n".join(lines), path=installed)
    assert result.returncode == 0, result.stderr


def test_plugin_is_loaded_from_the_hub(installed: Path, tmp_path: Path) -> None:
    """With a client in the hub's place that gives what it is asked for."""
    lines = (
        "import fnmatch, pathlib, shutil, sys",
        "import huggingface_hub",
        "from bootcli.teachers.registry import load, resolve",
        "shipped, cache = pathlib.Path(resolve('glyphs-8').source), pathlib.Path(sys.argv[1])",
        "def download(hub_id, allow_patterns):",
        "    for file in shipped.iterdir():",
        "        if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):",
        "            shutil.copy(file, cache)",
        "    return str(cache)",
        "huggingface_hub.snapshot_download = download",
        "for name in ('me/glyphs', 'glyphs:me/glyphs'):",
        "    assert load(name).family.name == 'glyphs'",
    )
    result = python("-c", "\n".join(lines), tmp_path, path=installed)
    assert result.returncode == 0, result.stderr


def test_plugin_is_distilled_and_sampled(installed: Path, tmp_path: Path) -> None:
    def bootcli(*arguments: object) -> subprocess.CompletedProcess[str]:
        result = python("-m", "bootcli", *arguments, path=installed, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    bootcli("distill", "--teacher", "glyphs-8", "--steps", 5, "--batch-size", 8, "--device", "cpu", "--output", "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["teacher"] == "glyphs-8"
    bootcli("sample", "run", "-n", 4, "--class", 1, "--output", "images")
    assert len(list((tmp_path / "images").glob("*.png"))) >= 4
