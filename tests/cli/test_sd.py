"""A text teacher on the command line: prompts from files and from standard input, kept with the run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torchvision.transforms.functional import to_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .conftest import Cli, Done, environment


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of diffusers with random weights, 16x16 pixels."""
    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=len(words) - 1, bos_token_id=len(words) - 2,
    )  # fmt: skip
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8, layers_per_block=1, attention_head_dim=2, cross_attention_dim=16, **blocks,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        vae=AutoencoderKL(
            sample_size=16, **blocks,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("teachers") / "tiny-sd"
    pipeline.save_pretrained(folder)
    return folder


FEW = ["--steps", "2", "--batch-size", "4", "--set", "preview_teacher_steps=2", "--set", "watch.every=0"]


def test_prompts_in_images_out(inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two of them\na red shoe\tblue\na green coat\n")
    flags = ["--teacher", str(tiny_sd), "--prompts", "prompts.txt", "--guidance-scale", "3", "--output", "run"]
    done = inside("distill", *flags, *FEW)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    assert kept == [{"prompt": "a red shoe", "negative_prompt": "blue"}, {"prompt": "a green coat"}]
    prompts.unlink()
    done = inside("sample", "run", "-n", "2", "--prompt", "a brown hat", "--output", "images")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "images" / "000001.png") as image:
        assert image.text["prompt"] == "a brown hat"  # type: ignore[attr-defined]
        assert image.text["seed"] == "1"  # type: ignore[attr-defined]
    done = inside("distill", "--resume", "--output", "run", "--steps", "3")
    assert done.returncode == 0, done.stderr
    (tmp_path / "run").rename(tmp_path / "moved")
    done = inside("sample", "moved", "-n", "3", "--output", "more")
    assert done.returncode == 0, done.stderr
    told = []
    for name in ("000000", "000001", "000002"):
        with Image.open(tmp_path / "more" / f"{name}.png") as image:
            told.append(image.text["prompt"])  # type: ignore[attr-defined]
    assert told == ["a red shoe", "a green coat", "a red shoe"]
    done = inside("export", "moved", "--format", "diffusers")
    assert done.returncode == 0, done.stderr


def test_several_prompts_and_sizes(inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "held-out.jsonl").write_text('{"prompt": "a hat", "seed": 3}\n{"prompt": "a sock"}\n')
    done = inside("distill", "--teacher", str(tiny_sd), "--resolution", "24x16", "--output", "run", *FEW)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resolution"] == [24, 16]

    def drawn(*args: str) -> list[tuple[str, str, tuple[int, int]]]:
        done = inside("sample", "run", "--json", *args)
        assert done.returncode == 0, done.stderr
        found = []
        for file in json.loads(done.stdout)["files"]:
            with Image.open(file) as image:
                found.append((image.text["prompt"], image.text["seed"], image.size))  # type: ignore[attr-defined]
        return found

    assert drawn("--prompt", "a shoe", "--prompt", "a coat") == [("a shoe", "0", (24, 16)), ("a coat", "1", (24, 16))]
    assert [prompt for prompt, *_ in drawn("--prompt", "a shoe", "-n", "3")] == ["a shoe"] * 3
    small = ["--prompts", "held-out.jsonl", "--resolution", "16"]
    assert drawn(*small) == [("a hat", "3", (16, 16)), ("a sock", "1", (16, 16))]
    done = inside("evaluate", "run", "--metric", "paired", "-n", "2", "--prompts", "held-out.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompts"] == {"source": "held-out.jsonl", "count": 2}
    for words, message in (
        (("sample", "run", "--prompt", "a", "--prompts", "held-out.jsonl"), "Give one of them"),
        (("sample", "run", "--prompts", "none.txt"), "no such file"),
        (("sample", "run", "--resolution", "x16"), "expected pixels"),
        (("evaluate", "run", "--resolution", "20"), "multiples of 8 pixels"),
        (("distill", "--teacher", str(tiny_sd), "--resolution", "20", "--output", "other"), "multiples of 8 pixels"),
        (("distill", "--resolution", "32", "--output", "other"), "draw one size"),
        (("distill", "--resume", "--output", "run", "--resolution", "16"), "cannot change resolution"),
    ):
        done = inside(*words)
        assert done.returncode == 2, (words, done.stderr)
        assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "other").exists()


