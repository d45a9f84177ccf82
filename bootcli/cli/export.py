"""`bootcli export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bootcli.cli.common import find_run, print_json
from bootcli.cli.options import JsonOption, OverwriteOption, RunArgument, at_home, examples

EXAMPLES = examples("bootcli export", "bootcli export runs/mine --format diffusers --output my-student")

FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Format; each teacher family has its own, see: bootcli teachers NAME",
        show_default="diffusers, or what else the family has; safetensors of those with none",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder to write.", show_default="RUN/export/<format>", callback=at_home),
]


def export(
    run: RunArgument = None,
    format_: FormatOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the student for other programs, and check what was written.

    It is loaded back in a fresh process and compared with bootcli's own sampler.
    """
    run = find_run(run)
    from bootcli.store.files import check_free

    if folder := output or (format_ and run / "export" / format_):
        check_free(folder, overwrite=overwrite)
    from bootcli import ui
    from bootcli.pipelines.export import export as write

    exported = write(run, format=format_, output=output, overwrite=overwrite)
    if as_json:
        print_json(exported)
    else:
        ui.print_facts(
            {
                "exported": exported.output,
                "format": f"{exported.format}, {len(exported.files)} files",
                "checked": exported.check,
                "difference": f"{exported.max_abs_difference:.2g} at most, to bootcli's own sampler",
            }
        )
