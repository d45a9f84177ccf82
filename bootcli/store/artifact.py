"""The student artifact: one safetensors file that carries its weights, architecture and provenance.

Sampling needs no weights of the teacher's network: its family rebuilds the student's from the header. A text teacher's
other parts (text encoder, autoencoder) stay where they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from bootcli import __version__
from bootcli.config import DistillConfig, from_other_version, to_dict
from bootcli.errors import BootError, UsageError
from bootcli.store.rundir import RunDir
from bootcli.store.tensors import read_tensors, write_tensors
from bootcli.student import Student
from bootcli.teachers.protocol import Head
from bootcli.teachers.registry import family_named

FORMAT = 1


@dataclass(frozen=True)
class Artifact:
    """A loaded student and where it comes from.

    Args:
        student: EMA weights, eval mode, on the CPU.
        config: of the run that made it.
        family: name of the teacher's family.
        step: updates it was trained for.
        path: the file.
    """

    student: Student
    config: DistillConfig
    family: str
    step: int
    path: Path

    @property
    def home(self) -> Path:
        """Where things made from it go: its run folder, or the folder of a file that lies outside a run."""
        run = self.path.parent.parent
        return run if RunDir(run).student == self.path else self.path.parent


def save_student(
    path: Path, student: Student, weights: Mapping[str, Tensor], family: str, config: DistillConfig, step: int
) -> None:
    """Write the artifact.

    Args:
        path: the file.
        student: its architecture.
        weights: the averaged parameters, by name.
        family: name of the teacher's family.
        config: of the run.
        step: updates done.
    """
    header = {
        "format": FORMAT,
        "bootcli": __version__,
        "family": family,
        "teacher": student.teacher.config(),
        "head": student.head,
        "t_min": student.t_min,
        "guidance_range": student.guidance_range,
        "config": to_dict(config),
        "step": step,
    }
    buffers = {name: tensor for name, tensor in student.state_dict().items() if name not in weights}
    write_tensors(path, {**weights, **buffers}, header)


def find_artifact(run: Path) -> Path:
    """The artifact a user means by a run folder, a student folder or the file itself. Raises `BootError`."""
    if run.is_file():
        return run
    for path in (RunDir(run).student, run / RunDir(run).student.name):
        if path.is_file():
            return path
    if not run.exists():
        raise BootError(f"{run} does not exist.", "Name a run folder, or leave it out for the newest one.")
    hint = "The run has not finished; go on with: bootcli distill --resume --output " + str(run)
    raise BootError(f"{run} holds no student.", hint if RunDir(run).config_file.exists() else "Name a run folder.")


def load_student(run: Path) -> Artifact:
    """Load a student for sampling. Raises `BootError` for a missing, damaged or foreign file."""
    path = find_artifact(run)
    tensors, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise BootError(f"{path} has format {header.get('format')}; this version reads {FORMAT}.", "Update bootcli.")
    try:
        student = build_student(header)
        student.load_state_dict(tensors)
        config = from_other_version(cast(Mapping[str, object], header["config"]))
        step = int(cast(int, header["step"]))
    except UsageError as error:  # the file is at fault, not the command line
        raise BootError(f"{path}: {error.message}", error.hint) from error
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BootError(f"{path} does not describe a student: {error}.", "Make it again.") from error
    student = student.eval().requires_grad_(False).to(torch.device("cpu"))
    artifact = Artifact(student, config, str(header["family"]), step, path)
    kept = RunDir(artifact.home).prompts
    if not kept.is_file():
        return artifact
    return dataclasses.replace(artifact, config=dataclasses.replace(config, prompts=str(kept)))


def build_student(header: Mapping[str, object]) -> Student:
    """The student that a file's header describes, with untrained weights. Raises `UsageError` for an unknown family,
    and other errors for a header that is no such thing."""
    teacher = family_named(str(header["family"])).build(cast(Mapping[str, object], header["teacher"]))
    if header["head"] not in get_args(Head):
        raise ValueError(f"unknown head {header['head']!r}")
    limits = header.get("guidance_range")
    if limits is not None:
        low, high = cast(list[float], limits)
        limits = float(low), float(high)
    return Student(teacher, cast(Head, header["head"]), float(cast(float, header["t_min"])), limits)
