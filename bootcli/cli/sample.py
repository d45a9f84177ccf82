"""`bootcli sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bootcli.cli.common import find_run, print_json
from bootcli.cli.options import (
    BatchSizeOption,
    DeviceOption,
    GuidanceOption,
    JsonOption,
    OverwriteOption,
    RunArgument,
    SeedOption,
    examples,
)

EXAMPLES = examples("bootcli sample -n 64", "bootcli sample runs/mine --teacher-steps 50 --output teacher50")

CountOption = Annotated[int, typer.Option("--num-images", "-n", metavar="N", min=1, help="How many images.")]
ClassOption = Annotated[
    int | None, typer.Option("--class", metavar="K", min=0, help="Class of every image.", show_default="all in turn")
]
PromptOption = Annotated[str | None, typer.Option(metavar="TEXT", help="Prompt of every image.")]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where the images go.", show_default="RUN/samples")
]
NfeOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Network calls for each image; above 1 for a student trained to refine.")
]
TeacherStepsOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Draw with the teacher in N steps instead, to compare.")
]


def sample(
    run: RunArgument = None,
    num_images: CountOption = 16,
    class_: ClassOption = None,
    prompt: PromptOption = None,
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
    run = find_run(run)
    from bootcli.store.files import check_free

    if output is not None:
        check_free(output, overwrite=overwrite)
    from bootcli import ui
    from bootcli.pipelines.sample import sample as draw

    with ui.counter() as count:
        drawn = draw(
            run,
            num_images=num_images,
            seed=seed,
            output=output,
            class_label=class_,
            prompt=prompt,
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
        rate = num_images / max(drawn.seconds, 1e-9)
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
