"""Every setting and every default of bootcli, as frozen dataclasses. Light: imports neither torch nor pydantic.

A configuration is resolved once, from four layers: flags, then ``--set key=value``, then the config file, then the
teacher's recipe; what none of them says has the default written here. Keys are dotted: ``boot.delta``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from bootcli.errors import UsageError

Device = Literal["auto", "cpu", "cuda", "mps"]
MixedPrecision = Literal["no", "bf16", "fp16"]

Positive = Annotated[int, Gt(0)]
Count = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Interval(gt=0, lt=math.inf)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Step = Annotated[float, Interval(gt=0, le=1)]
Power = Annotated[float, Interval(ge=0, le=1)]
Scale = Annotated[float, Interval(ge=0, lt=math.inf)]
OWN_IMAGES = "teacher"
"""The word for the teacher's own images as a reference; a folder of that name is ./teacher."""
Solver = Literal["euler", "midpoint", "heun", "multistep", "unipc"]


@dataclass(frozen=True)
class StudentConfig:
    """How the student is made from the teacher (`bootcli.student`)."""

    head: Literal["auto", "native", "x0"] = "auto"
    """Output parameterisation; auto is the teacher's own advice."""
    max_gain: PositiveFloat | None = None
    """Largest sigma / alpha at which paths begin; sets t_max. None is 20 for eps teachers, whose error it multiplies,
    and for EDM's kind, where steps above it decide nothing; others begin at t = 1."""
    start_t: Step | None = None
    """Time of the teacher whose features the student starts with; None is 0.5 for an x0 head, else 1: its own."""
    t_min: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Target time of a sample."""
    path_start: Literal["auto", "estimate", "noise"] = "auto"
    """Where teacher paths begin: alpha * f + sigma * eps, as in BOOT, or the noise alone, as samplers do. Auto is noise
    for a guided teacher whose paths begin at t = 1, else estimate."""
    lora_rank: Count = 0
    """Rank of a LoRA in the teacher's own network, whose weights are then held once; 0: the whole network learns."""


@dataclass(frozen=True)
class GuidanceConfig:
    """How the teacher is guided (`bootcli.teachers.view`), where the run is."""

    rescale: Fraction = 0.0
    """phi: how far the guided prediction takes the standard deviation of the conditional one; 0 leaves its own."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Levels sigma / (alpha + sigma) at which the teacher is guided."""
    one_batch: bool = True
    """Both branches in one call of the network; false is two calls, and half the memory of their activations."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimisation (`bootcli.optimizer`, `bootcli.trainer`)."""

    name: Literal["muon", "adamw", "adamw8bit"] = "muon"
    """All take the same learning rate. Muon learns more per update, and keeps one moment instead of two; adamw8bit
    keeps AdamW's two in eight bits each (bitsandbytes)."""
    accumulation: Positive | None = None
    """Micro-batches that a batch is split into; None: on a GPU as few as fit into its memory, otherwise 1."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: Scale = 0.0
    clip_norm: PositiveFloat = 1.0
    """Largest gradient norm."""
    warmup_steps: Count = 500
    decay: Literal["constant", "cosine", "linear", "inverse-sqrt"] = "cosine"
    """Learning rate after the warm-up: cosine and linear reach 0 at the last step, the others know no last step."""
    decay_after: Positive = 1000
    """Updates from which inverse-sqrt falls, as one over the square root of their number."""
    ema_decay: Decay = 0.999
    """Decay of the weight average that is sampled, after its own warm-up."""
    ema_ramp: PositiveFloat = 9.0
    """While decay is not reached, the average is over 1 / ramp of the updates so far."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the networks with torch.compile; not the part of the teacher that an adversary looks into."""


@dataclass(frozen=True)
class BootConfig:
    """The BOOT objective (`bootcli.objectives.boot`)."""

    delta: Step = 0.1
    """Bootstrap step t - s, as a fraction of the time range."""
    delta_end: Step | None = None
    """Bootstrap step at the end of the training; None: as at its start."""
    solver: Solver = "midpoint"
    """Teacher step."""
    teacher_steps: Positive = 1
    """Teacher steps in a bootstrap step."""
    time_power: PositiveFloat = 1.0
    """1 draws t uniformly; above 1 more of it near data, below 1 near noise."""
    power: Power = 0.0
    """Weight 1 / error^k of each sample: 0 is the squared error, 0.5 pseudo-Huber, 1 the relative error."""
    weight: Literal["auto", "uniform", "velocity", "target"] = "auto"
    """w_t: 1; 1 / tau^2 with tau = sigma / (alpha + sigma); or (1 - r)^2, the plain error of the target. Auto is
    velocity for a flow teacher, else uniform."""
    beta: Scale = 1.0
    """Weight of the boundary term."""
    boundary_every: Positive = 4
    """Every n-th sample of the batch also enters the boundary term."""


