"""Help: complete, quick, and frozen option names."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from bootcli import __version__
from bootcli import config as settings
from bootcli.cli import app, options
from bootcli.cli import distill as command
from bootcli.cli.evaluate import COLUMNS, evaluate
from bootcli.pipelines.evaluate import METRICS
from bootcli.pipelines.events import Finished, Previewed
from bootcli.watch import Score

from .conftest import Cli, environment, processor_seconds
from .do_nothing import source

COMMANDS = ["distill", "sample", "evaluate", "export", "teachers", "env"]
GOLDEN = Path(__file__).parents[1] / "golden" / "options.json"
GROUP = typer.main.get_command(app)


def examples_of(name: str) -> list[str]:
    """The examples of a command, or of bootcli itself."""
    epilogs = {one.callback.__name__: one.epilog for one in app.registered_commands if one.callback}
    found = re.findall(r"^\$ .*", str(epilogs.get(name, app.info.epilog)), re.MULTILINE)
    assert len(found) == 2
    return found


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("rich", ["1", "0"])
def test_help_shows_two_examples_each_on_its_line(cli: Cli, name: str, rich: str) -> None:
    done = cli(*([name] if name else []), "--help", TYPER_USE_RICH=rich)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.strip() for line in lines if line.strip().startswith("$ ")] == examples_of(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_valid(name: str) -> None:
    for line in examples_of(name):
        _, _, verb, *words = shlex.split(line.partition(" >")[0])
        GROUP.commands[verb].make_context(verb, words)  # type: ignore[attr-defined]


def test_options_are_frozen() -> None:
    """An option that is renamed or gone breaks somebody's script; regenerate the file only on purpose."""
    found = {
        name: sorted(opt for parameter in one.params for opt in (*parameter.opts, *parameter.secondary_opts))
        for name, one in [("bootcli", GROUP), *GROUP.commands.items()]  # type: ignore[attr-defined]
    }
    assert found == json.loads(GOLDEN.read_text())


def test_choices_and_defaults_are_those_of_the_configuration() -> None:
    assert typing.get_args(options.Device) == typing.get_args(settings.Device)
    assert typing.get_args(options.MixedPrecision) == typing.get_args(settings.MixedPrecision)
    fields = {field.name: field.default for field in dataclasses.fields(settings.DistillConfig)}
    hints = typing.get_type_hints(command.distill, include_extras=True)
    assert set(fields) & set(hints) >= {"teacher", "steps", "batch_size", "learning_rate", "preview_every"}
    for name in set(fields) & set(hints):
        shown = typing.get_args(hints[name])[1].show_default
        assert fields[name] is None or shown in (str(fields[name]), options.recipe(fields[name])), name


@pytest.mark.parametrize(("kept", "told"), [(None, True), (4, False), (6, True)])
def test_an_error_to_the_teacher_is_that_of_the_student_that_was_kept(kept: int | None, *, told: bool) -> None:
    best = None if kept is None else Score(kept, 5.0, 1.0)
    finished = Finished(Path("run"), Path("run/student"), 6, 1.0, "steps", best)
    result = command._summary({"Finished": finished, "Previewed": Previewed(6, Path("6.png"), 0.25)}, [])
    assert result["preview"] == Path("6.png")
    assert result.get("paired_error") == (0.25 if told else None)


def test_metrics_are_those_of_the_pipeline() -> None:
    assert tuple(COLUMNS) == METRICS
    metric = typing.get_type_hints(evaluate, include_extras=True)["metric"]
    assert typing.get_args(metric)[1].metavar == "|".join(METRICS)


def test_every_flag_is_a_setting() -> None:
    apart = {"ctx", "return", "output", "resume", "overwrite", "config", "set_", "dry_run", "as_json"}
    names = set(typing.get_type_hints(command.distill)) - apart
    assert {command.NESTED.get(name, name) for name in names} <= set(settings.known_keys())


def test_no_arguments_show_help(cli: Cli) -> None:
    done = cli()
    assert "Commands" in done.stdout + done.stderr


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"bootcli {__version__}\n"


def test_completion() -> None:
    script = Path(sys.executable).with_name("bootcli")
    asked = environment(_BOOTCLI_COMPLETE="complete_bash", COMP_WORDS="bootcli e", COMP_CWORD="1")
    done = subprocess.run([script], env=asked, capture_output=True, text=True)
    assert done.stdout.split() == ["evaluate", "export", "env"]


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_imports_nothing_heavy(heavy: Callable[..., tuple[int, str, list[str]]], name: str) -> None:
    code, _, imported = heavy(*([name] if name else []), "--help")
    assert code == 0
    assert imported in ([], ["pydantic"])  # which Typer itself may use to read the root's options


@pytest.mark.parametrize("words", [["--help"], ["distill", "--help"]], ids=" ".join)
def test_help_is_as_quick_as_typer(tmp_path: Path, words: list[str]) -> None:
    """At most 1.3 times a Typer app with the same commands and options that does nothing; the best of several turns."""
    idle, ours = tmp_path / "idle.py", tmp_path / "ours.py"
    idle.write_text(source(app))
    ours.write_text("from bootcli.cli import main\nmain()\n")

    def seconds(script: Path) -> float:
        before = processor_seconds()
        subprocess.run([sys.executable, script, *words], env=environment(), stdout=subprocess.DEVNULL, check=True)
        return processor_seconds() - before

    best = {idle: float("inf"), ours: float("inf")}
    for turn in range(30):
        for script, before in best.items():
            best[script] = min(before, seconds(script))
        if turn >= 3 and best[ours] <= 1.3 * best[idle]:
            return
    pytest.fail(f"help takes {best[ours]:.3f} s, the app that does nothing {best[idle]:.3f} s")
