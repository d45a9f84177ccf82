"""`bootcli distill`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bootcli.cli.common import find_run, integers, limits, pixels, print_json, to_toml
from bootcli.cli.options import Device, JsonOption, MixedPrecision, at_home, examples, recipe
from bootcli.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from bootcli.pipelines.estimate import Estimate

Layers = tuple[dict[str, object], dict[str, object], dict[str, object]]
"""Flags, --set, config file."""

EXAMPLES = examples(
    "bootcli distill",
    "bootcli distill --teacher google/ddpm-cifar10-32 --device cuda",
)
NESTED = {"lora_rank": "student.lora_rank"}
"""The settings of flags that have another name."""
TEACHER, TRAINING, RUN, SETTINGS = "Teacher", "Training", "Run", "Settings"

TeacherOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|PATH|HUB_ID",
        help="What to distil; see: bootcli teachers",
        show_default="fashion",
        rich_help_panel=TEACHER,
    ),
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Prompts for a text teacher: a text file, .jsonl, a pattern, or - for standard input.",
        show_default=recipe("200 that come with bootcli"),
        rich_help_panel=TEACHER,
    ),
]
NegativePromptOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What guidance leads away from.", rich_help_panel=TEACHER)
]
ClassesOption = Annotated[
    str | None,
    typer.Option(metavar="1,3,5", help="Classes to distil.", show_default="all", rich_help_panel=TEACHER),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        metavar="W",
        help="Guidance built into the student; 1 is none.",
        show_default=recipe(1.0),
        rich_help_panel=TEACHER,
    ),
]
GuidanceRangeOption = Annotated[
    str | None,
    typer.Option(
        metavar="2,8",
        help="Least and greatest guidance, of a student that takes it at sampling.",
        rich_help_panel=TEACHER,
    ),
]
ResolutionOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|WxH",
        help="Pixels of an image, where the teacher draws several sizes.",
        show_default="the teacher's own",
        rich_help_panel=TEACHER,
    ),
]
ObjectiveOption = Annotated[
    Literal["boot", "freeflow", "kd"] | None,
    typer.Option(help="What to train on.", show_default=recipe("kd"), rich_help_panel=TRAINING),
]
CorrectorOption = Annotated[
    bool | None,
    typer.Option(
        "--corrector/--no-corrector",
        help="Also move samples to where the teacher finds them likely.",
        show_default=recipe("with freeflow only"),
        rich_help_panel=TRAINING,
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Updates.", show_default=recipe(20_000), rich_help_panel=TRAINING),
]
MaxMinutesOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Minutes of training, if the steps take longer.", rich_help_panel=TRAINING),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Samples in an update.",
        show_default=recipe(64),
        rich_help_panel=TRAINING,
    ),
]
LearningRateOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Peak learning rate.",
        show_default=recipe("0.0005, with --lora-rank 0.002"),
        rich_help_panel=TRAINING,
    ),
]
LoraRankOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Train a LoRA of this rank in the teacher; 0: the whole network.",
        show_default=recipe(0),
        rich_help_panel=TRAINING,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Seed.", show_default="0", rich_help_panel=TRAINING),
]
InitFromOption = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Start from the student of an earlier run.", rich_help_panel=TRAINING),
]
DeviceOption = Annotated[
    Device | None,
    typer.Option(help="Where to compute.", show_default="auto", rich_help_panel=TRAINING),
]
PrecisionOption = Annotated[
    MixedPrecision | None,
    typer.Option(help="Number format.", show_default="bf16 where the hardware has it", rich_help_panel=TRAINING),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Run folder.",
        show_default="runs/<teacher>-<time>",
        callback=at_home,
        rich_help_panel=RUN,
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the run in --output, or with the newest.", rich_help_panel=RUN),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier run in --output.", rich_help_panel=RUN)
]
PreviewOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Steps between pictures; 0: at the end only.",
        show_default=recipe(1000),
        rich_help_panel=RUN,
    ),
]
CheckpointOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Steps between saved states; 0: at the end only.",
        show_default=recipe(1000),
        rich_help_panel=RUN,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="File of settings.", callback=at_home, rich_help_panel=SETTINGS),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any setting, as kd.teacher_steps=8; repeatable.", rich_help_panel=SETTINGS
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the settings as a config file, with time and memory measured on one step.",
        rich_help_panel=SETTINGS,
    ),
]


def distill(
    ctx: typer.Context,
    teacher: TeacherOption = None,
    prompts: PromptsOption = None,
    classes: ClassesOption = None,
    guidance_scale: GuidanceOption = None,
    guidance_range: GuidanceRangeOption = None,
    negative_prompt: NegativePromptOption = None,
    resolution: ResolutionOption = None,
    objective: ObjectiveOption = None,
    corrector: CorrectorOption = None,
    steps: StepsOption = None,
    max_minutes: MaxMinutesOption = None,
    batch_size: BatchSizeOption = None,
    learning_rate: LearningRateOption = None,
    lora_rank: LoraRankOption = None,
    seed: SeedOption = None,
    init_from: InitFromOption = None,
    device: DeviceOption = None,
    mixed_precision: PrecisionOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    preview_every: PreviewOption = None,
    checkpoint_every: CheckpointOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a one-step student from a teacher alone, with no images.

    A setting comes from its flag, else --set, else the config file,
    else the teacher's recipe, else bootcli's default.
    """
    from bootcli.config import resolve
    from bootcli.prompts import check_text
    from bootcli.store.rundir import RunDir, default_run
    from bootcli.teachers import registry

    layers = _layers(ctx.params, config, set_)
    settings = resolve(*layers)  # finds what is wrong before anything heavy is imported
    check_text("--negative-prompt", settings.negative_prompt or "")
    if resume:
        if overwrite or dry_run:
            raise UsageError("--resume goes with neither --overwrite nor --dry-run.")
        run = find_run(output, with_student=False)
    else:
        if overwrite and output is None:
            raise UsageError("--overwrite needs --output: by default each run has a folder of its own.")
        registry.resolve(settings.teacher)
        if output is not None:
            RunDir(output).check_free(overwrite=overwrite)
        if dry_run:
            return _estimate(layers, as_json=as_json)
        run = output or default_run(settings.teacher)
    try:
        return _train(layers, run, resume=resume, overwrite=overwrite, as_json=as_json)
    finally:
        if output is None:
            with suppress(OSError):  # what stayed empty goes away
                run.rmdir()
                run.parent.rmdir()


