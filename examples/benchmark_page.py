"""The page of `benchmark.py`: tables and curves of the cells there are. The curves need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bootcli.store.files import read_json


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
        """The numbers of all seeds; none where one of them lacks it."""
        found = [row for cell in self.cells for row in cell["student"] if row["nfe"] == self.nfe]
        return [float(row[key]) for row in found] if all(key in row for row in found) else []

    def text(self, key: str, digits: int) -> str:
        """Their mean, and the standard deviation where there is more than one."""
        values = self.values(key)
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):.{digits}f}{spread}" if values else ""


def rows_of(cells: Sequence[dict[str, Any]], order: Sequence[str]) -> list[Row]:
    """The students' cells, grouped; objectives in their order."""
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for cell in cells:
        if "objective" in cell:
            for row in cell["student"]:
                groups.setdefault((cell["objective"], cell["minutes"], row["nfe"]), []).append(cell)
    return [Row(*key, groups[key]) for key in sorted(groups, key=lambda k: (order.index(k[0]), *k[1:]))]


COLUMNS = {
    "fid": ("FID", 2),
    "fid_to_teacher": ("FID to its teacher", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "accuracy": ("right class", 3),
    "paired_mse": ("paired error", 4),
}
"""The numbers of a row: title and decimals."""


def columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The numbers that some of these rows have."""
    return [name for name in COLUMNS if any(name in row for row in rows)]


def header(first: str, others: Sequence[str]) -> list[str]:
    """The first two lines of a table whose other columns are numbers."""
    return [f"| {first} | {' | '.join(others)} |", f"|---|{'--:|' * len(others)}"]


def page(folder: str, cells: Sequence[dict[str, Any]], order: Sequence[str]) -> str:
    """The section of one teacher, in Markdown."""
    students = [cell for cell in cells if "objective" in cell]
    teachers = [cell for cell in cells if cell["cell"].startswith("teacher-")]
    columns = columns_of([row for cell in students for row in cell["student"]])
    lines = [
        f"## `{cells[0]['teacher']}`{at_scale(cells[0])}", "",
        f"{cells[0]['num_images']:,} images for each number{trained_on(students)}.", "",
        f"![FID against network calls]({folder}/nfe.png) ![FID against training time]({folder}/time.png)", "",
        *header("student", ("training", "updates", "network calls", *(COLUMNS[key][0] for key in columns), "seeds")),
    ]  # fmt: skip
    for row in rows_of(cells, order):
        updates = round(fmean(cell["updates"] for cell in row.cells))
        marks = " *" if any(cell.get("paced") for cell in row.cells) else ""
        numbers = [row.text(key, COLUMNS[key][1]) for key in columns]
        lines.append(
            f"| {row.objective} | {row.minutes:g} min{marks} | {updates:,} | {row.nfe} | {' | '.join(numbers)} | "
            f"{len(row.values('fid'))} |"
        )
    columns = columns_of(teachers)
    if teachers:
        lines += ["", *header("teacher", ("network calls", *(COLUMNS[key][0] for key in columns)))]
    solvers = {"ddim": "DDIM", "heun": "EDM's Heun", "dpmsolver": "DPM-Solver++ 2M"}
    for cell in sorted(teachers, key=lambda cell: (cell["cell"].split("-")[1], cell["nfe"])):
        numbers = [f"{cell[key]:z.{COLUMNS[key][1]}f}" if key in cell else "" for key in columns]
        lines.append(f"| {solvers[cell['cell'].split('-')[1]]} | {cell['nfe']} | {' | '.join(numbers)} |")
    return "\n".join([*lines, *lever_table(cells), ""])


def at_scale(cell: dict[str, Any]) -> str:
    """What the title says of a guidance scale that is not the recipe's."""
    return f" at guidance scale {cell['guidance_scale']:g}" if "guidance_scale" in cell else ""


def trained_on(cells: Sequence[dict[str, Any]]) -> str:
    """The machine, precision and torch of the students; where some had others than most, which and what."""
    where: dict[str, list[str]] = {}
    for cell in cells:
        if "mixed_precision" in cell:
            precision = cell["mixed_precision"].replace("no", "float32")
            where.setdefault(f"{cell['device']}, in {precision}, torch {cell['torch']}", []).append(cell["cell"])
    if not where:
        return ""
    most, *others = sorted(where, key=lambda key: -len(where[key]))
    rest = "".join(f"; {', '.join(where[key])} on {key}" for key in others)
    return f"; training on {most}{rest}"


def lever_table(cells: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each lever, below the student that it changes."""
    levers = [cell for cell in cells if "lever" in cell]
    if not levers:
        return []
    minutes = levers[0]["minutes"]
    lines = [
        "", "### One setting changed at a time", "",
        f"Single runs of {minutes:g} minutes{trained_on(levers)}; threads: {levers[0]['threads']}.",
        "The unchanged student comes first. A corrector begins at once (`correction.start=0`).", "",
        "| student | setting | updates | FID | precision | recall | paired error |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for base in dict.fromkeys(cell["base"] for cell in levers):
        students = (cell for cell in levers if cell["base"] == base)
        for cell in sorted(students, key=lambda c: (c["lever"] != "", float(c["student"][0]["fid"]))):
            row = cell["student"][0]
            quality = " | ".join(f"{row[key]:.3f}" for key in ("precision", "recall"))
            lines.append(
                f"| {base} | {cell['lever']} | {cell['updates']:,} | {row['fid']:.2f} | {quality} | "
                f"{row['paired_mse']:.4f} |"
            )
    return lines


def measure_of(cells: Sequence[dict[str, Any]]) -> str:
    """What the curves show: FID, or of a guided teacher, which is far from real images itself, that to the teacher."""
    scales = (cell.get("settings", {}).get("guidance_scale") for cell in cells)
    return "fid_to_teacher" if any(scale not in (None, 1) for scale in scales) else "fid"


def is_shown(cell: dict[str, Any], measure: str) -> bool:
    """Whether a curve has this teacher: it was measured, and not with itself, which a logarithmic axis cannot show."""
    return float(cell.get(measure, 0.0)) > 1e-4


def save_curves(cells: Sequence[dict[str, Any]], order: Sequence[str], folder: Path) -> None:
    """What `measure_of` says against network calls, and against training time, both axes logarithmic."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("The cells are kept; the page's curves need matplotlib: pip install matplotlib") from None

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, measure = rows_of(cells, order), measure_of(cells)
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    of_teachers = (
        ("ddim", "teacher, DDIM", "k-o"),
        ("heun", "teacher, Heun", "k-o"),
        ("dpmsolver", "teacher, DPM-Solver++", "k:s"),
    )
    for key, label, style in of_teachers:
        some = [c for c in cells if c["cell"].startswith(f"teacher-{key}-") and is_shown(c, measure)]
        line = sorted((c["nfe"], c[measure]) for c in some)
        if line:
            axes.plot(*zip(*line, strict=True), style, label=label, markersize=4)
    for name in order:
        longest = max((r.minutes for r in rows if r.objective == name), default=0)
        some = [r for r in rows if (r.objective, r.minutes) == (name, longest) and r.values(measure)]
        line = [(r.nfe, fmean(r.values(measure))) for r in some]
        if line:
            axes.plot(*zip(*line, strict=True), "-*", label=f"{name}, {longest:g} min", markersize=10)
    calls = {r.nfe for r in rows} | {c["nfe"] for c in cells if c["cell"].startswith("teacher-")}
    finish(axes, "network calls for an image", COLUMNS[measure][0], calls, folder / "nfe.png", figure)

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for name in order:
        some = [r for r in rows if (r.objective, r.nfe) == (name, 1) and r.values(measure)]
        line = [(r.minutes, fmean(r.values(measure))) for r in some]
        if line:
            axes.plot(*zip(*line, strict=True), "-o", label=name)
    for cell in cells:
        lines = ("teacher-ddim-10", "teacher-ddim-50", "teacher-heun-8", "teacher-heun-16", "teacher-heun-50")
        if cell["cell"] in lines and is_shown(cell, measure):
            axes.axhline(cell[measure], color="black", linestyle=":", linewidth=1)
            axes.annotate(f"teacher, {cell['nfe']} calls", (1, cell[measure]), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8)  # fmt: skip
    at = {r.minutes for r in rows}
    finish(axes, "minutes of training", COLUMNS[measure][0], at, folder / "time.png", figure)


def finish(axes: Any, label: str, measure: str, at: set[float], path: Path, figure: Any) -> None:
    """Scales, numbers on them as people write them (what was measured ``at`` below), labels, file."""
    from matplotlib.ticker import LogLocator

    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=measure, xticks=sorted(at))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 1000 * low else (1, 3)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def write_page(folder: Path, order: Sequence[str]) -> None:
    """docs/results.md from all cells of all teachers, of which one may have none yet."""
    cells_of = {path: cells for path in sorted(folder.glob("*")) if path.is_dir() and (cells := read_cells(path))}
    if not cells_of:
        raise SystemExit(f"{folder} holds no cells: measure some first, or name another folder with --results.")
    parts = [
        "# Results", "",
        "Written by `python examples/benchmark.py --page` from the cells in `results/`, one JSON file each.",
        "FID is in the teacher's own feature space and cannot be compared with Inception FID. Precision and recall are",
        "those of Kynkäänniemi et al. 2019 (k = 3). The paired error is the mean square of the student's sample minus",
        "the end of the teacher's own path from the same noise. FID to its teacher is that of 2,000 images to as many",
        "that the teacher draws in 50 steps, from the same noise and for the same conditions: with guidance those are",
        "far from real images, and a student that is near them is too. Minutes are of training alone. Seed 0 is timed",
        "on the machine named; other seeds make as many updates, some on a GPU; ± is the standard deviation over them.",
        "A number that one of them lacks is left out. At a * nothing was timed: updates are in proportion to those of",
        "a shorter time of the run, or of an earlier run.", "",
    ]  # fmt: skip
    for teacher, cells in cells_of.items():
        save_curves(cells, order, teacher)
        parts.append(page(teacher.name, cells, order).replace(f"({teacher.name}/", f"({folder.name}/{teacher.name}/"))
    (folder.parent / f"{folder.name}.md").write_text("\n".join(parts), encoding="utf-8")