@dataclass(frozen=True)
class FreeFlowConfig:
    """FreeFlow's prediction objective (`bootcli.objectives.freeflow`)."""

    delta: Step = 0.05
    """Distance to the noisier neighbour, as a fraction of the time range."""
    derivative: Literal["difference", "jvp"] = "difference"
    """How dy / dlambda is found; jvp is exact, and needs a network with forward-mode derivatives."""
    weight: Literal["velocity", "uniform"] = "uniform"
    """Whose squared error counts: the average velocity's (the paper's), 1 / tau^2 times that of y; or that of y."""
    power: Power = 0.5
    """As in boot; the paper's is 1."""
    beta: Scale = 1.0
    """Weight of the boundary term."""
    boundary_every: Positive = 4
    """Every n-th sample of the batch also enters the boundary term."""


@dataclass(frozen=True)
class PathsConfig:
    """Stored teacher paths (`bootcli.objectives.kd`)."""

    teacher_steps: Positive = 12
    """Teacher steps in a path; with points, the next number that they divide."""
    solver: Literal[Solver, "auto"] = "auto"
    """Teacher step; multistep and unipc take one evaluation a step, midpoint and heun take two. Auto is unipc, for a
    guided teacher multistep."""
    step_power: PositiveFloat = 1.5
    """Times fall as a line to this power, so that steps are shorter towards the data; 1: all of one length."""
    points: Positive = 1
    """Points of a path that are learned, the end among them: 1 is the end alone."""
    buffer: Positive | None = None
    """Paths that are kept; None: 16,384, or as many as 4 GiB hold."""
    reuse: Positive = 8
    """How often a path is drawn on average before a newer one takes its place."""
    adversary: Scale = 0.0
    """Pull of the adversary on the ends, in units of the regression's; 0: there is none."""


@dataclass(frozen=True)
class KDConfig(PathsConfig):
    """Direct distillation (`bootcli.objectives.kd`)."""

    power: Power = 0.5
    """As in boot."""


@dataclass(frozen=True)
class ReplayConfig(PathsConfig):
    """A replay buffer of teacher paths beside an objective that bootstraps, with the power of that."""

    share: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Part of the batch that learns from stored paths; 0: none are made."""
    points: Positive = 4
    """As in kd."""


@dataclass(frozen=True)
class CorrectionConfig:
    """The corrector (`bootcli.objectives.corrector`), beside any objective."""

    share: Annotated[float, Interval(gt=0, lt=1)] = 0.25
    """Part of the batch that corrects; the rest predicts."""
    start: Count = 0
    """Updates before there is a critic."""
    warmup: Count = 200
    """Updates in which the critic learns and the student does not listen yet."""
    balance: PositiveFloat = 1.0
    """Pull of the correction, in units of the prediction's."""
    direction: Literal["score", "identity"] = "score"
    """Where a sample is moved: along the difference of both denoisers, or down SiD's score identity loss."""
    alpha: Scale = 1.0
    """Of the identity loss: 0 is its upper bound, 1 an unbiased estimate, above 1 (SiD: 1.2) less of its variance."""
    levels: Positive = 1
    """Noise levels for each sample."""
    tau_power: PositiveFloat = 1.0
    """1 draws noise levels uniformly in time; below 1 more of them near noise."""
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 0.7)
    """As in guidance: here the teacher is guided at the levels of both."""
    critic: Literal["full", "lora"] = "full"
    """A copy of the teacher, or a LoRA on it: less memory, and less to learn with."""
    lora_rank: Positive = 32
    learning_rate_scale: PositiveFloat = 1.0
    """Learning rate of the critic, in units of the student's."""


@dataclass(frozen=True)
class AdversaryConfig:
    """The adversary (`bootcli.objectives.adversary`), where ``kd.adversary`` or ``replay.adversary`` asks for one."""

    start: Count = 0
    """Updates before there is a judge."""
    warmup: Count = 100
    """Updates in which the judge learns and the student does not listen yet."""
    sigmas: tuple[PositiveFloat, PositiveFloat] = (0.035, 0.36)
    """Least and greatest noise level sigma / alpha that it looks through."""
    width: Positive = 64
    """Hidden channels of each of the judge's heads."""
    learning_rate_scale: PositiveFloat = 1.0
    """Learning rate of the judge, in units of the student's."""


