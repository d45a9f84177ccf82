"""`bootcli evaluate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bootcli.cli.common import find_run, integers, pixels, print_json
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
from bootcli.errors import BootError, UsageError

EXAMPLES = examples("bootcli evaluate", "bootcli evaluate runs/mine --metric fid --metric pr -n 10000 --json")

MetricOption = Annotated[
    list[str] | None,  # Typer takes no list of literals
    typer.Option(
        metavar="fid|pr|accuracy|paired",
        help="Frechet distance, precision and recall, share of the class asked for, or error to the teacher's own "
        "pictures; may be repeated.",
        show_default="fid",
    ),
]
CountOption = Annotated[int, typer.Option("--num-images", "-n", metavar="N", min=2, help="Images for each number.")]
RepeatsOption = Annotated[int, typer.Option(metavar="K", min=1, help="Repetitions, each with seeds of its own.")]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Images or statistics to compare with, or the word teacher for images that it draws in 50 steps; "
        "inception-clean:PATH for FID as papers give it.",
        show_default="the teacher's own statistics",
    ),
]
SaveReferenceOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Keep statistics and features (.safetensors) as a later --reference.", callback=at_home
    ),
]
TEACHER_STEPS = "4,10,50"
TeacherStepsOption = Annotated[
    str | None,
    typer.Option(
        metavar=TEACHER_STEPS,
        help="Steps of the teacher beside the student; '' for none.",
        show_default=TEACHER_STEPS,
    ),
]
NfeOption = Annotated[
    str, typer.Option(metavar="1,2,4", help="Network calls of the student, if it was trained to refine.")
]
MaxOption = Annotated[float | None, typer.Option(metavar="X", help="Fail (exit 1) if the student's FID is above X.")]

COLUMNS = {
    "fid": [("fid", "FID in {space}", 2)],
    "pr": [("precision", "precision", 3), ("recall", "recall", 3)],
    "accuracy": [("accuracy", "of the class asked for", 3)],
    "paired": [("paired_mse", "squared error to the teacher", 4)],
}
"""For each metric the numbers of a row: key, title, decimals."""


def evaluate(
    run: RunArgument = None,
    metric: MetricOption = None,
    num_images: CountOption = 5000,
    seed: SeedOption = 0,
    repeats: RepeatsOption = 1,
    reference: ReferenceOption = None,
    save_reference: SaveReferenceOption = None,
    prompts: PromptsOption = None,
    resolution: ResolutionOption = None,
    guidance_scale: GuidanceOption = None,
    nfe: NfeOption = "1",
    teacher_steps: TeacherStepsOption = None,
    max_fid: MaxOption = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure the one-step student beside its teacher at several step counts, with the same seeds and reference."""
    steps = integers((TEACHER_STEPS if teacher_steps is None else teacher_steps) or None, "--teacher-steps") or ()
    if any(count < 1 for count in steps):
        raise UsageError(f"--teacher-steps {teacher_steps}: a sampler takes at least 1 step.")
    calls = integers(nfe, "--nfe") or ()
    if any(count < 1 for count in calls):
        raise UsageError(f"--nfe {nfe}: a student is called at least once.")
    metrics = tuple(metric or ("fid",))
    if unknown := [name for name in metrics if name not in COLUMNS]:
        raise UsageError(f"--metric {unknown[0]}: there is no such metric.", f"There are: {', '.join(COLUMNS)}")
    if max_fid is not None and math.isnan(max_fid):
        raise UsageError("--max-fid nan: expected a number.")
    if max_fid is not None and "fid" not in metrics:
        raise UsageError("--max-fid needs the FID.", "Add --metric fid.")
    if teacher_steps and set(metrics) == {"paired"}:
        raise UsageError(
            "--teacher-steps: --metric paired alone takes no numbers of the teacher.",
            "Leave it out, or add --metric fid.",
        )
    if any(count > 1 for count in calls) and set(metrics) == {"paired"}:
        raise UsageError("--nfe: --metric paired is of one call alone.", "Leave it out, or add --metric fid.")
    size = pixels(resolution)
    run = find_run(run)
    from bootcli import ui
    from bootcli.pipelines.evaluate import evaluate as measure

    with ui.counter() as count:
        result = measure(
            run,
            metrics=metrics,
            num_images=num_images,
            seed=seed,
            repeats=repeats,
            reference=reference,
            prompts=prompts,
            resolution=size,
            guidance_scale=guidance_scale,
            nfe=calls,
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

    reference = result["reference"] or {}
    columns = [column for metric in result["metrics"] for column in COLUMNS[metric]]
    rows: list[tuple[str, Mapping[str, Any]]] = [("student", result["student"])]
    rows += [(f"student, {row['nfe']} calls", row) for row in result["student_in_more_calls"]]
    rows += [(f"teacher, {row['steps']} steps", row) for row in result["teacher"]]
    if (floor := reference.get("floor")) and "fid" in result["metrics"]:
        rows.append((f"{floor['num_images']:,} real images, held out", {"nfe": "", "fid": floor["fid"]}))
    ui.print_table(
        ("images of", "network calls", *(title.format(space=result["feature_space"]) for _, title, _ in columns)),
        [(label, str(row["nfe"]), *(_number(row, name, digits) for name, _, digits in columns)) for label, row in rows],
    )
    ui.print_facts(_facts(result))


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    described = {}
    if reference := result["reference"]:
        described["reference"] = f"{reference['source']}, {reference['num_images']} images"
        described["features"] = result["feature_space"]
    return {
        **described,
        "sampler": ", ".join(f"{name} {value}" for name, value in result["sampler"].items()),
        "images": f"{result['num_images']} for each number, {result['repeats']} times, seeds from {result['seed']}",
        "notes": "\n".join(result["notes"]),
    }


def _number(row: Mapping[str, Any], name: str, digits: int) -> str:
    if name not in row:
        return ""
    spread = f" ± {row[f'{name}_std']:.{digits}f}" if row.get(f"{name}_std") is not None else ""
    return f"{row[name]:.{digits}f}{spread}"


def _gate(result: Mapping[str, Any], limit: float | None) -> None:
    if limit is not None and not (fid := result["student"]["fid"]) <= limit:  # also where it is NaN
        raise BootError(f"The student's FID {fid:.4g} is above --max-fid {limit:g}.")
