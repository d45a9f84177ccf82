"""The command line: options in, configuration to the pipelines, results to `bootcli.ui`.

Heavy imports are inside functions, so that help and usage errors cost no torch.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from bootcli import __version__
from bootcli.cli import distill, env, evaluate, export, sample, teachers
from bootcli.cli.common import DEBUG, fail
from bootcli.cli.options import examples

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=examples("bootcli distill", "bootcli sample -n 16"),
)
app.command(epilog=distill.EXAMPLES)(distill.distill)
app.command(epilog=sample.EXAMPLES)(sample.sample)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=teachers.EXAMPLES)(teachers.teachers)
app.command(epilog=env.EXAMPLES)(env.env)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bootcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar=DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    """Distil a diffusion teacher into a one-step student, without a single training image."""
    os.environ[DEBUG] = "1" if debug else "0"  # also for the processes that a command starts


def main() -> None:
    """Run the command line; every way out has its exit code."""
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    _open_streams()
    try:
        app()
    except BrokenPipeError:
        _hush()
    except KeyboardInterrupt:  # before a command begins; Typer takes later ones
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        fail(error)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _hush()
        except OSError as error:  # a full disk: said before, where a command ends with that
            _hush()
            if getattr(error.__context__, "code", None) in (None, 0):
                fail(error)


def _open_streams() -> None:
    """Streams that are closed (``>&-``) lead nowhere; what one cannot encode is written as an escape."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # in this order they get the numbers 0, 1 and 2, which no other file may have
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  # open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _hush() -> None:
    """Our output leads nowhere any more, as in ``bootcli teachers | head``: no more of it, no complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
