"""`export`: what another program makes of it is what bootcli makes of it, or there is no export."""

from __future__ import annotations

import json
import math
from pathlib import Path

import bootcli_ddpm.export
import pytest
import torch
from safetensors.torch import load_file, save_file

from bootcli import exporters
from bootcli.errors import BootError, UsageError
from bootcli.exporters import formats_of, largest_difference, run_script
from bootcli.pipelines.export import export
from bootcli.sampler import prior_noise
from bootcli.store.artifact import load_student
from bootcli.student import Student
from bootcli.teachers.protocol import Cond


def test_diffusers_runs_the_export(tiny_run: Path) -> None:
    exported = export(tiny_run, format="diffusers")
    assert exported.output == tiny_run / "export" / "diffusers"
    assert exported.max_abs_difference <= 1e-5
    assert "without bootcli" in exported.check
    names = {path.relative_to(exported.output).as_posix() for path in exported.files}
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "README.md", "bootcli.json"} <= names
    facts = json.loads((exported.output / "bootcli.json").read_text())
    assert (facts["nfe"], facts["training_steps"], facts["format"]) == (1, 3, "diffusers")
    assert [path.name for path in exported.output.parent.iterdir()] == ["diffusers"], "nothing temporary is left"

    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(exported.output)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(1, torch.Generator().manual_seed(5), num_inference_steps=1, output_type="np").images
    with torch.no_grad():
        ours = load_student(tiny_run).student.sample(prior_noise([5], (1, 8, 8)), Cond())
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    torch.testing.assert_close(theirs * 2 - 1, ours.clamp(-1, 1), rtol=0, atol=1e-5)


def test_a_class_conditional_export(class_run: Path, tmp_path: Path) -> None:
    assert export(class_run, format="diffusers", output=tmp_path / "out").max_abs_difference <= 1e-5


def test_a_writer_that_changes_the_student_is_caught(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = bootcli_ddpm.export.write_diffusers

    def careless(teacher: object, net: object, head: object, folder: Path) -> None:
        write(teacher, net, head, folder)  # type: ignore[arg-type]
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["conv_out.bias"] += 3e-4
        save_file(tensors, path, {"format": "pt"})

    monkeypatch.setattr(bootcli_ddpm.export, "write_diffusers", careless)
    with pytest.raises(BootError, match=r"differ by 0\.0003"):
        export(tiny_run, format="diffusers", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_bare_network(tiny_run: Path, tmp_path: Path) -> None:
    exported = export(tiny_run, format="safetensors", output=tmp_path / "out")
    assert exported.max_abs_difference == 0
    assert [path.name for path in exported.files] == ["README.md", "bootcli.json", "network.safetensors"]
    assert "one-step" in (tmp_path / "out" / "README.md").read_text()
    tensors = load_file(tmp_path / "out" / "network.safetensors")
    expected = load_student(tiny_run).student.net.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_without_a_name_the_format_is_the_familys(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = load_student(tiny_run)
    assert [*formats_of(artifact)] == ["diffusers", "safetensors"]
    monkeypatch.setattr(type(artifact.student.teacher), "export_formats", lambda self: {})
    assert [*formats_of(artifact)] == ["safetensors"]


def test_a_damaged_network_is_caught(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters, "write_tensors", lambda path, tensors, header: path.write_bytes(b"broken"))
    with pytest.raises(BootError, match="damaged"):
        export(tiny_run, format="safetensors", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_replaced_only_on_demand(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        export(tiny_run, format="safetensors", output=out, overwrite=True)
    with pytest.raises(UsageError, match="not empty"):
        export(tiny_run, format="safetensors", output=out)
    (out / "bootcli.json").unlink()
    with pytest.raises(UsageError, match=r"has no bootcli\.json"):
        export(tiny_run, format="safetensors", output=out, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        export(tiny_run, format="safetensors", output=out / "network.safetensors")


def test_usage_errors(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="onnyx") as caught:
        export(tiny_run, format="onnyx")
    assert "diffusers, safetensors" in caught.value.hint
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="working folder"):
        export(tiny_run, format="safetensors", output=Path())


@pytest.fixture
def student(tiny_run: Path) -> Student:
    return load_student(tiny_run).student


def test_every_output_counts(student: Student) -> None:
    with torch.no_grad():
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        sample = student.sample(noise, Cond())
    given: list[torch.Tensor] = []

    def run(inputs: exporters.Tensors) -> dict[str, torch.Tensor]:
        given.append(inputs["noise"])
        return {"sample": sample, "images": sample.clamp(-1, 1) + 0.5}

    assert largest_difference(student, Cond(), run) == pytest.approx(0.5)
    assert torch.equal(given[0], noise), "torch.manual_seed(0) draws it again"
    broken = {"images": sample.clamp(-1, 1), "sample": sample * torch.nan}
    assert math.isnan(largest_difference(student, Cond(), lambda inputs: broken))
    for outputs in ({}, {"images": sample}, {"sample": sample[:1]}):
        with pytest.raises(BootError, match="not samples of shape"):
            largest_difference(student, Cond(), lambda inputs, outputs=outputs: outputs)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import bootcli.errors", "bootcli"),
        ("raise ValueError('does not fit')", "does not fit"),
        ("raise SystemExit(3)", "exit code 3"),
        ("pass", "no outputs"),
    ],
)
def test_scripts_that_fail(tmp_path: Path, code: str, message: str) -> None:
    script = tmp_path / "check.py"
    script.write_text(code)
    with pytest.raises(BootError, match=message):
        run_script(script, tmp_path, {"noise": torch.zeros(1)})


def test_a_script_gets_its_arguments_and_no_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "check.py"
    (tmp_path / "neighbour.py").write_text("")
    monkeypatch.chdir(tmp_path)
    script.write_text(
        "import importlib.util, shutil, sys\n"
        "assert importlib.util.find_spec('neighbour') is None\n"
        "_, folder, inputs, outputs = sys.argv\n"
        f"assert folder == {str(tmp_path)!r} and __name__ == '__main__'\n"
        "shutil.copy(inputs, outputs)\n"
    )
    noise = torch.arange(3.0)
    assert torch.equal(run_script(script, tmp_path, {"noise": noise})["noise"], noise)