@dataclass(frozen=True)
class RefinerConfig:
    """Few-step refinement (`bootcli.objectives.refiner`), beside any objective and with its power."""

    share: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Part of the batch that learns to go on from a noised sample; 0: the student samples in one step only."""
    sigmas: tuple[PositiveFloat, ...] = (1.1, 0.5, 0.25)
    """Noise levels sigma / alpha that samples are noised to, falling."""
    teacher_steps: Positive = 2
    """Teacher steps from there to the end."""
    solver: Solver = "midpoint"
    """Teacher step."""


@dataclass(frozen=True)
class MemoryConfig:
    """What is held where, and how (`bootcli.pipelines.setup`); see also optimizer.name and gradient_checkpointing."""

    half_teacher: bool = False
    """Hold the frozen teacher in the half precision that the run multiplies in: what is rounded anew are biases and
    norms, and what is computed outside of that precision, such as previews."""
    offload_teacher: bool = False
    """Hold the teacher on the CPU while the student learns; not with a LoRA, which shares its weights, nor with an
    adversary, which looks through them."""
    offload_ema: bool = False
    """Hold the weight average on the CPU, where it moves every few updates (`bootcli.ema`)."""


@dataclass(frozen=True)
class WatchConfig:
    """What is measured while training (`bootcli.watch`): the best student is kept, warnings are given."""

    every: Count = 1000
    """Steps between scores; 0: none, and the last student is kept."""
    num_images: Annotated[int, Ge(128)] = 1000
    """Images of each score; where there is no reference, 128 tell the diversity."""
    reference: str | None = None
    """What the distance is to, as evaluate's --reference; None is what comes with the teacher, if anything, and where
    that is guided its own images ("teacher"): guidance leads away from real ones, and a better student follows."""
    patience: Count = 0
    """Scores without a better one after which the run ends; 0: never."""


@dataclass(frozen=True)
class DistillConfig:
    """One distillation run. Written to the run folder before step 0."""

    teacher: str = "fashion"
    objective: Literal["boot", "freeflow", "kd"] = "kd"
    corrector: bool | None = None
    """Correct the student's samples too; None: with freeflow only."""
    prompts: str | None = None
    """Where prompts come from (`bootcli.prompts`); None: those that come with bootcli."""
    negative_prompt: str | None = None
    classes: Annotated[tuple[Count, ...], MinLen(1)] | None = None
    """Class labels to distil; None is all of them."""
    guidance_scale: Scale = 1.0
    """w, built into the student; 1 is no guidance."""
    guidance_range: tuple[Scale, Scale] | None = None
    """Least and greatest w of a student that takes it at sampling; guidance_scale then has no part."""
    resolution: tuple[Positive, Positive] | None = None
    """Width and height of images in pixels; None: the teacher's own."""
    clock: Literal["native", "log"] = "native"
    """How times lie between data and noise: as the teacher's family spaces them, or uniformly in log sigma."""
    steps: Positive = 20_000
    max_minutes: PositiveFloat | None = None
    """Training ends after so many minutes, if its steps are not done before; pictures and scores do not count."""
    batch_size: Positive = 64
    learning_rate: PositiveFloat | None = None
    """Peak; None: 5e-4, of a LoRA 2e-3."""
    seed: Seed = 0
    device: Device = "auto"
    mixed_precision: MixedPrecision | None = None
    """None: bf16 where the hardware has it, otherwise no."""
    init_from: str | None = None
    """Run whose student is the starting point."""
    log_every: Positive = 10
    preview_every: Count = 1000
    """Steps between preview grids; 0 is only at the end."""
    preview_teacher_steps: Positive = 50
    checkpoint_every: Count = 1000
    """Steps between checkpoints; 0 is only at the end."""
    keep_checkpoints: Positive = 2
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    boot: BootConfig = field(default_factory=BootConfig)
    freeflow: FreeFlowConfig = field(default_factory=FreeFlowConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    refiner: RefinerConfig = field(default_factory=RefinerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    @property
    def guided(self) -> bool:
        """Whether the teacher is guided."""
        return self.guidance_scale != 1.0 or self.guidance_range is not None

    @property
    def corrects(self) -> bool:
        """Whether there is a corrector beside the objective: with freeflow, unless it is said."""
        return self.objective == "freeflow" if self.corrector is None else self.corrector

    @property
    def path_stores(self) -> tuple[PathsConfig, ...]:
        """The teacher paths that the run stores."""
        kd = (self.kd,) if self.objective == "kd" else ()
        return kd + ((self.replay,) if self.replay.share else ())


RESUMABLE = frozenset(
    {
        "log_every",
        "preview_every",
        "preview_teacher_steps",
        "checkpoint_every",
        "keep_checkpoints",
        "watch.every",
        "watch.patience",
    }
)
"""What may change on ``--resume``, beside longer ``steps`` and ``max_minutes``: what has no part in the training."""
USERS_OWN = ("teacher", "init_from", "device", "max_minutes", "seed")
"""What no recipe says: it comes with a teacher, whoever made that."""


def resolve(*layers: Mapping[str, object]) -> DistillConfig:
    """The configuration from dotted layers, strongest first. Unknown keys and bad values raise `UsageError`."""
    merged: dict[str, object] = {}
    for layer in reversed(layers):
        merged.update(layer)
    return from_dict(_nest(merged))


def from_dict(tree: Mapping[str, object]) -> DistillConfig:
    """Strictly read a nested mapping (a config file, ``config.json``). Raises `UsageError`."""
    _check_keys(flatten(tree))
    from pydantic import TypeAdapter, ValidationError

    try:
        config = TypeAdapter(DistillConfig).validate_python(dict(tree))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        raise UsageError(f"Setting {key} = {first['input']!r}: {first['msg'].lower()}.") from error
    _check_numbers(tree, config)
    _check_guidance(config)
    return config


def _check_numbers(tree: Mapping[str, object], config: DistillConfig) -> None:
    """Raise `UsageError` where true or false was read as a number, 1 or 0; texts are read as what they say."""
    read = dict(flatten(to_dict(config)))
    for key, value in flatten(tree):
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(each, bool) for each in values) and not isinstance(read[key], bool):
            raise UsageError(f"Setting {key} = {value!r}: input should be a number, not true or false.")


def _check_guidance(config: DistillConfig) -> None:
    """Raise `UsageError` for limits that do not rise, or both a range of w and one w."""
    rising = {
        "guidance_range": config.guidance_range,
        "guidance.interval": config.guidance.interval,
        "correction.guidance_interval": config.correction.guidance_interval,
    }
    for name, limits in rising.items():
        if limits is not None and not limits[0] < limits[1]:
            raise UsageError(f"{name} = [{limits[0]:g}, {limits[1]:g}] does not rise.", "Give the least first.")
    if config.guidance_range is not None and config.guidance_scale != 1.0:
        raise UsageError(
            f"--guidance-scale {config.guidance_scale:g} is one w, --guidance-range many.", "Give one of them."
        )


def from_other_version(tree: Mapping[str, object]) -> DistillConfig:
    """As `from_dict`, for a stored student: settings that this version does not know had their effect in training."""
    known = set(known_keys())
    return resolve({key: value for key, value in flatten(tree) if key in known})


def to_dict(config: DistillConfig) -> dict[str, object]:
    """The nested JSON-able form: `from_dict`'s inverse."""
    return dataclasses.asdict(config)


def check_recipe(recipe: Mapping[str, object]) -> None:
    """Raise `UsageError` unless every key and value of a teacher's recipe is a valid setting that is not the user's."""
    reference = resolve(recipe).watch.reference
    for key in USERS_OWN:
        if key in recipe:
            raise UsageError(f"{key} is for the user to say.", "Take it out of the recipe.")
    if reference not in (None, OWN_IMAGES):
        raise UsageError(f"watch.reference = {reference!r}: a recipe names no files; it may say {OWN_IMAGES!r}.")


def read_file(path: Path) -> dict[str, object]:
    """Dotted settings of a TOML file. Raises `UsageError` for a missing or broken one."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read config file {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"Config file {path} is not TOML: {error}.") from error
    flat = dict(flatten(tree))
    _check_keys(flat.items())
    return flat


def read_overrides(items: Iterable[str]) -> dict[str, object]:
    """Dotted settings from ``key=value`` words; values are TOML (``true``, ``0.1``, ``[1, 2]``, ``1,2``), else text."""
    overrides: dict[str, object] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator:
            raise UsageError(f"--set {item}: expected key=value.", "For example: --set kd.teacher_steps=8")
        overrides[key.strip()] = text
        for value in (text, *([f"[{text}]"] if "," in text else [])):
            with suppress(tomllib.TOMLDecodeError):
                overrides[key.strip()] = tomllib.loads(f"value = {value}")["value"]
                break
    _check_keys(overrides.items())
    return overrides


def known_keys() -> list[str]:
    """Every dotted key, in order."""
    return [key for key, _ in flatten(to_dict(DistillConfig()))]


def differences(old: DistillConfig, new: DistillConfig) -> dict[str, tuple[object, object]]:
    """Dotted keys whose values differ, with both values."""
    before, after = dict(flatten(to_dict(old))), dict(flatten(to_dict(new)))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _check_keys(items: Iterable[tuple[str, object]]) -> None:
    known = known_keys()
    for key, _ in items:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            raise UsageError(f"Unknown setting: {key}.", f"Did you mean {' or '.join(near)}?" if near else "")


def flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nest(flat: Mapping[str, object]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for key, value in flat.items():
        *groups, leaf = key.split(".")
        node = tree
        for group in groups:
            child = node.setdefault(group, {})
            if not isinstance(child, dict):
                raise UsageError(f"Unknown setting: {key}.")
            node = child
        node[leaf] = value
    return tree
