"""The conformance kit: `check_teacher` runs every clause of the teacher contract against one loaded teacher.

A plugin's test suite needs one line, ``check_teacher(load(folder), family)``. The networks run on batches of one or
two samples, so a tiny configuration of a large architecture is checked in a second.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher
from bootcli.errors import UsageError
from bootcli.maths.prediction import PredictionType
from bootcli.teachers.family import TeacherFamily
from bootcli.teachers.protocol import Conditioning, Exporter, Head, LoraExporter, Sampler, Teacher
from bootcli.testing_network import NETWORK_CLAUSES, Clause, ConformanceError, Probe, finite, need

__all__ = ["ConformanceError", "GaussianMixtureTeacher", "GaussianTeacher", "check_teacher"]


def check_teacher(teacher: Teacher, family: TeacherFamily | None = None, *, device: str = "cpu") -> list[str]:
    """Check a loaded teacher against the whole contract.

    Args:
        teacher: with weights; its network is moved to ``device``.
        family: what registers it; without one, the clauses on loading and rebuilding are left out.
        device: where its network runs.

    Returns:
        The names of the clauses that hold.

    Raises:
        ConformanceError: at the first clause that does not, naming it; also an `AssertionError`.
    """
    teacher.net.to(device)
    probe = Probe(teacher, family, torch.device(device))
    clauses = (*SPEC_CLAUSES, *NETWORK_CLAUSES, *DESCRIPTION_CLAUSES, *(FAMILY_CLAUSES if family else ()))
    for clause in clauses:
        try:
            clause(probe)
        except ConformanceError as error:
            raise ConformanceError(f"{clause.__name__}: {error.message}") from None
        except Exception as error:
            raise ConformanceError(f"{clause.__name__}: {type(error).__name__}: {error}") from error
    return [clause.__name__ for clause in clauses]


def spec_is_sane(probe: Probe) -> None:
    """Shapes, names and numbers of the spec fit together."""
    spec = probe.teacher.spec
    shape = spec.sample_shape
    need(len(shape) == 3 and all(type(n) is int and n > 0 for n in shape), f"sample_shape {shape} is not (c, h, w).")
    need(spec.prediction in get_args(PredictionType), f"{spec.prediction!r} is not a prediction type.")
    need(spec.sampler in get_args(Sampler), f"{spec.sampler!r} is not a sampler.")
    need(spec.conditioning in get_args(Conditioning), f"{spec.conditioning!r} is not a kind of conditioning.")
    fits = (spec.num_classes > 0) == (spec.conditioning == "class")
    need(fits, f"num_classes is {spec.num_classes} with conditioning {spec.conditioning!r}.")
    need(probe.teacher.head() in get_args(Head), f"{probe.teacher.head()!r} is not a head.")


def schedule_runs_from_data_to_noise(probe: Probe) -> None:
    """alpha falls, sigma / alpha rises, t = 0 is clean data; an eps teacher keeps some signal at t = 1."""
    spec = probe.teacher.spec
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = spec.schedule(t)
    need(alpha.shape == sigma.shape == t.shape, "the coefficients do not have the shape of t.")
    need(alpha.dtype == sigma.dtype == torch.float64, "the coefficients are not float64.")
    need(
        finite(alpha, sigma) and bool((alpha >= 0).all() and (sigma >= 0).all()), "a coefficient is not finite or < 0."
    )
    need(abs(alpha[0] - 1) < 1e-9 and sigma[0] < 1e-9, "t = 0 is not clean data (alpha 1, sigma 0).")
    need((alpha.diff() <= 0).all(), "alpha rises with t somewhere.")
    need((torch.atan2(sigma, alpha).diff() > 0).all(), "sigma / alpha does not rise with t everywhere.")
    need(spec.prediction != "eps" or alpha[-1] > 1e-8, "an eps-prediction says nothing of x_0 where alpha(1) = 0.")
    grid = spec.schedule.grid(4)
    need(len(grid) == 5 and grid[0] <= 1 and grid[-1] == 0, "grid(4) is not 5 times that end at 0.")
    need((grid.diff() < 0).all(), "the times of grid(4) do not fall.")


def conditions_are_checked(probe: Probe) -> None:
    """condition takes what the spec says, one row per request, and raises UsageError for what it cannot honour."""
    spec = probe.teacher.spec
    for name, tensor in probe.cond.tensors.items():
        need(len(tensor) == 2, f"{name} does not have one row per request.")
    need(spec.conditioning == "none" or probe.cond.tensors, "a conditional teacher gives an empty condition.")
    with suppress(UsageError):  # a teacher may lack the unconditional branch
        probe.teacher.condition([None])
    invalid: dict[Conditioning, tuple[int | str, ...]] = {
        "none": (0, "a cat"),
        "class": (-1, spec.num_classes, "a cat"),
        "text": (0,),
    }
    for request in invalid[spec.conditioning]:
        try:
            probe.teacher.condition([request])
        except UsageError:
            continue
        raise ConformanceError(f"condition([{request!r}]) does not raise UsageError.")


def decode_gives_images(probe: Probe) -> None:
    """decode gives (b, 1 or 3, H, W) in [-1, 1], up to overshoot."""
    images = decoded(probe)
    fits = images.ndim == 4 and len(images) == 2 and images.shape[1] in (1, 3)
    need(fits, f"decode gives {tuple(images.shape)}, not (b, 1 or 3, H, W).")
    need(images.is_floating_point() and finite(images), "decode is not finite floats.")
    low, high = float(images.min()), float(images.max())
    need(-10 < low < 0 < high < 10, f"decode gives values from {low:g} to {high:g}: are they scaled to [-1, 1]?")


@torch.no_grad()
def decoded(probe: Probe) -> Tensor:
    """Images of the probe's samples."""
    return probe.teacher.decode(probe.x_t.clamp(-1, 1))


