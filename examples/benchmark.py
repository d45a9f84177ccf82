"""How good one step is: students of every objective against their teacher, at 5, 20 and 60 minutes of training.

    python examples/benchmark.py                  # everything that is not measured yet; stop it and go on at will
    python examples/benchmark.py --only kd        # the cells whose name contains "kd"
    python examples/benchmark.py --levers         # one setting changed at a time, 5 minutes each
    python examples/benchmark.py --teacher fashion-sd --guidance-scale 1.5      # cells of their own
    python examples/benchmark.py --page           # write docs/results.md and its curves from the cells there are

Each cell is one JSON file in docs/results/<teacher>/, written once. A student is trained in one run: its state after 5
minutes is kept going to 20 and to 60, so the learning rate knows no end; what counts is training time alone, without
previews and scores. Later seeds make as many updates as the first one did in that time. Run the first one on an idle
machine; with --paced only its shortest time, and the longer ones take as many updates a minute. The curves need
matplotlib (`benchmark_page.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from benchmark_page import write_page
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from bootcli import __version__
from bootcli.config import OWN_IMAGES, DistillConfig, differences, flatten, to_dict
from bootcli.engine import Engine
from bootcli.evaluate import features_of, frechet, gaussian_fit
from bootcli.images import to_uint8
from bootcli.manifold import MOST_ROWS, manifold_of, precision_recall, some_rows
from bootcli.maths.schedule import DiscreteVP
from bootcli.pipelines.bench import accuracy
from bootcli.pipelines.defaults import start_time
from bootcli.pipelines.distill import distill
from bootcli.pipelines.evaluate import evaluate
from bootcli.pipelines.events import Finished
from bootcli.pipelines.guidance import teacher_view
from bootcli.pipelines.requests import condition_of, labels_of
from bootcli.pipelines.settings import resolve_config
from bootcli.reference import OWN_STEPS, reference_for, write_reference
from bootcli.sampler import paired_errors, path_ends, prior_noise, reference_calls, teacher_images
from bootcli.store.artifact import load_student
from bootcli.store.checkpoint import checkpoints
from bootcli.store.files import read_json, write_json
from bootcli.store.rundir import RunDir
from bootcli.store.tensors import read_tensors, write_tensors
from bootcli.teachers.registry import load
from bootcli.teachers.view import TeacherView
from bootcli.trainer import RESIDUAL_BINS

ROOT = Path(__file__).parents[1]
STEPS = (1, 2, 4, 8, 10, 16, 25, 50)
MINUTES = (5, 20, 60)
NFES = (1, 2, 4)
NEWEST = 50
"""Lines of the log whose residuals are averaged."""
PAIRED = 1000
"""Images of the paired error: each costs 50 calls of the teacher, and its mean is steady."""
OWN = 2000
"""Images of the distance to the teacher's own, of both: guidance takes those far from real ones."""
OBJECTIVES: dict[str, dict[str, object]] = {
    "default": {},
    "boot": {"objective": "boot"},
    "freeflow": {"objective": "freeflow", "corrector": True},
    "freeflow-paper": {
        "objective": "freeflow",
        "freeflow.power": 1.0,
        "freeflow.weight": "velocity",
        "corrector": True,
        "correction.direction": "score",
    },
    "kd": {"objective": "kd", "kd.adversary": 0.0},
    "few-step": {"refiner.share": 0.15},
}
"""What each student is trained on; all else is the teacher's recipe. boot and kd are plain: without corrector and
adversary. freeflow has its corrector, and as in its paper also the weights of that, and its direction."""
LEVERS: tuple[tuple[str, dict[str, object]], ...] = (
    ("default", {}),
    ("default", {"kd.adversary": 0.25}),
    ("default", {"kd.adversary": 1.5}),
    ("default", {"adversary.sigmas": (0.035, 2.25)}),
    ("default", {"adversary.width": 32}),
    ("default", {"adversary.learning_rate_scale": 0.3}),
    ("default", {"corrector": True}),
    ("default", {"kd.power": 0.0}),
    ("default", {"kd.power": 1.0}),
    ("default", {"kd.reuse": 2}),
    ("default", {"kd.reuse": 16}),
    ("default", {"kd.teacher_steps": 10}),
    ("default", {"kd.solver": "midpoint"}),
    ("default", {"kd.solver": "euler"}),
    ("default", {"kd.points": 4}),
    ("default", {"student.max_gain": 8.0}),
    ("default", {"student.max_gain": 20.0}),
    ("default", {"student.start_t": 1.0}),
    ("default", {"student.head": "native"}),
    ("default", {"optimizer.ema_ramp": 9.0}),
    ("default", {"optimizer.decay": "constant"}),
    ("default", {"optimizer.name": "adamw"}),
    ("default", {"batch_size": 64}),
    ("default", {"learning_rate": 3e-3}),
    ("default", {"refiner.share": 0.15}),
    ("kd", {}),
    ("kd", {"corrector": True}),
    ("kd", {"corrector": True, "correction.direction": "score"}),
    ("kd", {"corrector": True, "correction.levels": 1}),
    ("kd", {"corrector": True, "correction.balance": 0.5}),
    ("kd", {"corrector": True, "correction.tau_power": 0.5}),
    ("kd", {"corrector": True, "correction.critic": "lora"}),
    ("boot", {}),
    ("boot", {"corrector": True}),
    ("boot", {"replay.share": 0.375}),
    ("boot", {"replay.share": 0.375, "replay.adversary": 0.5}),
    ("boot", {"boot.delta": 0.1}),
    ("boot", {"boot.delta_end": 0.1}),
    ("boot", {"boot.teacher_steps": 3}),
    ("boot", {"boot.solver": "euler"}),
    ("boot", {"boot.solver": "heun"}),
    ("boot", {"boot.time_power": 2.0}),
    ("boot", {"boot.power": 0.5}),
    ("boot", {"boot.weight": "velocity"}),
    ("boot", {"boot.weight": "target"}),
    ("freeflow", {}),
    ("freeflow", {"corrector": False}),
    ("freeflow", {"correction.direction": "identity"}),
    ("freeflow", {"correction.share": 0.5}),
    ("freeflow", {"freeflow.derivative": "jvp"}),
    ("freeflow", {"freeflow.delta": 0.1}),
    ("freeflow", {"freeflow.power": 0.0}),
    ("freeflow", {"freeflow.power": 1.0}),
    ("freeflow", {"freeflow.weight": "velocity"}),
    ("freeflow", {"freeflow.power": 1.0, "freeflow.weight": "velocity"}),
)
"""Settings changed one at a time, of which student; none is what the others are compared with."""
ENDLESS = {
    "steps": 10_000_000,
    "optimizer.decay": "inverse-sqrt",
    "preview_every": 0,
    "checkpoint_every": 500,
    "watch.every": 1000,
}


