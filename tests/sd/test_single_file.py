"""A single file gives the teacher that its folder gives; the tokenizer is CLIP's own."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from itertools import accumulate
from pathlib import Path

import open_clip
import pytest
import torch
from bootcli_sd import family, single_file
from bootcli_sd.teacher import SDTeacher, build, load
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from bootcli.errors import BootError


def same(a: SDTeacher, b: SDTeacher) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9], dtype=torch.float64)
    conds = [teacher.condition(["a red shoe", None]) for teacher in (a, b)]
    assert torch.allclose(conds[0].tensors["text"], conds[1].tensors["text"], atol=1e-5)
    with torch.no_grad():
        drawn = [teacher.predict(teacher.net, x, t, cond) for teacher, cond in zip((a, b), conds, strict=True)]
    assert torch.allclose(*drawn, atol=1e-5)
    assert torch.allclose(a.decode(x), b.decode(x), atol=1e-5)
    assert a.spec == b.spec


def test_a_file_is_the_teacher_of_its_folder(both: tuple[Path, Path]) -> None:
    folder, file = both
    assert family.matches(file)
    teacher = load(file)
    same(teacher, load(folder))
    assert teacher.describe()["single file"] == "sd1"
    rebuilt = build(json.loads(json.dumps(teacher.config())))
    rebuilt.net.load_state_dict(teacher.net.state_dict())
    same(rebuilt, load(folder))
    file.unlink()
    gone = build(teacher.config())
    with pytest.raises(BootError, match="is gone"):
        gone.condition(["a shoe"])


def test_what_embeddings_of_a_file_depend_on(both: tuple[Path, Path]) -> None:
    """On its text encoder alone, wherever the file lies and whatever else it holds."""
    _, file = both
    known = load(file).fingerprint()
    tensors = load_file(file)
    for name in ("model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.bias"):
        tensors[name] += 1
    save_file(tensors, file.with_name("other.safetensors"))
    assert load(file.with_name("other.safetensors")).fingerprint() == known
    text = next(name for name in tensors if name.startswith("cond_stage_model"))
    tensors[text] += 1
    save_file(tensors, file)
    assert load(file).fingerprint() != known


def test_parts_of_a_file_come_back(both: tuple[Path, Path]) -> None:
    _, file = both
    teacher, fresh = load(file), load(file)
    teacher.release()
    assert (teacher._text, teacher._vae) == (None, None)
    same(teacher, fresh)


def test_a_file_of_something_else(both: tuple[Path, Path], tmp_path: Path) -> None:
    _, file = both
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    assert not family.matches(other)
    with pytest.raises(BootError, match="holds no UNet"):
        load(other)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BootError, match="cannot be loaded"):
        load(file)


@pytest.mark.parametrize("name", ["attn2.to_q.weight", "decoder.mid.attn_1.q.weight", "q_proj.weight"])
def test_a_file_that_lacks_tensors(both: tuple[Path, Path], name: str) -> None:
    _, file = both
    renamed = {each.replace(name, "base_layer.weight"): tensor for each, tensor in load_file(file).items()}
    save_file(renamed, file)
    with pytest.raises(BootError, match=r"lacks .* of the tensors that its model has"):
        load(file)


def test_a_file_is_read_without_a_word(both: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Of diffusers, which talks to others as before."""
    _, file = both
    capfd.readouterr()
    logging.set_verbosity_info()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(file)
    assert capfd.readouterr().err == ""
    after = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()  # what other tests begin with
    assert after == before
    assert before[1]