def what_is_let_go_comes_back(probe: Probe) -> None:
    """After release, conditions and images are what they were; a fingerprint is the same text twice."""
    teacher = probe.teacher
    images = decoded(probe)
    teacher.release()
    need(probe.same(decoded(probe), images), "release changes what decode gives.")
    again = Probe(teacher, probe.family, probe.device).cond
    kept = all(probe.same(again.tensors[name].float(), tensor.float()) for name, tensor in probe.cond.tensors.items())
    need(kept, "release changes the conditions.")
    known = teacher.fingerprint()
    need(known is None or (isinstance(known, str) and known == teacher.fingerprint()), "fingerprint is not one text.")


def recipe_is_valid(probe: Probe) -> None:
    """Every key and value of recipe() is a setting of bootcli."""
    from bootcli.config import check_recipe

    check_recipe(probe.teacher.recipe())


def lora_targets_exist(probe: Probe) -> None:
    """Every LoRA target ends the name of a module."""
    names = [f".{name}" for name, _ in probe.teacher.net.named_modules()]
    for target in probe.teacher.lora_targets():
        need(any(name.endswith(f".{target}") for name in names), f"no module's name ends with {target!r}.")


def description_is_text(probe: Probe) -> None:
    """describe() maps text to text."""
    for key, value in probe.teacher.describe().items():
        need(isinstance(key, str) and isinstance(value, str), f"describe() has {key!r}: {value!r}, which is not text.")


def exporters_are_complete(probe: Probe) -> None:
    """Every export format has a writer and a script that checks what was written."""
    formats, of_lora = probe.teacher.export_formats(), probe.teacher.lora_formats()
    need(not formats.keys() & of_lora.keys(), "an export format has the name of one for a LoRA.")
    both: dict[str, Exporter | LoraExporter] = {**formats, **of_lora}
    for name, exporter in both.items():
        kind = LoraExporter if name in of_lora else Exporter
        need(isinstance(exporter, kind), f"export format {name!r} is no {kind.__name__}.")
        need(callable(exporter.write), f"the writer of export format {name!r} cannot be called.")
        need(exporter.check.is_file(), f"the check of export format {name!r} is no file: {exporter.check}.")


def feature_space_fits(probe: Probe) -> None:
    """The feature network takes the teacher's images, and its statistics have the shape of its features."""
    space = probe.teacher.feature_space()
    if space is None:
        return
    with torch.no_grad():
        features = space.network.to(probe.device)((decoded(probe).clamp(-1, 1) + 1) * 127.5)
    need(features.ndim == 2 and len(features) == 2 and finite(features), "the features are not finite, (b, d).")
    d = features.shape[1]
    need(space.mean.shape == (d,) and space.cov.shape == (d, d), f"mean and cov do not fit {d} features.")
    need(space.mean.dtype == space.cov.dtype == torch.float64, "mean and cov are not float64.")
    need(finite(space.mean, space.cov) and torch.allclose(space.cov, space.cov.T), "cov is not finite and symmetric.")
    if space.features is not None:
        fits = space.features.ndim == 2 and space.features.shape[1] == d and space.features.is_floating_point()
        need(fits and finite(space.features), f"the reference features are not (n, {d}) finite numbers.")
    need(space.num_images > 1, "num_images is not the number of reference images.")
    need(space.name and "inception" not in space.name.lower(), "a feature space of your own is not 'inception'.")


def family_refuses_junk(probe: Probe) -> None:
    """matches says no to folders and files of something else, without raising."""
    family = probe.family
    assert family is not None
    need(family.name and family.summary and family.accepts, "name, summary or accepts is empty.")
    with tempfile.TemporaryDirectory() as folder:
        need(not family.matches(Path(folder)), "matches accepts an empty folder.")
        need(not family.matches(Path(folder, "missing")), "matches accepts a path that does not exist.")
        for name in ("config.json", "model_index.json", "weights.safetensors"):
            Path(folder, name).write_bytes(b"\xff{ not json")
            need(not family.matches(Path(folder, name)), f"matches accepts a broken {name}.")
        need(not family.matches(Path(folder)), "matches accepts a folder of broken files.")


def build_remakes_the_teacher(probe: Probe) -> None:
    """family.build(config()) makes the same spec and parameters, reads none, and predicts the same with the weights."""
    teacher, family = probe.teacher, probe.family
    assert family is not None
    built = family.build_empty(json.loads(json.dumps(teacher.config(), allow_nan=False)))
    need(built.spec == teacher.spec, "the spec of the rebuilt teacher differs.")
    weights = teacher.net.state_dict()
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    rebuilt = {name: tensor.shape for name, tensor in built.net.state_dict().items()}
    need(rebuilt == shapes, f"the parameters of the rebuilt network differ: {sorted(rebuilt.keys() ^ shapes.keys())}.")
    built.net.load_state_dict(weights, assign=True)
    built.net.to(probe.device)  # buffers that are in no file
    t = torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        remade = built.predict(built.net, probe.x_t, t, probe.cond)
    need(torch.equal(remade, probe.predict(0.5)), "the rebuilt network predicts something else with the same weights.")


SPEC_CLAUSES: tuple[Clause, ...] = (spec_is_sane, schedule_runs_from_data_to_noise, conditions_are_checked)
DESCRIPTION_CLAUSES: tuple[Clause, ...] = (
    decode_gives_images,
    what_is_let_go_comes_back,
    recipe_is_valid,
    lora_targets_exist,
    description_is_text,
    exporters_are_complete,
    feature_space_fits,
)
FAMILY_CLAUSES: tuple[Clause, ...] = (family_refuses_junk, build_remakes_the_teacher)