@dataclass(frozen=True)
class Bench:
    """Where cells go, and what they are measured with.

    Args:
        teacher: name or folder.
        cells: folder of the JSON files.
        runs: folder of the runs.
        num_images: for each number.
        device: where to compute.
        guidance_scale: None is the recipe's.
        mixed_precision: of training; None is what the machine does best.
    """

    teacher: str
    cells: Path
    runs: Path
    num_images: int
    device: Any
    guidance_scale: float | None = None
    mixed_precision: str | None = None

    @property
    def shared(self) -> dict[str, object]:
        """The settings of everything here: teacher, device, and guidance where it is not the recipe's."""
        own = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {"teacher": self.teacher, "device": self.device, **own}

    def path(self, name: str) -> Path:
        """The file of a cell."""
        return self.cells / f"{name}.json"

    def cell(self, name: str, facts: dict[str, object], measure: Callable[[], dict[str, object]]) -> None:
        """Measure a cell unless it is there already, and keep it with its facts."""
        path = self.path(name)
        if path.exists():
            print(f"{name}: already measured")
            return
        result = measure()
        write_json(path, {"cell": name, **facts, **result, **self._facts()})
        shown = result.get("student", [result])
        print(name, *(f"{row['nfe']} NFE: FID {row['fid']:.3f}" for row in shown), flush=True)  # type: ignore[union-attr]

    def _facts(self) -> dict[str, object]:
        return {
            **self.shared,
            "num_images": self.num_images,
            "bootcli": __version__,
            "torch": torch.__version__,
            "device": device_name(Engine(self.device).device),
            "threads": torch.get_num_threads(),
        }


