"""How good one step is: students of every objective against their teacher, at 5, 20 and 60 minutes of training.

    python examples/benchmark.py                  # everything that is not measured yet; stop it and go on at will
    python examples/benchmark.py --only kd        # the cells whose name contains "kd"
    python examples/benchmark.py --page           # write docs/results.md and its curves from the cells there are

Each cell is one JSON file in docs/results/<teacher>/, written once. A student is trained in one run: its state after 5
minutes is kept going to 20 and to 60, so the learning rate has to be constant; what counts is training time alone,
without previews and scores. Run it on an idle machine. The curves need matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from bootcli import __version__
from bootcli.config import resolve
from bootcli.engine import Engine
from bootcli.evaluate import features_of, frechet, gaussian_fit
from bootcli.images import to_uint8
from bootcli.manifold import MOST_ROWS, manifold_of, precision_recall, some_rows
from bootcli.maths.schedule import DiscreteVP
from bootcli.pipelines.distill import distill
from bootcli.pipelines.evaluate import evaluate
from bootcli.pipelines.settings import resolve_config
from bootcli.pipelines.setup import condition_of, teacher_view
from bootcli.reference import reference_for
from bootcli.sampler import prior_noise, teacher_images
from bootcli.store.files import read_json, write_json
from bootcli.store.rundir import RunDir
from bootcli.teachers.registry import load
from bootcli.teachers.view import TeacherView

ROOT = Path(__file__).parents[1]
STEPS = (1, 2, 4, 8, 10, 16, 25, 50)
MINUTES = (5, 20, 60)
NFES = (1, 2, 4)
OBJECTIVES: dict[str, dict[str, object]] = {
    "default": {},
    "boot": {"objective": "boot", "corrector": False},
    "freeflow": {"objective": "freeflow", "corrector": True},
    "kd": {"objective": "kd", "corrector": False},
}
"""What each student is trained on; all else is the teacher's recipe. boot and kd are plain: without corrector."""
ENDLESS = {"steps": 10_000_000, "optimizer.decay": "constant", "preview_every": 0, "checkpoint_every": 0}


@dataclass(frozen=True)
class Bench:
    """Where cells go, and what they are measured with.

    Args:
        teacher: name or folder.
        cells: folder of the JSON files.
        runs: folder of the runs.
        num_images: for each number.
        device: where to compute.
    """

    teacher: str
    cells: Path
    runs: Path
    num_images: int
    device: Any

    def cell(self, name: str, measure: Callable[[], dict[str, object]]) -> None:
        """Measure a cell unless it is there already."""
        path = self.cells / f"{name}.json"
        if path.exists():
            print(f"{name}: already measured")
            return
        result = measure()
        write_json(path, {"cell": name, **result, **self._facts()})
        shown = result.get("student", [result])
        print(name, *(f"{row['nfe']} NFE: FID {row['fid']:.3f}" for row in shown), flush=True)  # type: ignore[union-attr]

    def _facts(self) -> dict[str, object]:
        return {
            "teacher": self.teacher,
            "num_images": self.num_images,
            "bootcli": __version__,
            "torch": torch.__version__,
            "processor": processor(),
            "threads": torch.get_num_threads(),
        }


def processor() -> str:
    """Its name, and the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {cores} cores"


def teacher_cells(bench: Bench, steps: Sequence[int], only: str) -> None:
    """The teacher under DDIM and DPM-Solver++ at each number of steps."""
    config = resolve({"teacher": bench.teacher, "device": bench.device})
    engine = Engine(config.device, "no")
    teacher = load(config.teacher).teacher
    view = teacher_view(teacher, config, engine)
    reference = reference_for(teacher, None, engine.device, with_features=True)
    assert reference.features is not None
    rows = min(bench.num_images, MOST_ROWS, len(reference.features))
    real = manifold_of(some_rows(reference.features, rows))
    cond_of = condition_of(teacher, config)
    seeds = range(bench.num_images)

    def score(batches: Iterator[Tensor], nfe: int) -> dict[str, object]:
        features = features_of(batches, reference.network, engine.device)
        quality = precision_recall(real, manifold_of(some_rows(features, rows)))
        fid = frechet(gaussian_fit(features), reference.statistics)
        return {"nfe": nfe, "fid": fid, "precision": quality.precision, "recall": quality.recall}

    for n in steps:
        if only in (name := f"teacher-ddim-{n}"):
            bench.cell(name, lambda n=n: score(teacher_images(view, n, cond_of, seeds, 250, engine), n))  # type: ignore[misc]
        if only in (name := f"teacher-dpmsolver-{n}") and isinstance(view.schedule, DiscreteVP):
            bench.cell(name, lambda n=n: score(dpm_solver_images(view, n, cond_of, seeds, 250, engine), n))  # type: ignore[misc]


@torch.no_grad()
def dpm_solver_images(
    view: TeacherView, steps: int, cond_of: Any, seeds: Sequence[int], batch_size: int, engine: Engine
) -> Iterator[Tensor]:
    """Samples of diffusers' DPM-Solver++ (2M, trailing steps) of the same denoiser, as uint8 batches on the CPU."""
    schedule = view.schedule
    assert isinstance(schedule, DiscreteVP)
    cumprod = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    betas = 1 - cumprod / torch.cat([torch.ones(1, dtype=torch.float64), cumprod[:-1]])
    solver = DPMSolverMultistepScheduler(
        schedule.num_timesteps, trained_betas=betas.numpy(), prediction_type="sample", timestep_spacing="trailing",
        algorithm_type="dpmsolver++", final_sigmas_type="zero",
    )  # fmt: skip
    for first in range(0, len(seeds), batch_size):
        rows = seeds[first : first + batch_size]
        x, cond = prior_noise(rows, view.teacher.spec.sample_shape).to(engine.device), cond_of(rows).to(engine.device)
        solver.set_timesteps(steps)
        for timestep in solver.timesteps:
            t = torch.full((len(x),), (float(timestep) + 1) / schedule.num_timesteps, dtype=torch.float64)
            x = solver.step(view.x0(x, t, cond), timestep, x, return_dict=False)[0]
        yield to_uint8(view.teacher.decode(x)).cpu()


