"""Options that several commands share, and the wording they have in common.

Choices and defaults of `bootcli.config` are repeated here and in `bootcli.cli.distill`, and a test compares them:
importing the configuration would be the larger part of the time that help takes beside Typer.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from bootcli.paths import expanded

Device = Literal["auto", "cpu", "cuda", "mps"]
MixedPrecision = Literal["no", "bf16", "fp16"]


def examples(*commands: str) -> str:
    """The end of a command's help: blank lines keep each command on a line of its own in every markup mode."""
    return "\n\n".join(["Examples:", *(f"$ {command}" for command in commands)])


def recipe(default: object) -> str:
    """How help shows the default of a setting that a teacher's recipe may change."""
    return f"recipe or {default}"


def at_home(path: Path | None) -> Path | None:
    """A path with ``~`` replaced, which a shell does in ``--output ~/x`` and not in ``--output=~/x``."""
    return path and expanded(str(path))


RunArgument = Annotated[
    Path | None,
    typer.Argument(metavar="RUN", help="Run folder.", show_default="the newest one in runs/"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
BatchSizeOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Images at a time: changes the speed, never an image.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        metavar="W",
        help="Guidance, for a student distilled with --guidance-range.",
        show_default="the middle of the range",
    ),
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Prompts that images take in turn: a text file, .jsonl, a pattern, or - for standard input.",
        show_default="the run's own",
    ),
]
ResolutionOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|WxH", help="Pixels of an image, where the teacher draws several sizes.", show_default="the run's own"
    ),
]
SeedOption = Annotated[int, typer.Option(metavar="N", min=0, max=2**62, help="Seed of image 0; image i has seed + i.")]