def device_name(device: torch.device) -> str:
    """The GPU, or the processor and the cores of it that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {cores} cores"


def teacher_cells(bench: Bench, steps: Sequence[int], only: str) -> None:
    """The teacher under its reference sampler, and under DPM-Solver++ where that knows it, at each number of steps."""
    names = [f"teacher-{solver}-{n}" for solver in ("ddim", "heun", "dpmsolver") for n in steps]
    if not any(only in name and not bench.path(name).exists() for name in names):
        return
    config = resolve_config(bench.shared, {}, {})
    engine = Engine(config.device, "no")
    teacher = load(config.teacher).teacher
    view = teacher_view(teacher, config, engine)
    reference = reference_for(teacher, None, engine.device, with_features=True)
    assert reference.features is not None
    rows = min(bench.num_images, MOST_ROWS, len(reference.features))
    real = manifold_of(some_rows(reference.features, rows))
    cond_of = condition_of(teacher, config)
    seeds = range(bench.num_images)
    own = reference_for(teacher, str(teacher_reference(bench)), engine.device)

    classes = teacher.spec.conditioning == "class" or bool(reference.words)
    has_classes = reference.classes_of is not None and classes

    def score(batches: Iterator[Tensor], nfe: int) -> dict[str, object]:
        features = features_of(batches, reference.network, engine.device)
        quality = precision_recall(real, manifold_of(some_rows(features, rows)))
        fid = frechet(gaussian_fit(features), reference.statistics)
        to_own = frechet(gaussian_fit(features[:OWN]), own.statistics)
        row = {
            "nfe": nfe,
            "fid": fid,
            "precision": quality.precision,
            "recall": quality.recall,
            "fid_to_teacher": to_own,
        }
        if has_classes:
            row["accuracy"] = accuracy(
                features, reference, labels_of(teacher, config, reference.words)(seeds), engine.device
            )
        return row

    for n in steps:
        if only in (name := f"teacher-{teacher.spec.sampler}-{n}"):
            calls = reference_calls(view, n)
            images = partial(teacher_images, view, n, cond_of, seeds, 250, engine)
            bench.cell(name, {"steps": n}, lambda images=images, calls=calls: score(images(), calls))  # type: ignore[misc]
        if only in (name := f"teacher-dpmsolver-{n}") and isinstance(view.schedule, DiscreteVP):
            calls = n + int(view.is_guided(solver_times(dpm_solver(view.schedule, n))).sum())
            images = partial(dpm_solver_images, view, n, cond_of, seeds, 250, engine)
            bench.cell(name, {}, lambda images=images, calls=calls: score(images(), calls))  # type: ignore[misc]


def teacher_reference(bench: Bench) -> Path:
    """The file of what the teacher draws in many steps, made once: from the noise and the conditions of the images
    compared with it, so that nothing is left to chance and the teacher itself has 0."""
    count = min(bench.num_images, OWN)
    path = bench.runs / f"teacher-{count}.safetensors"
    if not path.exists():
        config = resolve_config(bench.shared, {}, {})
        engine = Engine(config.device, "no")
        teacher = load(config.teacher).teacher
        view, cond_of = teacher_view(teacher, config, engine), condition_of(teacher, config)
        own = partial(teacher_images, view, OWN_STEPS, cond_of, range(count), 250, engine)
        write_reference(path, reference_for(teacher, OWN_IMAGES, engine.device, own_images=own))
    return path


def dpm_solver(schedule: DiscreteVP, steps: int) -> DPMSolverMultistepScheduler:
    """Diffusers' DPM-Solver++ (2M, trailing steps)."""
    cumprod = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    betas = 1 - cumprod / torch.cat([torch.ones(1, dtype=torch.float64), cumprod[:-1]])
    solver = DPMSolverMultistepScheduler(
        schedule.num_timesteps, trained_betas=betas.numpy(), prediction_type="sample", timestep_spacing="trailing",
        algorithm_type="dpmsolver++", final_sigmas_type="zero",
    )  # fmt: skip
    solver.set_timesteps(steps)
    return solver


def solver_times(solver: DPMSolverMultistepScheduler) -> Tensor:
    """Its timesteps as our times, (steps,)."""
    return (solver.timesteps.double() + 1) / solver.config.num_train_timesteps


