"""Students that take the guidance scale, in the place that diffusers has for it."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_sd import check_diffusers
from bootcli_sd.teacher import embed_guidance, load
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from bootcli.config import resolve
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.exporters import Tensors, formats_of, largest_difference
from bootcli.pipelines import export as exporting
from bootcli.pipelines.distill import distill
from bootcli.pipelines.estimate import dry_run
from bootcli.pipelines.evaluate import evaluate
from bootcli.pipelines.export import export
from bootcli.pipelines.sample import sample
from bootcli.pipelines.settings import resolve_config, resume_config
from bootcli.pipelines.setup import set_up
from bootcli.prompts import Prompt, Prompts
from bootcli.sampler import prior_noise
from bootcli.store.artifact import load_student
from bootcli.student import Student
from bootcli.trainer import Trainer

from .conftest import MakeFolder

LIMITS = (1.5, 6.0)
CLASSES = {False: StableDiffusionPipeline, True: StableDiffusionXLPipeline}


def test_w_is_embedded_as_diffusers_does() -> None:
    w = torch.tensor([1.0, 1.5, 3.7, 7.5, 14.0])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=256)  # type: ignore[arg-type]
    assert torch.equal(embed_guidance(w), theirs)


@pytest.mark.parametrize("xl", [False, True])
def test_the_input_has_no_effect_at_first(make_folder: MakeFolder, xl: bool) -> None:
    teacher = load(make_folder(xl=xl))
    eps, cond = prior_noise(range(2), teacher.spec.sample_shape), teacher.condition(["a shoe", "a coat"])
    student, plain = Student(teacher, "native", 0.0, guidance_range=LIMITS), Student(teacher, "native", 0.0)
    guided = dataclasses.replace(cond, guidance=torch.tensor(LIMITS))
    assert torch.equal(student.sample(eps, guided), plain.sample(eps, cond))
    assert teacher.net.config.time_cond_proj_dim is None
    with torch.no_grad():
        student.net.get_parameter("time_embedding.cond_proj.weight").normal_()
    low, high = student.sample(eps[:1].expand(2, -1, -1, -1), guided.rows(torch.tensor([0, 1])))
    assert not torch.allclose(low, high)


def run_of(folder: Path, run: Path, **more: object) -> Path:
    (run.parent / "prompts.txt").write_text("a red shoe\na green coat\n")
    settings = {"teacher": str(folder), "prompts": str(run.parent / "prompts.txt"), "steps": 4, "batch_size": 4}
    few = {"device": "cpu", "preview_teacher_steps": 2, "guidance_range": LIMITS, "watch.every": 0}
    quick = {"learning_rate": 0.05, "optimizer.warmup_steps": 1}
    list(distill(resolve_config({**settings, **few, **quick, **more}, {}, {}), run))
    return run


@pytest.mark.parametrize("xl", [False, True])
def test_the_export_takes_w(make_folder: MakeFolder, tmp_path: Path, xl: bool) -> None:
    artifact, folder = load_student(run_of(make_folder(xl=xl), tmp_path / "run")), tmp_path / "export"
    student = artifact.student
    assert student.guidance_range == LIMITS
    cond = student.teacher.condition(["a red shoe", "a green coat"])
    eps = prior_noise([0, 1], student.teacher.spec.sample_shape)
    low, high = (student.sample(eps, dataclasses.replace(cond, guidance=torch.full((2,), w))) for w in LIMITS)
    assert (low - high).abs().max() > 1e-3, "it has learned something of w"
    formats_of(artifact)["diffusers"].write(artifact, folder)
    card = (folder / "README.md").read_text()
    assert "a guidance scale from 1.5 to 6" in card
    assert "guidance_scale=3.75" in card
    pipeline = CLASSES[xl].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    once = {"num_inference_steps": 1, "latents": eps, "output_type": "latent"}
    for w, ours in zip(LIMITS, (low, high), strict=True):
        theirs = pipeline(["a red shoe", "a green coat"], guidance_scale=w, **once).images
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)

    def run(inputs: Tensors) -> Tensors:
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, tmp_path / "inputs")
        check_diffusers.main(str(folder), str(tmp_path / "inputs"), str(tmp_path / "outputs"))
        return load_file(tmp_path / "outputs")

    both = dataclasses.replace(cond, guidance=torch.tensor(LIMITS))
    assert largest_difference(student, both, run) < 1e-4
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["time_embedding.cond_proj.weight"].zero_()
    save_file(tensors, file, {"format": "pt"})
    assert largest_difference(student, both, run) > 1e-3, "a writer that loses w is caught"


def test_images_of_a_w(make_folder: MakeFolder, tmp_path: Path) -> None:
    run = run_of(make_folder(), tmp_path / "run")

    def told(folder: str, **asked: Any) -> dict[str, str]:
        drawn = sample(run, num_images=2, device="cpu", **asked)
        assert drawn.output == run / "samples" / folder
        with Image.open(drawn.files[0]) as image:
            facts = dict(image.text)  # type: ignore[attr-defined]
            return {"w": facts["guidance_scale"], "nfe": facts["nfe"], "pixels": image.tobytes().hex()}

    middle, weak, strong = told(""), told("guidance-1.5", guidance_scale=1.5), told("guidance-6", guidance_scale=6.0)
    assert [each["w"] for each in (middle, weak, strong)] == ["3.75", "1.5", "6.0"]
    assert len({each["pixels"] for each in (middle, weak, strong)}) == 3
    assert told("", guidance_scale=None) == middle
    asked = {"teacher_steps": 3, "guidance_scale": 6.0}
    teacher, other = (told(f"teacher-3-steps/guidance-{w}", **asked | {"guidance_scale": w}) for w in (6, 2))
    assert (teacher["w"], teacher["nfe"]) == ("6", "6")
    assert teacher["pixels"] != other["pixels"]
    few = {"metrics": ("paired",), "num_images": 2, "device": "cpu"}
    errors = [evaluate(run, **few, guidance_scale=w)["student"] for w in (None, 1.5)]  # type: ignore[arg-type]
    assert errors[0] != errors[1]
    for of in (sample, evaluate):
        with pytest.raises(UsageError, match=r"takes a w from 1\.5 to 6"):
            of(run, num_images=2, device="cpu", guidance_scale=7.0)


def test_a_run_of_prompts_is_asked_for_everything(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Prompts with seeds and negative ones of their own, a size, and a w: each request has a folder of its own."""
    lines = ['{"prompt": "a red shoe", "seed": 5}', '{"prompt": "a coat", "negative_prompt": "blue"}']
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    own = {"prompts": str(tmp_path / "own.jsonl"), "resolution": (24, 16), "preview_every": 2}
    run = run_of(make_folder(), tmp_path / "run", **own)
    asked = {"prompts": Prompts([Prompt("a hat")]), "resolution": (16, 16), "guidance_scale": 2.5, "device": "cpu"}
    drawn = [sample(run, **asked, teacher_steps=steps) for steps in (None, 2)]  # type: ignore[arg-type]
    folders = [str(each.output.relative_to(run / "samples")) for each in drawn]
    assert folders[0].startswith("16x16/guidance-2.5/a-hat-")
    assert folders[1] == f"teacher-2-steps/{folders[0]}"
    with Image.open(drawn[0].files[0]) as image:
        assert image.size == (16, 16)
        assert image.text["guidance_scale"] == "2.5"  # type: ignore[attr-defined]
    assert export(run, format="diffusers").max_abs_difference < 1e-4


