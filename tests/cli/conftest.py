"""Fixtures of the command line: real processes in an empty folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]

REPORT = """
import sys
from bootcli.cli import main
try:
    main()
finally:
    heavy = sorted({"torch", "diffusers", "numpy", "pydantic", "scipy", "transformers"} & set(sys.modules))
    print("HEAVY", *heavy, file=sys.stderr)
"""


def environment(**extra: str) -> dict[str, str]:
    """80 columns, one thread, offline, no colour; the rest as it is."""
    fixed = {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BOOTCLI", "FORCE_COLOR"))}
    return {**kept, **fixed, **extra}


def processor_seconds() -> float:
    """What finished child processes have used: unlike the clock, little touched by other work on the machine."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """``cli("sample", "-n", "4")`` in a folder of its own; keyword arguments are environment variables."""

    def call(*args: str, cwd: Path = tmp_path, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bootcli", *args]
        return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout)

    return call


@pytest.fixture
def heavy(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """Like `cli`, giving exit code, stderr and the heavy libraries that were imported on the way."""

    def call(*args: str, **env: str) -> tuple[int, str, list[str]]:
        command = [sys.executable, "-c", REPORT, *args]
        done = subprocess.run(command, cwd=tmp_path, env=environment(**env), capture_output=True, text=True, timeout=60)
        said, _, imported = done.stderr.rpartition("HEAVY")
        return done.returncode, said, imported.split()

    return call


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., Path]:
    """Installs a distribution with one teacher plugin into a folder, which is returned for the import path."""
    site = tmp_path / "site"

    def install(distribution: str, name: str, source: str) -> Path:
        module = distribution.replace("-", "_")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[bootcli.teachers]\n{name} = {module}:family\n")
        (site / f"{module}.py").write_text(source)
        return site

    return install


FAMILY = """
from pathlib import Path
from bootcli.plugin import Alias, TeacherFamily

def _refuse(*_):
    raise RuntimeError("a bug of the plugin")

family = TeacherFamily(
    name={name!r},
    summary="a test",
    accepts=("a folder with {name}.txt",),
    matches=lambda path: (path / "{name}.txt").exists(),
    load=_refuse,
    build=_refuse,
    aliases={{alias: Alias("/nowhere/" + alias, "a test") for alias in {aliases!r}}},
)
"""


@pytest.fixture
def family() -> Callable[..., str]:
    """Source of a plugin module."""
    return lambda name, *aliases: FAMILY.format(name=name, aliases=aliases)


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Done]:
    """Like `cli` in this very process: saves the seconds that importing torch takes, where a process proves nothing."""

    def call(*args: str, cwd: Path = tmp_path) -> Done:
        from bootcli.cli import main

        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["bootcli", *args])
        monkeypatch.setenv("COLUMNS", "80")
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as left:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        out, said = capsys.readouterr()
        return Done(left.value.code if isinstance(left.value.code, int) else 0, out, said)

    return call