@torch.no_grad()
def dpm_solver_images(
    view: TeacherView, steps: int, cond_of: Any, seeds: Sequence[int], batch_size: int, engine: Engine
) -> Iterator[Tensor]:
    """Samples of `dpm_solver` and the same denoiser, as uint8 batches on the CPU."""
    assert isinstance(view.schedule, DiscreteVP)
    for first in range(0, len(seeds), batch_size):
        rows = seeds[first : first + batch_size]
        x, cond = prior_noise(rows, view.teacher.spec.sample_shape).to(engine.device), cond_of(rows).to(engine.device)
        solver = dpm_solver(view.schedule, steps)
        for timestep, t in zip(solver.timesteps, solver_times(solver), strict=True):
            x = solver.step(view.x0(x, t.expand(len(x)), cond), timestep, x, return_dict=False)[0]
        yield to_uint8(view.teacher.decode(x)).cpu()


def student_cells(
    bench: Bench, name: str, seed: int, minutes: Sequence[float], only: str, *, paced: bool = False
) -> None:
    """One run, scored on its way."""
    run, before = bench.runs / f"{name}-seed{seed}", bench.path("none")
    for limit in minutes:
        cell = f"{name}-seed{seed}-{limit:g}min"
        if only in cell:
            facts: dict[str, object] = {"objective": name, "seed": seed, "minutes": limit}
            first = bench.path(f"{name}-seed0-{limit:g}min")
            budget: dict[str, object] = {"max_minutes": float(limit)}
            if seed > 0 and first.exists():
                budget = {"steps": read_json(first)["updates"]}
            elif paced and before.exists():
                facts |= {"paced": True}
                budget = {"steps": round(read_json(before)["updates"] * limit / read_json(before)["minutes"])}
            bench.cell(cell, facts, lambda budget=budget: trained(bench, run, OBJECTIVES[name] | budget, seed))  # type: ignore[misc]
        before = bench.path(cell)


def lever_cells(bench: Bench, minutes: float, only: str) -> None:
    """Each lever in a run of its own, where it has one with the corrector from the first: the run is short."""
    for base, settings in LEVERS:
        text = ", ".join(f"{key}={value}" for key, value in settings.items())
        cell = f"lever-{base}-{text.replace(', ', '-').replace('=', '-') or 'plain'}"
        if only in cell:
            facts = {"base": base, "lever": text, "seed": 0, "minutes": minutes}
            both = {"correction.start": 0, "max_minutes": minutes} | OBJECTIVES[base] | settings
            run = bench.runs / cell
            bench.cell(cell, facts, lambda run=run, both=both: trained(bench, run, both, 0))  # type: ignore[misc]


def trained(bench: Bench, run: Path, settings: dict[str, object], seed: int) -> dict[str, object]:
    """Train as far as the settings say, and score."""
    own = {"seed": seed, "mixed_precision": bench.mixed_precision}
    config = resolve_config({**bench.shared, **own, **ENDLESS, **settings}, {}, {})
    resume = bool(checkpoints(RunDir(run).checkpoints))
    if resume:
        refuse_other(run, config)
    *_, finished = distill(config, run, resume=resume, overwrite=not resume)
    assert isinstance(finished, Finished)
    nfes = NFES if config.refiner.share else NFES[:1]
    teacher = load(bench.teacher).teacher
    space = teacher.feature_space()
    classes = teacher.spec.conditioning == "class" or (space is not None and bool(space.words))
    metrics = ("fid", "pr", "accuracy") if classes else ("fid", "pr")
    result: dict[str, Any] = evaluate(
        run, metrics=metrics, num_images=bench.num_images, nfe=nfes, batch_size=250, device=bench.device
    )
    own: dict[str, Any] = evaluate(
        run,
        metrics=("fid",),
        num_images=min(bench.num_images, OWN),
        reference=str(teacher_reference(bench)),
        batch_size=250,
        device=bench.device,
    )
    result["student"] |= {"paired_mse": paired_mse(bench, run), "fid_to_teacher": own["student"]["fid"]}
    lines = [json.loads(line) for line in RunDir(run).log_file.read_text().splitlines()[-NEWEST:]]
    keep = ("nfe", "fid", "precision", "recall", "accuracy", "paired_mse", "fid_to_teacher")
    return {
        "updates": finished.steps,
        "kept": result["training_steps"],
        "residual": fmean(line["residual"] for line in lines),
        "residual_bins": [mean_of([line["residual_bins"][i] for line in lines]) for i in range(RESIDUAL_BINS)],
        "student": [
            {key: row[key] for key in keep if key in row}
            for row in (result["student"], *result["student_in_more_calls"])
        ],
        "mixed_precision": RunDir(run).config().mixed_precision,
        "settings": dict(flatten(to_dict(config))) | {"prompts": config.prompts and Path(config.prompts).name},
    }


