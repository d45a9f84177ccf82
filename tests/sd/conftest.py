"""Tiny Stable Diffusion folders, made by diffusers and transformers themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_sd import single_file
from bootcli_sd.teacher import load
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests import original_names as names

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL: dict[str, Any] = {
    "cross_attention_dim": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 16,
}
SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}

MakeFolder = Callable[..., Path]


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with the bytes for words."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=24)


def encoder(kind: type, words: CLIPTokenizer) -> Any:
    """A text encoder of width 16."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=24,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """``make_folder(unet={...}, scheduler={...}, xl=False, **how_to_save)``."""

    def make(
        unet: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None, *, xl: bool = False, **save: Any
    ) -> Path:
        torch.manual_seed(0)
        words = tokenizer()
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        )
        parts = {
            "unet": UNet2DConditionModel(**(UNET | (XL if xl else {}) | (unet or {}))),
            "vae": vae,
            "scheduler": DDIMScheduler(**(SD15 | (scheduler or {}))),
            "text_encoder": encoder(CLIPTextModel, words),
            "tokenizer": words,
        }
        if xl:
            second = {"text_encoder_2": encoder(CLIPTextModelWithProjection, words), "tokenizer_2": words}
            pipeline = StableDiffusionXLPipeline(**parts, **second)
        else:
            nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = StableDiffusionPipeline(**parts, **nothing)
        folder = tmp_path / "tiny-sd"
        pipeline.save_pretrained(folder, **save)
        return folder

    return make


@pytest.fixture
def both(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder, and a file of the same weights; the bundled configurations are those of the folder."""
    folder = make_folder()
    teacher = load(folder)
    file = tmp_path / "tiny.safetensors"
    save_file(
        names.single_file(*(part.state_dict() for part in (teacher.net, teacher.vae, teacher.text.pairs[0][0]))), file
    )
    configs = tmp_path / "configs"
    for name in ("model_index.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))):
        (configs / "sd1" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, configs / "sd1" / name)
    shutil.copytree(folder / "scheduler", configs / "sd1" / "scheduler")
    monkeypatch.setattr(single_file, "CONFIGS", configs)
    monkeypatch.setattr(single_file, "WIDTHS", {"sd1": 16, "sd2": 1024})
    monkeypatch.setattr(single_file, "tokenizer", lambda pad: tokenizer())
    return folder, file
