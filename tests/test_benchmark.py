"""`examples/benchmark.py`: cells are measured once, later seeds do as much as the first, stale runs are refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import benchmark
import benchmark_page
import pytest
from benchmark import Bench, lever_cells, refuse_other, student_cells, teacher_cells
from benchmark_page import is_shown, measure_of, page, read_cells, trained_on, write_page

from bootcli import trainer
from bootcli.config import DistillConfig
from bootcli.pipelines.evaluate import evaluate
from bootcli.store.rundir import RunDir

SMALL = {
    "batch_size": 8,
    "log_every": 1,
    "kd.teacher_steps": 2,
    "kd.buffer": 16,
    "preview_teacher_steps": 2,
    "watch.every": 0,
    "mixed_precision": "no",
}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(benchmark, "OBJECTIVES", {"default": SMALL, "few-step": SMALL | {"refiner.share": 0.25}})
    monkeypatch.setattr(benchmark, "LEVERS", (("default", {}), ("default", {"kd.power": 1.0})))
    monkeypatch.setattr(benchmark, "NFES", (1, 2))
    monkeypatch.setattr(benchmark, "PAIRED", 4)
    monkeypatch.setattr(benchmark, "OWN", 70)
    ticks = count(step=0.5)  # an update takes half a second on any machine
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    return Bench("fashion", tmp_path / "results" / "fashion", tmp_path / "runs", 80, "cpu")


def cell(bench: Bench, name: str) -> dict[str, object]:
    facts: dict[str, object] = json.loads(bench.path(name).read_text())
    return facts


def test_a_benchmark_from_cells_to_page(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        student_cells(bench, "few-step", seed, [0.001, 0.04], "")
    first, later = (cell(bench, f"few-step-seed{seed}-0.04min") for seed in (0, 1))
    assert first["updates"] == later["updates"] == 5
    assert cell(bench, "few-step-seed0-0.001min")["updates"] == 1
    assert [row["nfe"] for row in first["student"]] == [1, 2]  # type: ignore[attr-defined, union-attr]
    assert first["student"] != later["student"]
    assert "| teacher |" not in page("fashion", read_cells(bench.cells), list(benchmark.OBJECTIVES))
    teacher_cells(bench, [2], "")
    assert cell(bench, "teacher-ddim-2")["nfe"] == cell(bench, "teacher-dpmsolver-2")["nfe"] == 2
    assert "| teacher |" in page("fashion", read_cells(bench.cells), list(benchmark.OBJECTIVES))
    kept = bench.runs / "teacher-70.safetensors"
    run = bench.runs / "few-step-seed1"
    again = evaluate(run, num_images=70, reference=str(kept), teacher_steps=(2,), device="cpu")
    paired = evaluate(run, metrics=["paired"], num_images=4, device="cpu")
    assert later["student"][0]["paired_mse"] == pytest.approx(paired["student"]["paired_mse"], rel=1e-4)  # type: ignore[index]
    assert len([*bench.runs.glob("paths-from-*.safetensors")]) == 1
    for row, same in (
        (later["student"][0], again["student"]),  # type: ignore[index]
        (cell(bench, "teacher-ddim-2"), again["teacher"][0]),  # type: ignore[index]
    ):
        assert row["fid_to_teacher"] == pytest.approx(same["fid"], rel=1e-3)  # type: ignore[index]
    lever_cells(bench, 0.01, "power")
    assert cell(bench, "lever-default-kd.power-1.0")["settings"]["kd.power"] == 1.0  # type: ignore[index]
    text = page("fashion", read_cells(bench.cells), list(benchmark.OBJECTIVES))
    assert text.count("| few-step | 0.04 min |") == 2
    assert "in float32, torch" in text
    assert text.count("| FID | FID to its teacher |") == 2
    assert "| DPM-Solver++ 2M | 2 |" in text
    assert "| default | kd.power=1.0 |" in text

    before = {path: path.read_bytes() for path in bench.cells.iterdir()}
    capsys.readouterr()
    student_cells(bench, "few-step", 0, [0.001, 0.04], "")
    assert capsys.readouterr().out.count("already measured") == 2
    assert before == {path: path.read_bytes() for path in bench.cells.iterdir()}

    student_cells(bench, "few-step", 0, [0.04, 0.08], "0.08min", paced=True)
    longer = cell(bench, "few-step-seed0-0.08min")
    assert longer["paced"]
    assert longer["updates"] == 10
    assert "| few-step | 0.08 min * |" in page("fashion", read_cells(bench.cells), list(benchmark.OBJECTIVES))

    for minutes in ("0.04", "0.08"):
        bench.path(f"few-step-seed0-{minutes}min").unlink()
    changed = SMALL | {"refiner.share": 0.25, "batch_size": 16}
    benchmark.OBJECTIVES["few-step"] = changed
    with pytest.raises(SystemExit, match=r"other settings .*batch_size"):
        student_cells(bench, "few-step", 0, [0.04], "")


@pytest.mark.parametrize(
    ("scale", "calls", "title"), [(None, 2, "`fashion-sd`"), (1.0, 1, "`fashion-sd` at guidance scale 1")]
)
def test_calls_of_a_guided_teacher_are_counted_twice(bench: Bench, scale: float | None, calls: int, title: str) -> None:
    guided = dataclasses.replace(bench, teacher="fashion-sd", num_images=16, guidance_scale=scale)
    teacher_cells(guided, [1], "")
    assert cell(bench, "teacher-ddim-1")["nfe"] == cell(bench, "teacher-dpmsolver-1")["nfe"] == calls
    assert f"## {title}\n" in page("folder", read_cells(bench.cells), [])


def test_another_guidance_scale_and_precision_are_the_students_too_and_the_scale_has_a_folder(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, folders = [], []

    def stopped(config: DistillConfig, *_: object, **__: object) -> None:
        said.append((config.guidance_scale, config.mixed_precision))
        raise InterruptedError

    def measured(bench: Bench, *_: object, **__: object) -> None:
        folders.append((bench.cells, bench.runs.name, bench.guidance_scale, bench.mixed_precision))

    monkeypatch.setattr(benchmark, "distill", stopped)
    monkeypatch.setattr(benchmark, "OBJECTIVES", {"default": {}})
    guided = dataclasses.replace(bench, teacher="fashion-sd", guidance_scale=1.5, mixed_precision="no")
    with pytest.raises(InterruptedError):
        student_cells(guided, "default", 0, [0.001], "")
    assert said == [(1.5, "no")]
    monkeypatch.setattr(benchmark, "student_cells", measured)
    monkeypatch.setattr(benchmark, "write_page", lambda *_: None)
    what = ["--teacher", "fashion-sd", "--guidance-scale", "1.5", "--mixed-precision", "no"]
    words = [*what, "--steps=", "--seeds", "1", "--objectives", "kd"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *words, "--results", str(tmp_path)])
    benchmark.main()
    assert folders == [(tmp_path / "fashion-sd-w1.5", "fashion-sd-w1.5", 1.5, "no")]


def test_a_page_says_which_students_had_another_machine() -> None:
    names = {"kd-seed0-5min": ("A", "bf16"), "kd-seed1-5min": ("B", "no"), "boot-seed0-5min": ("A", "bf16")}
    facts = ("cell", "device", "mixed_precision", "torch")
    cells = [dict(zip(facts, (name, *other, "2"), strict=True)) for name, other in names.items()]
    assert trained_on([*cells, {"cell": "teacher-ddim-1", "device": "C"}]) == (
        "; training on A, in bf16, torch 2; kd-seed1-5min on B, in float32, torch 2"
    )


@pytest.mark.parametrize(("scale", "measure"), [(1.0, "fid"), (3.0, "fid_to_teacher")])
def test_curves_of_a_guided_teacher_are_of_the_distance_to_it(scale: float, measure: str) -> None:
    cells: list[dict[str, object]] = [{"cell": "teacher-ddim-1"}, {"settings": {"guidance_scale": scale}}]
    assert measure_of(cells) == measure


def test_curves_leave_out_what_a_teacher_is_from_itself() -> None:
    cells: list[dict[str, object]] = [{"fid_to_teacher": 1e-8}, {"fid_to_teacher": 0.008}, {"fid": 2.0}]
    assert [is_shown(cell, "fid_to_teacher") for cell in cells] == [False, True, False]


@pytest.mark.parametrize(("prompts", "same"), [("elsewhere/prompts.txt", True), ("prompts/others.txt", False)])
def test_a_run_goes_on_in_a_clone_elsewhere(tmp_path: Path, prompts: str, *, same: bool) -> None:
    run = RunDir(tmp_path / "run")
    config = DistillConfig(teacher="fashion-sd", prompts="here/prompts.txt")
    run.create(config, keep=False)
    run.checkpoints.mkdir()
    (run.checkpoints / "step-00000001.safetensors").write_bytes(b"")
    moved = dataclasses.replace(config, prompts=prompts)
    if same:
        refuse_other(run.path, moved)
    else:
        with pytest.raises(SystemExit, match="prompts"):
            refuse_other(run.path, moved)


def test_a_number_that_one_seed_lacks_is_left_out() -> None:
    rows = {"nfe": 1, "fid": 4.0, "recall": 0.5}, {"nfe": 1, "fid": 6.0}
    facts = {"objective": "kd", "minutes": 5, "updates": 7, "settings": {"objective": "boot"}, "teacher": "t"}
    cells = [facts | {"cell": f"kd-{i}", "num_images": 5, "student": [row]} for i, row in enumerate(rows)]
    assert "| kd | 5 min | 7 | 1 | 5.00 ± 1.41 |  | 2 |" in page("kd", cells, ["kd"])


def test_levers_are_sorted_below_the_student_that_they_change() -> None:
    students = (("boot", "late", 3.0), ("boot", "early", 1.0), ("boot", "", 2.0), ("default", "", 0.5))
    shared = {"minutes": 5, "updates": 7, "num_images": 80, "teacher": "fashion", "threads": 1}
    quality = {"precision": 0.8, "recall": 0.7, "paired_mse": 0.01}
    cells = [
        shared | {"cell": f"{base} {lever}", "base": base, "lever": lever, "student": [quality | {"fid": fid}]}
        for base, lever, fid in students
    ]
    lines = page("fashion", cells, []).splitlines()
    assert [line.split(" | ")[:2] for line in lines[-4:]] == [
        ["| boot", ""],
        ["| boot", "early"],
        ["| boot", "late"],
        ["| default", ""],
    ]


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results" / "fashion").mkdir(parents=True)
    for folder in (tmp_path / "results", tmp_path / "missing"):
        with pytest.raises(SystemExit, match=f"{folder.name} holds no cells"):
            write_page(folder, ["kd"])
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_page_without_matplotlib_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "fashion").mkdir()
    (tmp_path / "fashion" / "teacher-ddim-1.json").write_text(json.dumps({"cell": "teacher-ddim-1", "nfe": 1}))
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        write_page(tmp_path, ["kd"])


def test_a_teacher_without_cells_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_page, "save_curves", lambda *_: None)
    results = tmp_path / "results"
    for name in ("fashion", "fashion-sd"):
        (results / name).mkdir(parents=True)
    facts = {"cell": "teacher-ddim-1", "teacher": "fashion", "nfe": 1, "fid": 2.5, "num_images": 80, "torch": "2"}
    (results / "fashion" / "teacher-ddim-1.json").write_text(json.dumps(facts))
    write_page(results, ["kd"])
    text = (tmp_path / "results.md").read_text()
    assert "| DDIM | 1 | 2.50 |" in text
    assert "fashion-sd" not in text