def test_what_a_run_will_do_is_shown(make_folder: MakeFolder, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red shoe\n")
    settings = {"teacher": str(make_folder()), "prompts": str(tmp_path / "prompts.txt"), "batch_size": 4}
    guidance = {"guidance_range": LIMITS, "guidance.rescale": 0.5, "guidance.interval": (0.1, 0.9)}
    shown = dry_run(resolve_config({**settings, "device": "cpu"}, guidance, {}))
    words = "w from 1.5 to 6, which the student takes, rescaled by 0.5, at noise levels 0.1 to 0.9"
    assert shown.facts["guidance"] == words
    assert shown.config["guidance_range"] == LIMITS
    baked = dry_run(resolve_config({**settings, "device": "cpu", "guidance_scale": 3.0}, {}, {}))
    assert baked.facts["guidance"] == "w = 3"
    assert "guidance" not in dry_run(resolve_config({**settings, "device": "cpu"}, {}, {})).facts


def test_a_format_without_a_place_for_w_is_refused(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(make_folder(), tmp_path / "run")
    assert export(run, format="safetensors").max_abs_difference == 0
    assert "a guidance scale from 1.5 to 6" in (run / "export" / "safetensors" / "README.md").read_text()
    facts = json.loads((run / "export" / "safetensors" / "bootcli.json").read_text())
    assert facts["guidance_range"] == list(LIMITS)
    formats = {
        name: dataclasses.replace(one, takes_guidance=False) for name, one in formats_of(load_student(run)).items()
    }
    monkeypatch.setattr(exporting, "formats_of", lambda artifact: formats)
    with pytest.raises(UsageError, match="no place for the guidance scale"):
        export(run, format="diffusers")


def test_a_student_of_either_kind_starts_its_own(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder()
    run = run_of(folder, tmp_path / "run")
    run_of(folder, tmp_path / "again", init_from=str(run))
    with pytest.raises(UsageError, match="its student takes w as an input, and this run's has w built in"):
        run_of(folder, tmp_path / "baked", init_from=str(run), guidance_range=None)
    with pytest.raises(UsageError, match="cannot change guidance_range"):
        resume_config(run, {"guidance_range": (2, 8)}, {}, {})


def test_it_trains_with_all_parts_resumes_bit_for_bit_and_splits(make_folder: MakeFolder) -> None:
    folder, prompts = make_folder(), Prompts([Prompt("a red shoe"), Prompt("a green coat", "blue")])

    def trainer(**more: object) -> Trainer:
        parts = {
            "objective": "boot",
            "corrector": True,
            "replay.share": 0.25,
            "replay.adversary": 0.1,
            "replay.points": 1,
        }
        soon = {"refiner.share": 0.125, "correction.warmup": 0, "adversary.warmup": 0, "replay.teacher_steps": 2}
        guided = {"guidance_range": LIMITS, "guidance.one_batch": False, "guidance.rescale": 0.7}
        run = {"steps": 4, "batch_size": 16, "optimizer.warmup_steps": 1, "learning_rate": 1e-3, "student.head": "x0"}
        config = resolve({**parts, **soon, **guided, **run, **more})
        work = set_up(load(folder), config, Engine("cpu", "no"), prompts=prompts)
        return Trainer(work, work.config, Engine("cpu", "no"))

    whole, resumed, split = trainer(), trainer(), trainer(**{"optimizer.accumulation": 2})
    reports = whole.run()
    losses = [next(reports).loss, next(reports).loss]
    resumed.load_state(*copy.deepcopy(whole.state()))
    losses += [report.loss for report in reports]
    assert [report.loss for report in resumed.run()] == losses[2:]
    assert all(torch.equal(whole.state()[0][name], tensor) for name, tensor in resumed.state()[0].items())
    assert [report.loss for report in split.run()] == pytest.approx(losses, rel=0.02)


def test_a_latent_consistency_model_is_no_teacher(make_folder: MakeFolder) -> None:
    with pytest.raises(BootError, match="takes the guidance scale as an input"):
        load(make_folder(unet={"time_cond_proj_dim": 32}))


def test_a_recipe_gives_way(make_folder: MakeFolder) -> None:
    """Either way of giving w wins over the other in the teacher's recipe."""
    folder = make_folder()
    (folder / "recipe.json").write_text('{"guidance_scale": 7.5}')
    config = resolve_config({"teacher": str(folder), "guidance_range": LIMITS}, {}, {})
    assert (config.guidance_scale, config.guidance_range) == (1.0, LIMITS)
    (folder / "recipe.json").write_text('{"guidance_range": [2, 8]}')
    assert resolve_config({"teacher": str(folder)}, {}, {}).guidance_range == (2, 8)
    config = resolve_config({"teacher": str(folder)}, {"guidance_scale": 1.0}, {})
    assert (config.guidance_scale, config.guidance_range) == (1.0, None)