def student_cells(bench: Bench, name: str, seed: int, minutes: Sequence[float], only: str) -> None:
    """One run, scored on its way."""
    run = bench.runs / f"{name}-seed{seed}"
    for limit in minutes:
        cell = f"{name}-seed{seed}-{limit:g}min"
        if only in cell:
            bench.cell(cell, lambda limit=limit: trained(bench, run, name, seed, limit))  # type: ignore[misc]


def trained(bench: Bench, run: Path, name: str, seed: int, minutes: float) -> dict[str, object]:
    """Train to ``minutes`` and score."""
    settings = {"teacher": bench.teacher, "seed": seed, "device": bench.device, **ENDLESS, **OBJECTIVES[name]}
    config = resolve_config({**settings, "max_minutes": float(minutes)}, {}, {})
    resume = RunDir(run).config_file.exists()
    for _ in distill(config, run, resume=resume):
        pass
    nfes = NFES if config.refiner.share else NFES[:1]
    result: dict[str, Any] = evaluate(
        run, metrics=("fid", "pr", "paired"), num_images=bench.num_images, nfe=nfes, batch_size=250, device=bench.device
    )
    last = json.loads(RunDir(run).log_file.read_text().splitlines()[-1])
    keep = ("nfe", "fid", "precision", "recall", "paired_mse")
    return {
        "objective": name,
        "seed": seed,
        "minutes": minutes,
        "updates": result["training_steps"],
        "loss": last["loss"],
        "residual": last["residual"],
        "student": [
            {key: row[key] for key in keep if key in row}
            for row in (result["student"], *result["student_in_more_calls"])
        ],
    }


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Every measured cell, by name."""
    return [read_json(path) for path in sorted(folder.glob("*.json"))]


@dataclass(frozen=True)
class Row:
    """One line of the table of students: the same run at different seeds."""

    objective: str
    minutes: float
    nfe: int
    cells: Sequence[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        """The numbers of all seeds."""
        found = (row for cell in self.cells for row in cell["student"] if row["nfe"] == self.nfe)
        return [float(row[key]) for row in found if key in row]

    def text(self, key: str, digits: int) -> str:
        """Their mean, and the standard deviation where there is more than one."""
        values = self.values(key)
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):.{digits}f}{spread}" if values else ""


def rows_of(cells: Sequence[dict[str, Any]]) -> list[Row]:
    """The students' cells, grouped."""
    keys = sorted(
        {(c["objective"], c["minutes"], r["nfe"]) for c in cells if "objective" in c for r in c["student"]},
        key=lambda key: (list(OBJECTIVES).index(key[0]), key[1], key[2]),
    )
    return [
        Row(*key, [c for c in cells if (c.get("objective"), c.get("minutes")) == key[:2]]) for key in keys
    ]  # fmt: skip


