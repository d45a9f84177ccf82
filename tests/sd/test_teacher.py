"""The teacher itself: contract, prompts, latents, and the pipelines of diffusers as a reference."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_sd import family
from bootcli_sd.teacher import build, load
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.plugin import check_teacher
from bootcli.sampler import noises, teacher_images
from bootcli.teachers.registry import resolve
from bootcli.teachers.view import TeacherView

from .conftest import MakeFolder

V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
CLASSES = {False: StableDiffusionPipeline, True: StableDiffusionXLPipeline}


@pytest.mark.parametrize(("scheduler", "xl"), [({}, False), (V, False), ({}, True)])
def test_the_whole_contract(make_folder: MakeFolder, scheduler: dict[str, Any], xl: bool) -> None:
    folder = make_folder(scheduler=scheduler, xl=xl)
    assert family.matches(folder)
    teacher = family.load(folder)
    assert check_teacher(teacher, family)
    assert (teacher.head(), teacher.spec.conditioning) == ("native", "text")


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_its_samples_are_those_of_the_pipeline(make_folder: MakeFolder, xl: bool, guidance_scale: float) -> None:
    """Tokens, embeddings, guidance, DDIM and autoencoder: all as diffusers has them."""
    folder = make_folder(xl=xl)
    teacher = load(folder)
    prompts = ["a red shoe", "a very long prompt that does not fit into the twenty-four tokens"]
    negative = teacher.condition([None])
    view = TeacherView(teacher, guidance_scale, negative if guidance_scale != 1 else None)
    cond_of = lambda seeds: teacher.condition([prompts[seed] for seed in seeds])  # noqa: E731
    (ours,) = teacher_images(view, 5, cond_of, range(2), 2, Engine("cpu", "no"))
    pipeline = CLASSES[xl].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    theirs = pipeline(
        prompts,
        latents=noises(range(2), 1, teacher.spec.sample_shape)[0],
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        eta=0.0,
        output_type="np",
    ).images
    difference = (ours.float() / 255 - torch.from_numpy(theirs).permute(0, 3, 1, 2)).abs()
    assert difference.max() < 0.01


def test_prompts(make_folder: MakeFolder) -> None:
    teacher = load(make_folder())
    empty, none = (teacher.condition([request]).tensors["text"] for request in ("", None))
    assert torch.equal(empty, none)
    assert empty.shape == (1, 24, 16)
    with pytest.raises(UsageError, match="no prompt"):
        teacher.condition([3])
    assert teacher.text.truncated(["short", "x " * 30]) == [1]
    many = teacher.condition([f"number {i}" for i in range(40)]).tensors["text"]
    assert torch.allclose(many[33], teacher.condition(["number 33"]).tensors["text"][0], atol=1e-5)


def test_no_prompt_is_zeros_where_the_pipeline_says_so(make_folder: MakeFolder) -> None:
    cond = load(make_folder(xl=True)).condition(["", None])
    for tensor in cond.tensors.values():
        assert tensor[0].any()
        assert not tensor[1].any()


@pytest.mark.parametrize("how", [{"variant": "fp16"}, {"safe_serialization": False}])
def test_other_files_of_the_same_weights(make_folder: MakeFolder, how: dict[str, Any]) -> None:
    folder = make_folder()
    expected = load(folder)
    shutil.rmtree(folder)
    again = load(make_folder(**how))
    assert all(torch.equal(a, b) for a, b in zip(expected.net.parameters(), again.net.parameters(), strict=True))
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(again.decode(z), expected.vae.decode(z / 0.18215).sample if expected._vae else again.decode(z))


def test_a_student_needs_its_teachers_other_parts(make_folder: MakeFolder) -> None:
    folder = make_folder()
    config = json.loads(json.dumps(load(folder).config()))
    assert torch.equal(
        build(config).condition(["a shoe"]).tensors["text"], load(folder).condition(["a shoe"]).tensors["text"]
    )
    shutil.rmtree(folder)
    gone = build(config)
    for use in (partial(gone.condition, ["a shoe"]), partial(gone.decode, torch.zeros(1, 4, 8, 8))):
        with pytest.raises(BootError, match="is gone"):
            use()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "holds a network of class 'UNet2DModel'"),
        ("unet/config.json", {"in_channels": 9}, "cannot be loaded"),
        ("vae/config.json", {"latent_channels": 16}, "its autoencoder knows 16"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "wild"}, "scheduler"),
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "does not run: controlnet"),
        ("model_index.json", {"text_encoder": [None, None]}, "names no text encoder"),
    ],
)
def test_what_is_no_such_teacher_is_refused(
    make_folder: MakeFolder, part: str, change: dict[str, Any], message: str
) -> None:
    folder = make_folder()
    content = json.loads((folder / part).read_text())
    (folder / part).write_text(json.dumps(content | change))
    with pytest.raises(BootError, match=message):
        load(folder)


def test_a_broken_file_is_one_message(make_folder: MakeFolder) -> None:
    folder = make_folder()
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        path = folder / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        with pytest.raises(BootError, match="cannot be loaded"):
            load(folder).decode(load(folder).condition([""]).tensors["text"].new_zeros(1, 4, 8, 8))
        path.write_bytes(whole)


def test_aliases() -> None:
    assert resolve("sd15").source == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert all(resolve(name).family is family for name in ("sd15", "sd21", "sd21-base", "sdxl"))


def test_export_is_a_pipeline_of_diffusers(make_folder: MakeFolder, tmp_path: Path) -> None:
    from bootcli.pipelines.distill import distill
    from bootcli.pipelines.export import export
    from bootcli.pipelines.settings import resolve_config

    (tmp_path / "prompts.txt").write_text("a red shoe\na green coat\n")
    for xl in (False, True):
        folder = make_folder(xl=xl)
        settings = {"teacher": str(folder), "prompts": str(tmp_path / "prompts.txt"), "steps": 2, "batch_size": 4}
        more = {"device": "cpu", "preview_teacher_steps": 2, "guidance_scale": 3.0}
        list(distill(resolve_config({**settings, **more}, {}, {}), tmp_path / f"run{xl}"))
        exported = export(tmp_path / f"run{xl}", format="diffusers")
        assert exported.max_abs_difference < 1e-4
        card = (exported.output / "README.md").read_text()
        assert "guidance_scale=1" in card
        shutil.rmtree(folder)
