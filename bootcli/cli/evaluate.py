"""`bootcli evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bootcli.cli.common import find_run, integers, print_json
from bootcli.cli.options import BatchSizeOption, DeviceOption, JsonOption, RunArgument, SeedOption, examples
from bootcli.errors import BootError, UsageError

EXAMPLES = examples("bootcli evaluate", "bootcli evaluate runs/mine --num-images 1000 --teacher-steps 4,50 --json")

MetricOption = Annotated[Literal["fid"], typer.Option(help="What to measure.")]
CountOption = Annotated[int, typer.Option("--num-images", "-n", metavar="N", min=2, help="Images for each number.")]
RepeatsOption = Annotated[int, typer.Option(metavar="K", min=1, help="Repetitions, each with seeds of its own.")]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Images or statistics to compare with; inception-clean:PATH for FID as papers give it.",
        show_default="the teacher's own statistics",
    ),
]
SaveReferenceOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep the reference's statistics (.safetensors) as a later --reference."),
]
TeacherStepsOption = Annotated[
    str, typer.Option(metavar="4,10,50", help="Steps of the teacher beside the student; '' for none.")
]
MaxOption = Annotated[float | None, typer.Option(metavar="X", help="Fail (exit 1) if the student's FID is above X.")]


def evaluate(
    run: RunArgument = None,
    metric: MetricOption = "fid",
    num_images: CountOption = 5000,
    seed: SeedOption = 0,
    repeats: RepeatsOption = 1,
    reference: ReferenceOption = None,
    save_reference: SaveReferenceOption = None,
    teacher_steps: TeacherStepsOption = "4,10,50",
    max_fid: MaxOption = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure the one-step student beside its teacher at several step counts, with the same seeds and reference."""
    steps = integers(teacher_steps or None, "--teacher-steps") or ()
    if any(count < 1 for count in steps):
        raise UsageError(f"--teacher-steps {teacher_steps}: a sampler takes at least 1 step.")
    run = find_run(run)
    from bootcli import ui
    from bootcli.pipelines.evaluate import evaluate as measure

    with ui.counter() as count:
        result = measure(
            run,
            metric=metric,
            num_images=num_images,
            seed=seed,
            repeats=repeats,
            reference=reference,
            teacher_steps=steps,
            batch_size=batch_size,
            device=device,
            save_reference=save_reference,
            progress=count,
        )
    print_json(result) if as_json else _print_table(result)
    _gate(result, max_fid)


def _print_table(result: Mapping[str, Any]) -> None:
    from bootcli import ui

    reference = result["reference"]
    rows: list[tuple[str, Mapping[str, Any]]] = [("student", result["student"])]
    rows += [(f"teacher, {row['steps']} steps", row) for row in result["teacher"]]
    if floor := reference.get("floor"):
        rows.append((f"{floor['num_images']:,} real images, held out", {"nfe": "", "fid": floor["fid"]}))
    ui.print_table(
        ("images of", "network calls", f"FID in {result['feature_space']}"),
        [(name, str(row["nfe"]), _number(row)) for name, row in rows],
    )
    ui.print_facts(
        {
            "reference": f"{reference['source']}, {reference['num_images']} images",
            "sampler": ", ".join(f"{name} {value}" for name, value in result["sampler"].items()),
            "images": f"{result['num_images']} for each number, {result['repeats']} times, seeds from {result['seed']}",
            "notes": "\n".join(result["notes"]),
        }
    )


def _number(row: Mapping[str, Any]) -> str:
    spread = f" ± {row['fid_std']:.2f}" if row.get("fid_std") is not None else ""
    return f"{row['fid']:.2f}{spread}"


def _gate(result: Mapping[str, Any], limit: float | None) -> None:
    fid = result["student"]["fid"]
    if limit is not None and not fid <= limit:  # also where it is NaN
        raise BootError(f"The student's FID {fid:.4g} is above --max-fid {limit:g}.")
