"""The student artifact: one safetensors file that carries its weights, architecture and provenance.

Sampling needs no weights of the teacher's network: its family rebuilds the student's from the header. A text teacher's
other parts (text encoder, autoencoder) stay where they were. A LoRA alone needs them: it is folded into the network of
the run's teacher, which has to be the same as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import cast, get_args

import torch
from torch import Tensor

from bootcli import __version__
from bootcli.config import DistillConfig, from_other_version, to_dict
from bootcli.errors import BootError, UsageError
from bootcli.lora import Lora, fingerprint
from bootcli.prompts import STDIN
from bootcli.store.rundir import RunDir
from bootcli.store.tensors import read_tensors, write_tensors
from bootcli.student import Student
from bootcli.teachers.protocol import Head, LoraWeights, Teacher
from bootcli.teachers.registry import family_named, load

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
        lora: what of it was learned, where that is a LoRA; ``student`` is a stock network with this folded in.
    """

    student: Student
    config: DistillConfig
    family: str
    step: int
    path: Path
    lora: LoraWeights | None = None

    @property
    def run(self) -> RunDir | None:
        """The run that it is a student of; None for a file that lies elsewhere."""
        path = self.path if len(self.path.parts) > 1 else self.path.absolute()  # inside the folder of the file
        run = RunDir(path.parent.parent)
        return run if path in (run.student, run.best) else None

    @property
    def home(self) -> Path:
        """Where things made from it go: its run folder, or the folder of a file that lies outside a run."""
        return self.path.parent if self.run is None else self.run.path

    @property
    def samples(self) -> Path:
        """Where its images go, apart from those of other students with the same home."""
        folder = RunDir(self.home).samples
        return folder if self.path.name == RunDir(self.home).student.name else folder / self.path.stem


def save_student(
    path: Path, student: Student, weights: Mapping[str, Tensor], family: str, config: DistillConfig, step: int
) -> None:
    """Write the artifact: of a LoRA, only what was learned, and what tells its base.

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
    if (lora := student.lora) is not None:
        header["lora"] = {"rank": lora.rank, "alpha": lora.rank, "targets": lora.targets, "base": lora.base}
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
        raise BootError(f"{run} does not exist.", "Name a run folder.")
    if RunDir(run).is_locked():
        best = RunDir(run).best
        hint = f"Its best student so far is {best}." if best.is_file() else "Wait for it."
        raise BootError(f"{run} holds no student yet: it is being trained.", hint)
    hint = f"The run has not finished; go on with: bootcli distill --resume --output {quote(str(run))}"
    raise BootError(f"{run} holds no student.", hint if RunDir(run).config_file.exists() else "Name a run folder.")


def load_student(run: Path) -> Artifact:
    """Load a student for sampling. Raises `BootError` for a missing, damaged or foreign file."""
    path = find_artifact(run)
    tensors, header = read_tensors(path)
    if "balance" in header:
        raise BootError(f"{path} is a training state, not a student.", "Name its run folder.")
    if "format" not in header:
        raise BootError(f"{path} is no student: an export, or something else.", "Name a run folder.")
    if header["format"] != FORMAT:
        raise BootError(f"{path} has format {header['format']}; this version reads {FORMAT}.", "Update bootcli.")
    try:
        family = str(header["family"])
        config = from_other_version(cast(Mapping[str, object], header["config"]))
        lora, teacher, adapter = None, None, None
        if "lora" in header:
            lora = _read_lora(header["lora"])
            teacher = _base(lora, config)
            adapter = Lora(teacher, "student", lora.rank, lora.base, lora.targets)
        student = build_student(header, teacher, adapter)
        own = {name: tensor.dtype for name, tensor in student.state_dict().items()}
        for name in own.keys() & tensors.keys():  # a copy: what was read is the mapped file, which may be replaced
            tensors[name] = tensors[name].to(own[name], copy=True)
        student.load_state_dict(tensors, assign=adapter is None)  # a LoRA's are also in the layers
        if adapter is not None:
            lora = adapter.exported({name: t.clone() for name, t in adapter.state_dict().items()})
            student.merge()
        step = int(cast(int, header["step"]))
    except UsageError as error:  # the file is at fault, not the command line
        raise BootError(f"{path}: {error.message}", error.hint) from error
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BootError(f"{path} does not describe a student: {error}.", "Make it again.") from error
    student = student.eval().requires_grad_(False).to(torch.device("cpu"))
    artifact = Artifact(student, config, family, step, path, lora)
    kept = RunDir(artifact.home).prompts
    if config.prompts != STDIN and not (artifact.run and kept.is_file()):  # standard input is not read again
        return artifact
    return dataclasses.replace(artifact, config=dataclasses.replace(config, prompts=str(kept)))


def build_student(header: Mapping[str, object], teacher: Teacher | None = None, lora: Lora | None = None) -> Student:
    """The student that a file's header describes; the weights of its network are to be assigned.

    Args:
        header: of the file.
        teacher: that the student is a LoRA on; None: one of the family without weights.
        lora: in that teacher.

    Raises `UsageError` for an unknown family, and other errors for a header that is no such thing.
    """
    if teacher is None:
        teacher = family_named(str(header["family"])).build_empty(cast(Mapping[str, object], header["teacher"]))
    if header["head"] not in get_args(Head):
        raise ValueError(f"unknown head {header['head']!r}")
    limits = header.get("guidance_range")
    if limits is not None:
        low, high = cast(list[float], limits)
        limits = float(low), float(high)
    student = Student(teacher, cast(Head, header["head"]), float(cast(float, header["t_min"])), lora, limits)
    if lora is None:
        teacher.net = student.net  # which is to have the weights
    return student


def _read_lora(stored: object) -> LoraWeights:
    """Rank, targets and base of a LoRA, without its tensors. Raises as Python does where it is none."""
    lora = dict(cast(Mapping[str, object], stored))
    if lora["alpha"] != lora["rank"]:
        raise ValueError(f"a LoRA of alpha {lora['alpha']!r}")
    targets = tuple(str(name) for name in cast(Sequence[object], lora["targets"]))
    return LoraWeights({}, int(cast(int, lora["rank"])), targets, str(lora["base"]))


def _base(lora: LoraWeights, config: DistillConfig) -> Teacher:
    """The teacher that a LoRA was trained on. Raises `BootError` where it is gone, or another."""
    try:
        teacher = load(config.teacher).teacher
    except BootError as error:
        raise BootError(
            f"This student is a LoRA on the teacher {config.teacher}, which cannot be loaded: {error.message}",
            error.hint or "Put it back.",
        ) from error
    if fingerprint(teacher.net) != lora.base:
        raise BootError(
            f"This student is a LoRA on other weights than those of {config.teacher}.",
            "Put back the teacher that it was trained on.",
        )
    teacher.net.requires_grad_(False)
    teacher.use_clock(config.clock)
    if config.resolution is not None:
        teacher.use_resolution(*config.resolution)
    return teacher