@pytest.mark.parametrize(
    ("width", "more", "metadata", "spread", "kind"),
    [
        (768, {}, {}, 0.2, "sd1"),
        (768, {"v_pred": [0], "ztsnr": [0]}, {}, 0, "sd1:v:zero"),
        (1024, {}, {}, 0.1, "sd2"),
        (1024, {}, {}, 0.08, "sd2-base"),
        (1024, {"v_pred": [0]}, {}, 0, "sd2"),
        (1024, {single_file._XL: [1280]}, {}, 0, "sdxl"),
        (1024, {single_file._XL: [1280]}, {"modelspec.prediction_type": "v"}, 0, "sdxl:v"),
        (1024, {}, {"modelspec.prediction_type": "epsilon"}, 0.2, "sd2-base"),
        (1024, {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, 0.2, "sd2-base"),
        (1024, {}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, 0, "sd2"),
        (1024, {}, {"modelspec.predict_key": "epsilon"}, 0.2, "sd2-base"),
        (1024, {}, {"modelspec.predict_key": "v"}, 0, "sd2"),
        (768, {}, {"modelspec.predict_key": "v"}, 0, "sd1:v"),
        (768, {}, {"modelspec.predict_key": "epsilon"}, 0, "sd1"),
    ],
)
def test_the_kind_shows_in_the_tensors(
    width: int, more: dict[str, list[int]], metadata: dict[str, str], spread: float, kind: str
) -> None:
    shapes = {single_file._FIRST: [320, 4, 3, 3], single_file._ATTENTION: [320, width]}
    assert single_file.kind_of(shapes | more, metadata, spread, "some") == kind
    with pytest.raises(BootError, match="a UNet that reads 9 channels"):
        single_file.kind_of(shapes | {single_file._FIRST: [320, 9, 3, 3]}, {}, 0, "some")
    for edm in ("edm_vpred.sigma_max", "edm_mean"):
        with pytest.raises(BootError, match="of EDM's kind"):
            single_file.kind_of(shapes | {edm: []}, {}, 0, "some")
    if width == 1024 and single_file._XL not in more:
        with pytest.raises(BootError, match="conditioned on more than text"):
            single_file.kind_of(shapes | {single_file._LABELS: [1280, 2048]}, {}, 0, "some")
    with pytest.raises(BootError, match="texts of width 2048"):
        single_file.kind_of(shapes | {single_file._ATTENTION: [320, 2048]}, {}, 0, "some")


def test_what_is_read_of_a_file_to_know_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older checkpoint names a class of the program that trained it: it is neither imported nor made."""
    bias = torch.tensor([0.5, -0.5, 0.5, -0.5])
    tensors = {single_file._TELLTALE: bias, single_file._FIRST: torch.zeros(1)}
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.predict_key": "v"})
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert single_file._looked_at(tmp_path / "a.safetensors") == (shapes, {"modelspec.predict_key": "v"}, 0.5)

    module, name = single_file._LIGHTNING.rsplit(".", 1)
    trainer, made = types.ModuleType(module), type(name, (), {"__module__": module})
    trainer.__dict__[name] = made
    with monkeypatch.context() as there:
        for place in accumulate(module.split("."), "{}.{}".format):
            there.setitem(sys.modules, place, trainer)
        torch.save({"callbacks": {made: {"best": 1}}, "state_dict": tensors}, tmp_path / "a.ckpt")
    assert single_file._looked_at(tmp_path / "a.ckpt") == (shapes, {}, 0.5)
    assert module not in sys.modules


def test_a_file_that_predicts_v(both: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(both[1]) | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    file = tmp_path / "v.safetensors"
    save_file(tensors, file)
    teacher = load(file)
    assert teacher.spec.prediction == "v"
    assert teacher.spec.schedule.terminal_snr() == 0
    assert build(teacher.config()).spec == teacher.spec


@pytest.mark.parametrize(("kind", "zero"), [("sdxl", True), ("sdxl:v:zero", True), ("sd1:v", False)])
def test_no_prompt_is_zeros_for_sdxl_whatever_it_predicts(both: tuple[Path, Path], kind: str, zero: bool) -> None:
    parts = single_file.read_single_file(both[1], "sd1")
    teacher = load(both[1])
    teacher.take(dataclasses.replace(parts, kind=kind))
    assert teacher.text.zero_negative == zero


@pytest.mark.parametrize("kind", ["sd1", "sd2-base", "sd2", "sdxl"])
def test_the_bundled_configurations_make_networks(kind: str) -> None:
    def config(part: str) -> dict[str, object]:
        found: dict[str, object] = json.loads((single_file.CONFIGS / kind / part / "config.json").read_text())
        return found

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config("unet"))
        AutoencoderKL.from_config(config("vae"))
    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    assert round(millions) == {"sd1": 860, "sd2-base": 866, "sd2": 866, "sdxl": 2567}[kind]
    encoders = ("text_encoder", "text_encoder_2") if kind == "sdxl" else ("text_encoder",)
    widths = [CLIPTextConfig(**config(part)).hidden_size for part in encoders]
    assert sum(widths) == unet.config.cross_attention_dim


def test_the_tokenizer_is_clips() -> None:
    texts = ["a photo of a cat", "It's 25°C, naïve café.", "THE  quick\tbrown fox's", "日本 🦊"]
    reference = open_clip.get_tokenizer("ViT-B-32")(texts)
    for pad in ("<|endoftext|>", "!"):
        words = single_file.tokenizer(pad)
        assert (len(words), words.bos_token_id, words.eos_token_id) == (49408, 49406, 49407)
        found = words(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        for ours, theirs in zip(found, reference, strict=True):
            end = int((theirs == 49407).nonzero()[0]) + 1
            assert ours[:end].tolist() == theirs[:end].tolist()
            assert set(ours[end:].tolist()) == {words.pad_token_id}
    assert single_file.tokenizer("!").pad_token_id == 0
