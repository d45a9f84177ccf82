"""`bootcli export`: a student for other programs, proven to be the same student."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from bootcli import __version__
from bootcli.errors import BootError, UsageError
from bootcli.exporters import Format, formats_of, largest_difference
from bootcli.pipelines.requests import condition_of
from bootcli.prompts import read_prompts
from bootcli.store.artifact import Artifact, load_student
from bootcli.store.files import atomic_folder, check_free, write_json
from bootcli.store.rundir import RunDir

TOLERANCE = 1e-4
"""Largest difference to bootcli's own sampler, before decoding, clamping and rounding."""
FACTS = "bootcli.json"
"""In every export: where it comes from, and the sign that bootcli may replace the folder."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        output: the folder.
        format: its name.
        max_abs_difference: to bootcli's own sampler; see `bootcli.exporters.largest_difference`.
        files: all of them.
        check: how it was compared.
    """

    output: Path
    format: str
    max_abs_difference: float
    files: tuple[Path, ...]
    check: str


def export(run: Path, *, format: str | None = None, output: Path | None = None, overwrite: bool = False) -> Exported:
    """Write a student, run what was written and compare; the folder appears only if both are the same.

    Everything is computed on the CPU in float32.

    Args:
        run: a run folder, its student folder or a student file.
        format: one of `bootcli.exporters.formats_of`; None is the first of them.
        output: the folder; None is ``RUN/export/<format>``, for a student file outside a run ``export/`` beside it.
        overwrite: replace an earlier export there.

    Raises `UsageError` for an unknown format or a folder in use, `BootError` for a broken student, and for an export
    that does not run or differs by more than `TOLERANCE`.
    """
    artifact = load_student(run)
    format = format or next(iter(formats_of(artifact)))
    chosen = _pick(artifact, format)
    folder = output or RunDir(artifact.home).exports / format
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):  # the folder is replaced as a whole
        raise UsageError(f"{folder} is the working folder or above it.", "Name a new folder with --output.")
    check_free(folder, overwrite=overwrite, mark=FACTS)
    teacher = artifact.student.teacher
    words = read_prompts(None) if teacher.spec.conditioning == "text" else None  # any will do; the run's may be gone
    cond = condition_of(teacher, artifact.config, prompts=words)(range(2))
    if limits := artifact.student.guidance_range:
        if not chosen.takes_guidance:
            raise UsageError(
                f"The {format} format has no place for the guidance scale that this student takes.",
                "Distil one with w built in, with --guidance-scale 3 for example.",
            )
        cond = dataclasses.replace(cond, guidance=torch.tensor(limits))  # both ends are compared
    with atomic_folder(folder) as temporary:
        chosen.write(artifact, temporary)
        difference = largest_difference(artifact.student, cond, lambda inputs: chosen.run(temporary, inputs))
        if not difference <= TOLERANCE:  # a NaN is no success
            raise BootError(
                f"The {format} export gives images that differ by {difference:.2g}, more than {TOLERANCE:g}.",
                "Nothing was written. This is a fault of the format's writer: please report it.",
            )
        write_json(temporary / FACTS, _facts(artifact, format, difference))
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return Exported(folder, format, difference, files, chosen.check)


def _pick(artifact: Artifact, name: str) -> Format:
    formats = formats_of(artifact)
    if name not in formats and name in artifact.student.teacher.lora_formats():
        raise UsageError(
            f"The format {name!r} is of a LoRA, and this student was trained as a whole network.",
            f"Distil with --lora-rank for that; this one has: {', '.join(sorted(formats))}",
        )
    if name not in formats:
        raise UsageError(f"Unknown export format {name!r}.", f"This student has: {', '.join(sorted(formats))}")
    return formats[name]


def _facts(artifact: Artifact, format: str, difference: float) -> dict[str, object]:
    return {
        "bootcli": __version__,
        "format": format,
        "family": artifact.family,
        "objective": artifact.config.objective,
        "training_steps": artifact.step,
        "guidance_range": artifact.student.guidance_range,
        "nfe": 1,
        "max_abs_difference": difference,
    }