@torch.no_grad()
def paired_mse(bench: Bench, run: Path) -> float:
    """As `bootcli evaluate --metric paired`, with ends of the teacher's paths that are drawn once for all students."""
    student, config = (artifact := load_student(run)).student, artifact.config
    engine, teacher = Engine(bench.device, "no"), load(bench.teacher).teacher
    cond_of, seeds = condition_of(teacher, config), range(min(bench.num_images, PAIRED))
    view = teacher_view(teacher, config, engine)  # before the time: it takes the run's clock
    t_max = start_time(teacher, config)
    kept = bench.runs / f"paths-from-{t_max:.4f}-{len(seeds)}.safetensors"
    if not kept.exists():
        write_tensors(kept, {"ends": torch.cat([*path_ends(view, t_max, OWN_STEPS, cond_of, seeds, 250, engine)])}, {})
    ends = read_tensors(kept)[0]["ends"].split(250)
    return float(torch.cat([*paired_errors(student.to(engine.device), ends, cond_of, seeds, engine)]).mean())


def refuse_other(run: Path, config: DistillConfig) -> None:
    """Stop where a run cannot go on with these settings; a recipe may have changed since it began.

    What the teacher's own prompts are called says enough: a clone in another folder has the same.
    """
    stored = RunDir(run).config()
    resolved = (None, "auto")
    changed = [key for key, (_, new) in differences(stored, config).items() if new not in resolved]
    if stored.prompts and config.prompts and Path(stored.prompts).name == Path(config.prompts).name:
        changed = [key for key in changed if key != "prompts"]
    done = int(checkpoints(RunDir(run).checkpoints)[-1].stem.removeprefix("step-"))
    longer = done <= config.steps and (stored.max_minutes or 0) <= (config.max_minutes or math.inf)
    if set(changed) - {"max_minutes", "steps"} or not longer:
        raise SystemExit(
            f"{run} was trained with other settings ({', '.join(changed)}): delete it, or take other --runs."
        )


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those there are."""
    some = [value for value in values if value is not None]
    return fmean(some) if some else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Students of every objective against their teacher.")
    parser.add_argument("--teacher", default="fashion")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--guidance-scale", type=float, help="another than the recipe's: cells of their own")
    parser.add_argument(
        "--mixed-precision", choices=("no", "fp16", "bf16"), help="of training; else the machine's best"
    )
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="of the teacher")
    parser.add_argument("--minutes", default=",".join(map(str, MINUTES)), help="of training, rising")
    parser.add_argument("--seeds", type=int, default=3, help="how many; beyond the first only to the middle time")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument(
        "--paced", action="store_true", help="longer times by updates, so that they may share a machine"
    )
    parser.add_argument("--levers", action="store_true", help="measure these instead, to the first of the minutes")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    if not options.page:
        scale = options.guidance_scale
        name = Path(options.teacher).name + ("" if scale is None else f"-w{scale:g}")
        bench = Bench(
            options.teacher, options.results / name, options.runs / name, options.num_images, options.device, scale,
            options.mixed_precision,
        )  # fmt: skip
        minutes = [float(m) for m in options.minutes.split(",")]
        if options.levers:
            lever_cells(bench, minutes[0], options.only)
        else:
            teacher_cells(bench, [int(n) for n in options.steps.split(",") if n], options.only)
            for seed in range(options.seeds):
                for objective in options.objectives.split(","):
                    some = minutes if seed == 0 else minutes[:-1] or minutes
                    student_cells(bench, objective, seed, some, options.only, paced=options.paced)
    write_page(options.results, list(OBJECTIVES))


if __name__ == "__main__":
    main()
