"""LoRA students of Stable Diffusion: their files, what they begin from, and what other programs make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from bootcli.errors import BootError, UsageError
from bootcli.pipelines.distill import distill
from bootcli.pipelines.evaluate import evaluate
from bootcli.pipelines.export import export
from bootcli.pipelines.sample import sample
from bootcli.pipelines.settings import resolve_config, resume_config
from bootcli.store.artifact import load_student
from bootcli.teachers.registry import load

from .conftest import MakeFolder

STUDENT = Path("student", "student.safetensors")


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., Path]:
    """``go("run", teacher, **settings)``: a short run in a folder of its own."""
    (tmp_path / "prompts.txt").write_text("a red shoe\na green coat\n")
    few = {"prompts": str(tmp_path / "prompts.txt"), "steps": 2, "batch_size": 4, "device": "cpu", "watch.every": 0}
    steady = {"preview_teacher_steps": 2, "optimizer.decay": "constant", "optimizer.warmup_steps": 0}

    def run(name: str, teacher: Path, **settings: object) -> Path:
        list(distill(resolve_config({"teacher": str(teacher), **few, **steady, **settings}, {}, {}), tmp_path / name))
        return tmp_path / name

    return run


def test_attention_is_scaled_dot_product(make_folder: MakeFolder) -> None:
    processors = load(str(make_folder())).teacher.net.attn_processors.values()  # type: ignore[operator, union-attr]
    assert processors
    assert all(type(each) is AttnProcessor2_0 for each in processors)


@pytest.mark.parametrize("xl", [False, True])
def test_it_is_an_ordinary_student_once_loaded(make_folder: MakeFolder, go: Any, xl: bool) -> None:
    folder = make_folder(xl=xl)
    run = go("run", folder, **{"student.lora_rank": 4, "learning_rate": 1e-2, "guidance_scale": 3.0})
    stored = load_file(run / STUDENT)
    assert all(name.startswith(("lora.", "time_branch.")) for name in stored)
    learned = sum(tensor.nbytes for tensor in stored.values())
    assert learned < (run / STUDENT).stat().st_size < learned + 2**17
    with safe_open(run / STUDENT, "pt") as file:
        header = json.loads(file.metadata()["bootcli"])["lora"]
    assert (header["rank"], header["alpha"]) == (4, 4)
    assert {"to_q", "ff.net.2", "conv1", "time_emb_proj", "downsamplers.0.conv"} <= set(header["targets"])
    student = load_student(run).student
    teacher = load(str(folder)).teacher
    assert student.lora is None
    assert student.net.state_dict().keys() == teacher.net.state_dict().keys()
    assert not any("lora" in name for name, _ in student.net.named_modules())
    changed = [
        name for name, p in teacher.net.state_dict().items() if not torch.equal(p, student.net.state_dict()[name])
    ]
    assert changed
    assert all(name.endswith(".weight") and not name.startswith(("conv_in", "conv_out")) for name in changed)

    formats = ("lora",) if xl else ("lora", "diffusers", "safetensors")
    for name in formats:
        assert export(run, format=name).max_abs_difference < 1e-4
    files = {file.name for file in (run / "export" / "lora").rglob("*") if file.is_file()}
    assert files == {"pytorch_lora_weights.safetensors", "scheduler_config.json", "README.md", "bootcli.json"}
    learned_names = load_file(run / "export" / "lora" / "pytorch_lora_weights.safetensors")
    one = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{one}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= learned_names.keys()
    assert len(learned_names) == 3 / 2 * sum(name.startswith("lora.") for name in stored)
    assert {float(tensor) for name, tensor in learned_names.items() if name.endswith("alpha")} == {4.0}
    card = (run / "export" / "lora" / "README.md").read_text()
    assert "load_lora_weights" in card
    assert 'from_pretrained("path/to/the/teacher")' in card
    assert "guidance_scale=1" in card
    if not xl:
        assert len(sample(run, num_images=2, device="cpu").files) == 2
        assert evaluate(run, metrics=("paired",), num_images=2, teacher_steps=(2,), device="cpu")
        shutil.rmtree(folder)
        with pytest.raises(BootError, match="cannot be loaded"):
            load_student(run)


@pytest.mark.parametrize("xl", [False, True])
def test_a_lora_keeps_the_size_of_its_run(make_folder: MakeFolder, go: Any, xl: bool) -> None:
    run = go("run", make_folder(xl=xl), **{"student.lora_rank": 2, "learning_rate": 1e-2, "resolution": (24, 16)})
    (file,) = sample(run, num_images=1, device="cpu").files
    with Image.open(file) as image:
        assert image.size == (24, 16)
    for name in ("lora", "diffusers"):
        made = export(run, format=name)
        assert made.max_abs_difference < 1e-4
    assert "height=16, width=24" in (run / "export" / "lora" / "README.md").read_text()


def test_a_lora_on_what_the_hub_gives(make_folder: MakeFolder, go: Any) -> None:
    """The index names a safety checker whose weights are not fetched; one part has files in half precision alone."""
    folder = make_folder()
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("model.fp16.safetensors"))
    run = go("run", folder, **{"student.lora_rank": 2, "learning_rate": 1e-2})
    for name in ("lora", "diffusers"):
        assert export(run, format=name).max_abs_difference < 1e-4
    assert 'variant="fp16"' in (run / "export" / "lora" / "README.md").read_text()
    exported = json.loads((run / "export" / "diffusers" / "model_index.json").read_text())
    assert exported["safety_checker"] == [None, None]


def test_a_lora_on_a_single_file(both: tuple[Path, Path], go: Any) -> None:
    run = go("run", both[1], **{"student.lora_rank": 2, "learning_rate": 1e-2})
    for name in ("lora", "diffusers"):
        assert export(run, format=name).max_abs_difference < 1e-4
    card = (run / "export" / "lora" / "README.md").read_text()
    assert 'StableDiffusionPipeline.from_single_file("path/to/tiny.safetensors")' in card


def test_what_a_lora_begins_from(make_folder: MakeFolder, go: Any, tmp_path: Path) -> None:
    folder = make_folder()
    first = go("first", folder, **{"student.lora_rank": 2, "learning_rate": 1e-2})
    still = {"init_from": str(first), "learning_rate": 1e-12, "steps": 1}
    again = go("again", folder, **still, **{"student.lora_rank": 2})
    begun = load_file(again / STUDENT)
    assert all(torch.allclose(tensor, begun[name], atol=1e-6) for name, tensor in load_file(first / STUDENT).items())
    whole = go("whole", folder, **still)
    ours, theirs = (load_student(run).student.state_dict() for run in (first, whole))
    assert all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in ours.items())
    for run, what in ((first, "a LoRA of rank 2"), (whole, "a whole network")):
        with pytest.raises(UsageError, match=f"it holds {what}"):
            go("no", folder, **{"init_from": str(run), "student.lora_rank": 3})
    with pytest.raises(UsageError, match="trained as a whole network"):
        export(whole, format="lora")


def test_resume_is_bit_for_bit(make_folder: MakeFolder, go: Any) -> None:
    """Student and critic in one network, under gradient checkpointing."""
    folder = make_folder()
    settings = {"student.lora_rank": 2, "corrector": True, "correction.critic": "lora", "correction.warmup": 1}
    settings |= {"optimizer.gradient_checkpointing": True}
    whole, parts = go("whole", folder, **settings, steps=4), go("parts", folder, **settings)
    list(distill(resume_config(parts, {"steps": 4}, {}, {}), parts, resume=True))
    one, other = (load_file(run / "checkpoints" / "step-00000004.safetensors") for run in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items() if not name.startswith("rng."))