def page(teacher: str, cells: Sequence[dict[str, Any]]) -> str:
    """The section of one teacher, in Markdown."""
    facts = cells[0]
    lines = [
        f"## `{teacher}`", "",
        f"{facts['num_images']:,} images for each number; {facts['processor']}; torch {facts['torch']}.", "",
        f"![FID against network calls]({teacher}/nfe.png) ![FID against training time]({teacher}/time.png)", "",
        "| student | training | updates | network calls | FID | precision | recall | paired error | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in rows_of(cells):
        updates = round(fmean(cell["updates"] for cell in row.cells))
        numbers = (row.text("fid", 2), row.text("precision", 3), row.text("recall", 3), row.text("paired_mse", 4))
        lines.append(
            f"| {row.objective} | {row.minutes:g} min | {updates:,} | {row.nfe} | {' | '.join(numbers)} | "
            f"{len(row.values('fid'))} |"
        )
    lines += ["", "| teacher | network calls | FID | precision | recall |", "|---|--:|--:|--:|--:|"]
    solvers = {"ddim": "DDIM", "dpmsolver": "DPM-Solver++ 2M"}
    teachers = [cell for cell in cells if cell["cell"].startswith("teacher-")]
    for cell in sorted(teachers, key=lambda cell: (cell["cell"].split("-")[1], cell["nfe"])):
        solver = solvers[cell["cell"].split("-")[1]]
        lines.append(
            f"| {solver} | {cell['nfe']} | {cell['fid']:.2f} | {cell['precision']:.3f} | {cell['recall']:.3f} |"
        )
    return "\n".join([*lines, ""])


def save_curves(cells: Sequence[dict[str, Any]], folder: Path) -> None:
    """FID against network calls, and against training time, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, longest = rows_of(cells), max((c["minutes"] for c in cells if "minutes" in c), default=0)
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for key, label, style in (("ddim", "teacher, DDIM", "k-o"), ("dpmsolver", "teacher, DPM-Solver++", "k:s")):
        line = sorted((c["nfe"], c["fid"]) for c in cells if c["cell"].startswith(f"teacher-{key}-"))
        if line:
            axes.plot(*zip(*line, strict=True), style, label=label, markersize=4)
    for name in OBJECTIVES:
        line = [(r.nfe, fmean(r.values("fid"))) for r in rows if (r.objective, r.minutes) == (name, longest)]
        if line:
            axes.plot(*zip(*line, strict=True), "-*", label=f"{name}, {longest:g} min", markersize=10)
    finish(axes, "network calls for an image", folder / "nfe.png", figure)

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for name in OBJECTIVES:
        line = [(r.minutes, fmean(r.values("fid"))) for r in rows if (r.objective, r.nfe) == (name, 1)]
        if line:
            axes.plot(*zip(*line, strict=True), "-o", label=name)
    for cell in cells:
        if cell["cell"] in ("teacher-ddim-10", "teacher-ddim-50"):
            axes.axhline(cell["fid"], color="black", linestyle=":", linewidth=1)
            axes.annotate(f"teacher, {cell['nfe']} steps", (1, cell["fid"]), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8)  # fmt: skip
    finish(axes, "minutes of training", folder / "time.png", figure)


def finish(axes: Any, label: str, path: Path, figure: Any) -> None:
    """Scales, labels, file."""
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="FID")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def write_page(folder: Path) -> None:
    """docs/results.md from all cells of all teachers."""
    parts = [
        "# Results", "",
        "Written by `python examples/benchmark.py --page` from the cells in `results/`, one JSON file each.",
        "FID is in the teacher's own feature space and cannot be compared with Inception FID. Precision and recall are",
        "those of Kynkäänniemi et al. 2019 (k = 3). The paired error is the mean square of the student's sample minus",
        "the end of the teacher's own path from the same noise. Minutes are of training alone, on the machine named;",
        "± is the standard deviation over seeds.", "",
    ]  # fmt: skip
    for teacher in sorted(path for path in folder.iterdir() if path.is_dir()):
        cells = read_cells(teacher)
        save_curves(cells, teacher)
        parts.append(page(teacher.name, cells).replace(f"({teacher.name}/", f"({folder.name}/{teacher.name}/"))
    (folder.parent / f"{folder.name}.md").write_text("\n".join(parts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Students of every objective against their teacher.")
    parser.add_argument("--teacher", default="fashion")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="of the teacher")
    parser.add_argument("--minutes", default=",".join(map(str, MINUTES)), help="of training, rising")
    parser.add_argument("--seeds", type=int, default=3, help="how many; beyond the first only to the middle time")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    if not options.page:
        name = Path(options.teacher).name
        bench = Bench(
            options.teacher, options.results / name, options.runs / name, options.num_images, options.device
        )  # fmt: skip
        teacher_cells(bench, [int(n) for n in options.steps.split(",") if n], options.only)
        minutes = [float(m) for m in options.minutes.split(",")]
        for seed in range(options.seeds):
            for objective in options.objectives.split(","):
                some = minutes if seed == 0 else minutes[:-1] or minutes
                student_cells(bench, objective, seed, some, options.only)
    write_page(options.results)


if __name__ == "__main__":
    main()