def test_prompts_that_are_cut_are_told_of(inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a shoe\nmuch too many words for the little that it reads\n")
    done = inside("distill", "--teacher", str(tiny_sd), "--prompts", "prompts.txt", "--output", "run", *FEW)
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "1 of 2 prompts are longer than the teacher reads" in said
    done = inside("distill", "--teacher", str(tiny_sd), "--negative-prompt", "blur", "--output", "other", *FEW)
    assert done.returncode == 2
    assert "Add --guidance-scale" in " ".join(done.stderr.split())


def test_prompts_from_standard_input(inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path) -> None:
    flags = ["--teacher", str(tiny_sd), "--prompts", "-", "--output", "run"]
    command = [sys.executable, "-m", "bootcli", "distill", *flags, *FEW]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), input="a shoe\na coat\n", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "prompts.jsonl").read_text().count("\n") == 2
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "run" / "student" / "student.safetensors", tmp_path / "alone")
    done = inside("sample", "alone/student.safetensors")
    assert done.returncode == 2
    assert "alone/prompts.jsonl: there is no such file" in " ".join(done.stderr.split())
    assert "give others with --prompts" in " ".join(done.stderr.split())
    done = inside("sample", "alone/student.safetensors", "--prompt", "a hat")
    assert done.returncode == 0, done.stderr
    done = inside("export", "alone/student.safetensors", "--format", "safetensors")
    assert done.returncode == 0, done.stderr


def test_negative_prompts_are_told_to_be_without_effect(
    inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path
) -> None:
    flags = ["--teacher", str(tiny_sd), "--guidance-scale", "3", "--output", "run"]
    assert inside("distill", *flags, *FEW).returncode == 0
    for colour in ("blue", "green"):
        (tmp_path / f"{colour}.txt").write_text(f"a red shoe\t{colour}\n")

    def drawn(*args: str) -> tuple[str, bytes, str]:
        done = inside("sample", "run", "--json", *args)
        assert done.returncode == 0, done.stderr
        (file,) = json.loads(done.stdout)["files"]
        return Path(file).parent.name, (tmp_path / file).read_bytes(), done.stderr

    by_student = drawn("--prompts", "blue.txt")
    assert by_student == drawn("--prompts", "green.txt")
    assert "those of --prompts have no effect" in by_student[2]
    assert by_student[:2] == drawn("--prompt", "a red shoe")[:2]
    one, two = (drawn("--teacher-steps", "2", "--prompts", f"{colour}.txt") for colour in ("blue", "green"))
    assert one[0] != two[0], "of the teacher they are other images"
    assert one[1] != two[1]
    assert "no effect" not in one[2]
    for flags, told in (([], 0), (["--prompts", "blue.txt"], 1)):
        done = inside("evaluate", "run", "--metric", "paired", "-n", "2", *flags)
        assert done.stdout.count("Negative prompts of --prompts lead the teacher alone") == told, done.stderr


def test_negative_prompts_of_a_teacher_that_is_not_guided_are_refused(
    inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path
) -> None:
    assert inside("distill", "--teacher", str(tiny_sd), "--output", "run", *FEW).returncode == 0
    (tmp_path / "blue.txt").write_text("a red shoe\tblue\n")
    for command in (("sample", "--teacher-steps", "2"), ("evaluate", "--metric", "paired", "-n", "2")):
        done = inside(*command, "run", "--prompts", "blue.txt")
        assert done.returncode == 2
        assert "nothing leads away from its negative prompts" in " ".join(done.stderr.split())
    assert not (tmp_path / "run" / "samples").exists()


def test_without_prompts_it_takes_its_own(inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path) -> None:
    done = inside("distill", "--teacher", str(tiny_sd), "--output", "run", *FEW)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "prompts.jsonl").read_text().count("\n") == 200


