"""The teacher itself: contract, prompts, latents, and the pipelines of diffusers as a reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_sd import family
from bootcli_sd.teacher import PACKAGE, build, load
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from bootcli.config import DistillConfig
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.maths.guidance import guide
from bootcli.maths.prediction import to_x0
from bootcli.pipelines.requests import of_prompts
from bootcli.plugin import check_teacher
from bootcli.prompts import Prompt
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


def test_a_network_without_a_middle(make_folder: MakeFolder) -> None:
    """As small students of Stable Diffusion are (BK-SDM-Tiny)."""
    teacher = family.load(make_folder(unet={"mid_block_type": None}))
    assert check_teacher(teacher, family)
    assert len(teacher.feature_layers(teacher.net)) == 2


def test_a_network_that_takes_classes_too_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(BootError, match="conditioned on more than text"):
        load(make_folder(unet={"num_class_embeds": 3}))


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
    assert (ours[0].float() - ours[1].float()).abs().max() > 3 * 255 * 0.01  # what is drawn depends on the prompt
    difference = (ours.float() / 255 - torch.from_numpy(theirs).permute(0, 3, 1, 2)).abs()
    assert difference.max() < 0.01


def test_prompts(make_folder: MakeFolder) -> None:
    teacher = load(make_folder())
    empty, none = (teacher.condition([request]).tensors["text"] for request in ("", None))
    assert torch.equal(empty, none)
    assert empty.shape == (1, 24, 16)
    with pytest.raises(UsageError, match="no prompt"):
        teacher.condition([3])
    assert teacher.too_long(["short", "x " * 30]) == [1]
    many = teacher.condition([f"number {i}" for i in range(40)]).tensors["text"]
    assert torch.allclose(many[33], teacher.condition(["number 33"]).tensors["text"][0], atol=1e-5)


def test_no_prompt_is_zeros_where_the_pipeline_says_so(make_folder: MakeFolder) -> None:
    cond = load(make_folder(xl=True)).condition(["", None])
    for tensor in cond.tensors.values():
        assert tensor[0].any()
        assert not tensor[1].any()


def as_pickles(folder: Path) -> None:
    for file in list(folder.rglob("*.safetensors")):
        stem = "pytorch_model" if file.parent.name.startswith("text_encoder") else file.stem
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()


def as_fp16(folder: Path) -> None:
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))


@pytest.mark.parametrize("change", [as_pickles, as_fp16])
def test_other_files_of_the_same_weights(make_folder: MakeFolder, change: Callable[[Path], None]) -> None:
    folder = make_folder()
    before, z = load(folder), torch.randn(6, 4, 8, 8)
    expected = before.condition(["a shoe"]).tensors["text"], before.decode(z)
    change(folder)
    again = load(folder)
    assert all(torch.equal(a, b) for a, b in zip(before.net.parameters(), again.net.parameters(), strict=True))
    text = again.condition(["a shoe"]).tensors["text"]
    assert text.dtype == torch.float32
    assert torch.equal(text, expected[0])
    assert torch.allclose(again.decode(z), expected[1], atol=1e-5)


def test_each_prompt_has_its_own_negative(make_folder: MakeFolder) -> None:
    teacher = load(make_folder())
    config = DistillConfig(guidance_scale=3.0, negative_prompt="grey")
    cond = of_prompts(teacher, config, [Prompt("a shoe"), Prompt("a coat", "red"), Prompt("a hat", "")])
    negative = teacher.condition(["grey", "red", ""])
    assert cond.negative is not None
    assert torch.allclose(cond.negative.tensors["text"], negative.tensors["text"], atol=1e-5)
    x, t = torch.randn(3, 4, 8, 8), torch.full((3,), 0.6, dtype=torch.float64)
    guided = TeacherView(teacher, 3.0, teacher.condition(["not this"])).x0(x, t, cond)
    with torch.no_grad():
        each = [teacher.predict(teacher.net, x, t, which) for which in (cond, negative)]
    expected = to_x0("eps", guide(*each, 3.0), x, teacher.spec.schedule(t))
    assert torch.allclose(guided, expected, atol=1e-4)
    shuffled = cond.rows(torch.tensor([2, 0])).to(torch.device("cpu"))
    assert shuffled.negative is not None
    assert torch.equal(shuffled.negative.tensors["text"], cond.negative.tensors["text"][[2, 0]])
    assert of_prompts(teacher, DistillConfig(), [Prompt("a shoe", "red")]).negative is None


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


def test_a_student_of_the_embedded_teacher_survives_a_new_installation() -> None:
    """What it keeps is the place in the package, wherever that is installed."""
    config = load(PACKAGE / "fashion").config()
    assert config["home"] == "fashion"
    assert build(config).recipe()["prompts"] == str(PACKAGE / "fashion" / "prompts.txt")


def test_a_student_finds_its_teacher_of_the_hub_in_another_cache(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cache(name: str) -> Path:
        return tmp_path / name / "models--someone--model"

    folder = cache("old") / "snapshots" / "0123"
    folder.parent.mkdir(parents=True)
    make_folder().rename(folder)
    (cache("old") / "refs").mkdir()
    (cache("old") / "refs" / "main").write_text("0123")
    teacher = load(folder)
    config, text = teacher.config(), teacher.condition(["a shoe"]).tensors["text"]
    cache("old").parent.rename(cache("new").parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache("new").parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    moved = build(config)
    assert torch.equal(moved.condition(["a shoe"]).tensors["text"], text)
    assert moved.config()["home"] == str(cache("new") / "snapshots" / "0123")
    shutil.rmtree(cache("new"))
    with pytest.raises(BootError, match=r"Cannot reach the hub for someone/model|someone/model is not in the local"):
        build(config).decode(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "holds a network of class 'UNet2DModel'"),
        ("unet/config.json", {"in_channels": 9}, "cannot be loaded"),
        ("unet/config.json", {"sample_size": None}, "does not say its sample_size"),
        ("unet/config.json", {"sample_size": [64]}, r"has sample_size \[64\]"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "an autoencoder of class 'AutoencoderTiny'"),
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


def test_a_folder_without_its_tokenizer_is_not_whole(make_folder: MakeFolder) -> None:
    folder = make_folder()
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(BootError, match=r"tiny-sd lacks tokenizer\."):
        load(folder)


def test_an_old_configuration_is_read_as_diffusers_reads_it(make_folder: MakeFolder) -> None:
    """Before 0.9 a sample_size below 64 was a mistake; one that is chosen here is none."""
    folder = make_folder()
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_diffusers_version": "0.6.0", "sample_size": 32}))
    with pytest.warns(FutureWarning, match="sample_size"):
        theirs = StableDiffusionPipeline.from_pretrained(folder)
    teacher = load(folder)
    assert teacher.spec.sample_shape[1:] == (theirs.unet.config.sample_size,) * 2 == (64, 64)
    teacher.use_resolution(16, 16)
    again = StableDiffusionPipeline.from_pretrained(folder, unet=teacher.net)
    assert again.unet.config.sample_size == teacher.spec.sample_shape[1] == 8


def test_features_are_those_of_the_size_that_is_drawn(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "features").mkdir()
    (folder / "features" / "config.json").write_text('{"same_as": "fashion-colour-cnn-64"}')
    teacher = load(folder)
    assert teacher.feature_space() is None
    teacher.use_resolution(32, 32)
    assert teacher.feature_space() is not None
    teacher.use_resolution(64, 16)
    assert teacher.feature_space() is None


def test_a_broken_file_is_one_message(make_folder: MakeFolder) -> None:
    folder = make_folder()
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        path = folder / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        with pytest.raises(BootError, match="cannot be loaded"):
            load(folder).decode(load(folder).condition([""]).tensors["text"].new_zeros(1, 4, 8, 8))
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("unet/diffusion_pytorch_model", "to_q.weight"),
        ("vae/diffusion_pytorch_model", "to_q.weight"),
        ("text_encoder/model", "q_proj.weight"),
        ("text_encoder_2/model", "text_projection.weight"),
    ],
)
def test_weights_that_lack_tensors_are_refused(
    make_folder: MakeFolder, capfd: pytest.CaptureFixture[str], weights: str, name: str
) -> None:
    """By the names that they go by, instead of random numbers in their place; nor is one of another shape taken."""
    folder = make_folder(xl=True)
    file = folder / f"{weights}.safetensors"
    tensors = load_file(file)

    def use() -> None:
        teacher = load(folder)
        teacher.condition(["a shoe"])
        teacher.decode(torch.zeros(1, 4, 8, 8))

    use()
    capfd.readouterr()
    renamed = {each.replace(name, "base_layer.weight"): tensor for each, tensor in tensors.items()}
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(BootError, match=rf"{file.parent} lacks \d+ of the tensors .*{name}"):
        use()
    assert capfd.readouterr().err == ""
    save_file({each: tensor[:1].clone() for each, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(BootError, match="cannot be loaded"):
        use()


def test_the_older_names_of_an_autoencoder_are_read(make_folder: MakeFolder) -> None:
    """In those the first Stable Diffusions were published."""
    folder, z = make_folder(), torch.randn(1, 4, 8, 8)
    expected = load(folder).decode(z)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(load(folder).decode(z), expected)


def test_aliases() -> None:
    assert resolve("sd15").source == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert all(resolve(name).family is family for name in ("sd15", "sd21", "sd21-base", "sdxl"))


def older_names(file: Path) -> bool:
    """Whether the tensors of a text encoder have the names that transformers before 5.6 reads too."""
    return all(name.startswith(("text_model.", "text_projection.")) for name in load_file(file))


def test_older_programs_read_the_embedded_text_encoder() -> None:
    assert older_names(PACKAGE / "fashion" / "text_encoder" / "model.safetensors")


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
        for file in exported.output.glob("text_encoder*/*.safetensors"):
            assert older_names(file)
        pipeline = CLASSES[xl].from_pretrained(exported.output)
        pipeline.set_progress_bar_config(disable=True)
        once = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "np"}
        red, green = (
            pipeline(text, **once, generator=torch.manual_seed(0)).images for text in ("a red shoe", "a green coat")
        )
        assert red.shape == (1, 16, 16, 3)
        assert abs(red - green).max() > 0
        assert "guidance_scale=1" in card
        shutil.rmtree(folder)
