"""Formats a student can be written in, and how what was written is run again.

A family brings the formats that other programs load (`bootcli.teachers.protocol.Exporter`); those here know none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bootcli import __version__
from bootcli.errors import BootError
from bootcli.store.artifact import Artifact, build_student
from bootcli.store.tensors import read_tensors, write_tensors
from bootcli.student import Student
from bootcli.teachers.protocol import Cond, Exporter, LoraExporter

BARE, NETWORK = "safetensors", "network.safetensors"
"""The format that every student has, and its file."""

# None in sys.modules makes "import bootcli" fail, so that the export provably runs where bootcli is not installed.
_WITHOUT_BOOTCLI = """\
import runpy, sys
sys.modules["bootcli"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

_CARD = """\
---
{front_matter}
---

# A one-step image model

This model makes an image from noise in **one** call of its network. It was distilled with bootcli, without any training
images, from the diffusion model `{name}` of the {family} family. Its samples are {shape}.

{guidance}{licence}`{file}` holds the network; its header says how it is built, and `bootcli.json` how it was checked.
"""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        write: (artifact, empty folder) -> files.
        run: (folder, inputs) -> outputs of one step; the tensors of `Exporter.check`.
        check: what ``run`` does, for people.
        takes_guidance: see `Exporter`.
    """

    write: Callable[[Artifact, Path], None]
    run: Callable[[Path, Tensors], Tensors]
    check: str
    takes_guidance: bool = False


def formats_of(artifact: Artifact) -> dict[str, Format]:
    """Every format this student can be written in, by name; its family's own come first."""
    teacher = artifact.student.teacher
    formats = {name: _of_family(one) for name, one in teacher.export_formats().items()}
    formats.setdefault(BARE, Format(write_network, run_network, "loaded back by bootcli", takes_guidance=True))
    if artifact.lora is not None:
        formats |= {name: _of_lora(one) for name, one in teacher.lora_formats().items()}
    return formats


def _of_family(exporter: Exporter) -> Format:
    def write(artifact: Artifact, folder: Path) -> None:
        student = artifact.student
        exporter.write(student.teacher, student.net, student.head, folder)

    def run(folder: Path, inputs: Tensors) -> Tensors:
        return run_script(exporter.check, folder, inputs)

    return Format(write, run, "loaded and run in a fresh process without bootcli", exporter.takes_guidance)


def _of_lora(exporter: LoraExporter) -> Format:
    def write(artifact: Artifact, folder: Path) -> None:
        assert artifact.lora is not None, "formats_of offers this for a LoRA only"
        exporter.write(artifact.student.teacher, artifact.lora, folder)

    def run(folder: Path, inputs: Tensors) -> Tensors:
        return run_script(exporter.check, folder, inputs, *exporter.base)

    return Format(write, run, "loaded onto the teacher and run in a fresh process without bootcli")


@torch.no_grad()
def largest_difference(student: Student, cond: Cond, run: Callable[[Tensors], Tensors]) -> float:
    """How far a written student, run again, is from `Student.sample`: max |a - b|, in latents of a latent teacher.

    Args:
        student: on the CPU.
        cond: b rows.
        run: inputs -> outputs of what was written; see `Exporter.check`.

    Raises `BootError` for outputs that cannot be compared.
    """
    batch = max([len(tensor) for tensor in cond.tensors.values()], default=2)
    noise = torch.randn(batch, *student.teacher.spec.sample_shape, generator=torch.Generator().manual_seed(0))
    sample = student.sample(noise, cond)
    expected = {"sample": sample, "images": student.teacher.decode(sample).clamp(-1, 1)}
    guidance = {} if cond.guidance is None else {"guidance": cond.guidance}
    outputs = run({"noise": noise, **cond.tensors, **guidance})
    if "sample" not in outputs or any(t.shape != expected[name].shape for name, t in outputs.items()):
        shapes = {name: tuple(tensor.shape) for name, tensor in outputs.items()}
        raise BootError(f"What was written gives {shapes}, not samples of shape {tuple(sample.shape)}.")
    differences = torch.stack([(tensor - expected[name]).abs().max() for name, tensor in outputs.items()])
    return float(differences.max())  # of tensors, unlike Python's max: a NaN anywhere stays a NaN


def run_script(script: Path, folder: Path, inputs: Tensors, *more: str) -> dict[str, Tensor]:
    """Run an `Exporter.check` in a fresh process that cannot import bootcli, with ``more`` arguments behind its own.

    Raises `BootError` where it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, given)
        # -P: neither the working folder nor the script's own is searched for modules.
        command = [sys.executable, "-P", "-c", _WITHOUT_BOOTCLI, *map(str, (script, folder, given, made)), *more]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise BootError(f"What was written does not run in a fresh process: {reason}.")
        try:
            return load_file(made)
        except (OSError, SafetensorError) as error:
            raise BootError(f"{script.name} gave no outputs to compare: {error}.") from error


def write_network(artifact: Artifact, folder: Path) -> None:
    """The bare network in one file: a copy of the teacher's, which maps noise at the last timestep to the image.

    The header has what it takes to rebuild it: family, the teacher's configuration, head.
    """
    student = artifact.student
    header = {
        "bootcli": __version__,
        "family": artifact.family,
        "teacher": student.teacher.config(),
        "head": student.head,
        "t_min": student.t_min,
        "guidance_range": student.guidance_range,
        "training_steps": artifact.step,
    }
    write_tensors(folder / NETWORK, student.net.state_dict(), header)
    (folder / "README.md").write_text(model_card(artifact), encoding="utf-8")


def model_card(artifact: Artifact) -> str:
    """What the network is, and the licence it inherits from its teacher, where that is known."""
    facts = artifact.student.teacher.describe()
    data = ModelCardData(
        tags=["one-step", "distillation", "boot"], license=facts.get("licence"), base_model=facts.get("source")
    )
    licence = f"Its licence is that of its teacher: {facts['licence']}.\n\n" if "licence" in facts else ""
    limits = artifact.student.guidance_range
    guidance = "" if limits is None else f"It takes a guidance scale from {limits[0]:g} to {limits[1]:g}.\n\n"
    name = Path(artifact.config.teacher).name
    shape = "x".join(map(str, artifact.student.teacher.spec.sample_shape))
    return _CARD.format(
        front_matter=data.to_yaml(),
        name=name,
        family=artifact.family,
        shape=shape,
        file=NETWORK,
        guidance=guidance,
        licence=licence,
    )


@torch.no_grad()
def run_network(folder: Path, inputs: Tensors) -> dict[str, Tensor]:
    """One step of what `write_network` wrote, rebuilt from the file alone."""
    tensors, header = read_tensors(folder / NETWORK)
    student = build_student(header).eval()
    student.net.load_state_dict(tensors, assign=True)
    given = dict(inputs)
    noise, guidance = given.pop("noise"), given.pop("guidance", None)
    return {"sample": student.sample(noise, Cond(given, guidance=guidance))}