def _layers(params: Mapping[str, object], file: Path | None, overrides: list[str] | None) -> Layers:
    """Flags that were given, --set, the config file."""
    from bootcli.config import known_keys, read_file, read_overrides

    known = known_keys()
    keys = {name: NESTED.get(name, name) for name in params}
    flags = {keys[name]: value for name, value in params.items() if keys[name] in known and value is not None}
    if "classes" in flags:
        flags["classes"] = integers(str(flags["classes"]), "--classes")
    if "guidance_range" in flags:
        if "guidance_scale" in flags:
            raise UsageError("--guidance-scale is one w, --guidance-range many.", "Give one of them.")
        flags["guidance_range"] = limits(str(flags["guidance_range"]), "--guidance-range")
    if "resolution" in flags:
        flags["resolution"] = pixels(str(flags["resolution"]))
    return flags, read_overrides(overrides or ()), read_file(file) if file else {}


def _estimate(layers: Layers, *, as_json: bool) -> None:
    from bootcli.pipelines.estimate import dry_run
    from bootcli.pipelines.settings import resolve_config

    estimate = dry_run(resolve_config(*layers))
    if as_json:
        print_json(estimate)
    else:
        typer.echo(to_toml(estimate.config, comments=_costs(estimate)))
    if not estimate.ran:
        raise DoesNotFit("Memory ran out.", "What would make it smaller is listed with what it saves.")


def _costs(estimate: Estimate) -> dict[str, str]:
    """Time, and memory by its parts; what would make it smaller, where that is called for."""
    from bootcli.ui import duration, size

    time = "not measured"
    if estimate.seconds_per_step is not None and estimate.total_seconds is not None:
        time = f"{estimate.seconds_per_step:.3g} s a step, {duration(estimate.total_seconds)} in all, previews apart"
    parts = {name: bytes_ for name, bytes_ in estimate.needs.items() if bytes_ != 0}
    told = [f"{name} {'not measured' if bytes_ is None else size(bytes_)}" for name, bytes_ in parts.items()]
    on_top = ", ".join(f"{name} {size(bytes_)}" for name, bytes_ in estimate.main_memory.items())
    ran = "at its peak" if estimate.ran else "and more: it ran out"
    switches = [
        f"{each.setting} saves {each.what}" + ("" if each.saves is None else f", {size(each.saves)}")
        for each in estimate.switches
    ]
    return {
        **estimate.facts,
        "time": time,
        "memory": f"{size(estimate.memory_bytes)} {ran}, of {size(estimate.capacity_bytes)}",
        "of that": ", ".join(told),
        **({"on the CPU": f"{on_top} at most, on top"} if on_top else {}),
        **{f"switch {number}": text for number, text in enumerate(switches, 1)},
    }


def _train(layers: Layers, run: Path, *, resume: bool, overwrite: bool, as_json: bool) -> None:
    from bootcli import ui
    from bootcli.pipelines.settings import resolve_config, resume_config

    config = resume_config(run, *layers) if resume else resolve_config(*layers)
    from bootcli.pipelines.distill import distill  # torch, once the settings are known to be good
    from bootcli.pipelines.events import Warned

    last: dict[str, Any] = {}
    warnings: list[str] = []
    with ui.training() as show:
        for event in distill(config, run, resume=resume, overwrite=overwrite):
            show(event)
            last[type(event).__name__] = event
            if isinstance(event, Warned):
                warnings.append(f"step {event.step}: {event.message}")
    if not last:  # one of several processes, and not the one that speaks
        return
    summary = _summary(last, warnings)
    if as_json:
        print_json(summary)
    else:
        name = quote(str(run))
        summary["time"] = ui.duration(last["Finished"].seconds)
        ui.print_facts({label.replace("_", " "): value for label, value in summary.items() if label != "seconds"})
        ui.print_next(f"bootcli sample {name}", f"bootcli evaluate {name}")


def _summary(last: Mapping[str, Any], warnings: list[str]) -> dict[str, object]:
    """The result of a run, from its last event of each kind and the warnings on its way."""
    finished = last["Finished"]
    result: dict[str, object] = {
        "run": finished.run,
        "student": finished.student,
        "steps": finished.steps,
        "ended_by": finished.ended_by,
        "seconds": finished.seconds,
    }
    if finished.best is not None:
        result |= {"student_of_step": finished.best.step, "watched_fid": finished.best.fid}
    if warnings:
        result["warnings"] = warnings
    if "Previewed" in last:
        shown = last["Previewed"]
        result["preview"] = shown.path
        if finished.best is None or finished.best.step == shown.step:  # else of a later student than the one kept
            result["paired_error"] = shown.paired_error
    if "Stepped" in last:  # not where a finished run is resumed
        result |= {"loss": last["Stepped"].report.loss, "residual": last["Stepped"].report.residual}
    return result