@pytest.mark.slow
def test_one_step_of_fashion_sd_is_what_was_asked_for(cli: Cli, tmp_path: Path) -> None:
    """The embedded text-to-image teacher, a fortieth of its recipe, with prompts of a user and with its own."""
    few = ["--steps", "60", "--preview-every", "0", "--set", "preview_teacher_steps=2", "--set", "watch.every=0"]
    done = cli("distill", "--teacher", "fashion-sd", "--output", "run", *few)
    assert done.returncode == 0, done.stderr
    metrics = ["--metric", "fid", "--metric", "accuracy", "-n", "300", "--teacher-steps", "1"]
    done = cli("evaluate", "run", *metrics, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    student, (teacher,) = found["student"], found["teacher"]
    assert (student["nfe"], teacher["nfe"]) == (1, 2)
    assert student["fid"] < teacher["fid"]
    assert student["accuracy"] > 0.5
    done = cli("sample", "run", "--prompt", "a red dress on the left", "--json")
    assert done.returncode == 0, done.stderr
    (file,) = json.loads(done.stdout)["files"]
    with Image.open(tmp_path / file) as image:
        red, green, _ = to_tensor(image)[:, :, :16].mean((1, 2))
        assert image.size == (32, 32)
    assert red > green


def test_without_a_network_the_way_out_is_said_at_once(cli: Cli) -> None:
    done = cli("distill", "--teacher", "sd15", HF_HUB_OFFLINE="1", HF_HOME="/nonexistent")
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in said
    assert "--teacher ./stable-diffusion-v1-5" in said


def test_a_student_that_takes_w(inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red shoe\na green coat\n")
    flags = ["--teacher", str(tiny_sd), "--prompts", "prompts.txt", "--guidance-range", "1.5,6", "--output", "run"]
    quick = ["--learning-rate", "0.05", "--set", "optimizer.warmup_steps=1", "--set", "guidance.rescale=0.5"]
    done = inside("distill", *flags, *FEW, *quick)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["guidance_range"], config["guidance_scale"]) == ([1.5, 6.0], 1.0)
    assert config["guidance"] == {"rescale": 0.5, "interval": [0.0, 1.0], "one_batch": True}
    done = inside("sample", "run", "-n", "2", "--guidance-scale", "6")
    assert done.returncode == 0, done.stderr
    assert "w = 6" in done.stdout
    with Image.open(tmp_path / "run" / "samples" / "guidance-6" / "000001.png") as image:
        assert image.text["guidance_scale"] == "6.0"  # type: ignore[attr-defined]
    done = inside("export", "run", "--format", "diffusers")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guidance-range", "2,8", "--guidance-scale", "1"], "--guidance-scale is one w, --guidance-range many"),
        (["--guidance-range", "2,8", "--set", "guidance_scale=3"], "--guidance-scale 3 is one w"),
        (["--guidance-range", "2"], "expected two numbers"),
        (["--guidance-range", "8,2"], "does not rise"),
    ],
)
def test_guidance_that_cannot_be(
    inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    done = inside("distill", "--teacher", str(tiny_sd), "--output", "run", *FEW, *words)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_accuracy_is_that_of_the_prompts_that_are_asked_for(
    inside: Callable[..., Done], tiny_sd: Path, tmp_path: Path
) -> None:
    """The classes have words in the features; a network of random weights draws the same class for all."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_sd, teacher)
    (teacher / "features").mkdir()
    (teacher / "features" / "config.json").write_text('{"same_as": "fashion-colour-cnn-64"}')
    (teacher / "prompts.txt").write_text("a red fox\n")
    done = inside("distill", "--teacher", str(teacher), "--resolution", "32", "--output", "run", *FEW)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "prompts.jsonl").read_text()) == {"prompt": "a red fox"}

    names = ["t-shirt", "pair of trousers", "pullover", "dress", "coat"]
    names += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]
    (tmp_path / "all.txt").write_text("".join(f"a green {name}\n" for name in names))
    metric = ["--metric", "accuracy", "-n", "20", "--teacher-steps", "", "--json"]
    done = inside("evaluate", "run", *metric, "--prompts", "all.txt")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["student"]["accuracy"] < 1
    done = inside("evaluate", "run", *metric)
    assert (done.returncode, "no prompt names one class" in done.stderr) == (2, True)
