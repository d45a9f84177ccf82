"""`bootcli sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bootcli.cli.common import find_run, pixels, print_json
from bootcli.cli.options import (
    BatchSizeOption,
    DeviceOption,
    GuidanceOption,
    JsonOption,
    PromptsOption,
    ResolutionOption,
    RunArgument,
    SeedOption,
    at_home,
    examples,
)
from bootcli.errors import UsageError

if TYPE_CHECKING:
    from bootcli.prompts import Prompts

EXAMPLES = examples("bootcli sample -n 64", "bootcli sample runs/mine --teacher-steps 50 --output teacher50")

CountOption = Annotated[
    int | None,
    typer.Option(
        "--num-images", "-n", metavar="N", min=1, help="How many images.", show_default="16, or one for each prompt"
    ),
]
ClassOption = Annotated[
    int | None, typer.Option("--class", metavar="K", min=0, help="Class of every image.", show_default="all in turn")
]
PromptOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="What to draw; several take turns.", show_default="the run's prompts in turn"),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the images go.", show_default="RUN/samples", callback=at_home),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Write into an --output that is not empty, over images of the same seeds.")
]
NfeOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Network calls for each image; above 1 for a student trained to refine.")
]
TeacherStepsOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Draw with the teacher in N steps instead, to compare.")
]


def sample(
    run: RunArgument = None,
    num_images: CountOption = None,
    class_: ClassOption = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    resolution: ResolutionOption = None,
    guidance_scale: GuidanceOption = None,
    seed: SeedOption = 0,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    nfe: NfeOption = 1,
    teacher_steps: TeacherStepsOption = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw images in one step, or a few: a PNG for each, and a grid of all."""
    size = pixels(resolution)
    run = find_run(run)
    wanted = _wanted(prompt, prompts)
    if wanted is not None and wanted.own_negatives and teacher_steps is None:
        typer.echo("Negative prompts are built into a student: those of --prompts have no effect.", err=True)
    from bootcli.store.files import check_free

    if output is not None:
        check_free(output, overwrite=overwrite)
    elif overwrite:
        raise UsageError("--overwrite needs --output: in the run's own folder a seed is always drawn anew.")
    from bootcli import ui
    from bootcli.pipelines.sample import sample as draw

    with ui.counter() as count:
        drawn = draw(
            run,
            num_images=num_images,
            seed=seed,
            output=output,
            class_label=class_,
            prompts=wanted,
            resolution=size,
            guidance_scale=guidance_scale,
            nfe=nfe,
            teacher_steps=teacher_steps,
            batch_size=batch_size,
            device=device,
            overwrite=overwrite,
            progress=lambda done, total: count("images", done, total),
        )
    if as_json:
        print_json(drawn)
    else:
        rate = len(drawn.files) / max(drawn.seconds, 1e-9)
        guidance = {} if drawn.guidance_scale is None else {"guidance": f"w = {drawn.guidance_scale:g}"}
        ui.print_facts(
            {
                "images": f"{len(drawn.files)} in {drawn.output}",
                "grid": drawn.grid,
                "drawn by": f"{drawn.source}, {drawn.nfe} network evaluation{'s' if drawn.nfe > 1 else ''} each",
                **guidance,
                "time": f"{drawn.seconds:.2f} s drawing ({rate:.0f} images/s), {drawn.write_seconds:.2f} s writing",
            }
        )


def _wanted(texts: list[str] | None, source: str | None) -> Prompts | None:
    """The prompts of the command line, or of a file."""
    from bootcli.prompts import Prompt, Prompts, check_text, read_prompts

    if texts and source is not None:
        raise UsageError("--prompt and --prompts: each says what to draw.", "Give one of them.")
    if source is not None:
        return read_prompts(source)
    for text in texts or ():
        check_text("--prompt", text)
    return Prompts(map(Prompt, texts)) if texts else None
