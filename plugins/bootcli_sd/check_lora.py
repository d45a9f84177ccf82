"""Runs an exported LoRA on its teacher with diffusers alone; started after an export as `LoraExporter.check` says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

PARTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


@torch.no_grad()
def main(folder: str, inputs: str, outputs: str, base: str, config: str = "") -> None:
    """One step from given noise, part by part, and of the pipeline as users call it.

    ``base`` is the teacher's folder, or its single file, of which ``config`` is a folder of configurations.
    """
    given = load_file(inputs)
    noise, text, pooled = given["noise"], given["text"], given.get("pooled")
    pipeline = _of_file(base, config) if config else _of_folder(Path(base), xl=pooled is not None)
    pipeline.load_lora_weights(folder)
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    prompts = {"prompt_embeds": text} | ({} if pooled is None else {"pooled_prompt_embeds": pooled})
    height, width = (side * pipeline.vae_scale_factor for side in noise.shape[2:])  # not always the teacher's own
    once = {"num_inference_steps": 1, "guidance_scale": 1, "height": height, "width": width}
    latents = pipeline(**prompts, **once, latents=noise, output_type="latent").images
    generator = torch.manual_seed(0)  # draws the given noise again
    images = pipeline(**prompts, **once, generator=generator, output_type="np").images
    save_file({"sample": latents, "images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1}, outputs)


def _of_file(base: str, config: str) -> Any:
    """The pipeline of a single file, whose prompts are embedded already: diffusers would fetch the tokenizer."""
    kind = StableDiffusionXLPipeline if Path(config).name == "sdxl" else StableDiffusionPipeline
    words = [f"{part}{place}" for part in ("tokenizer", "text_encoder") for place in ("", "_2")]
    known = {name: None for name in words if (Path(config) / name.replace("tokenizer", "text_encoder")).is_dir()}
    how: dict[str, Any] = {"add_watermarker": False} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    return kind.from_single_file(base, config=config, local_files_only=True, torch_dtype=torch.float32, **known, **how)


def _of_folder(base: Path, *, xl: bool) -> Any:
    """The teacher's pipeline, of the parts and the files that bootcli reads: a folder from the hub has no others."""
    how: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    if xl:  # some installations write a watermark: it would be a difference
        how["add_watermarker"] = False
    else:  # and so would images that the checker blackens
        how |= {"safety_checker": None, "requires_safety_checker": False}
    for name, kind in PARTS.items():  # each has its own files, of which diffusers would take those of one precision
        if _in_halves(base / name):
            how[name] = kind.from_pretrained(base / name, variant="fp16")
    return DiffusionPipeline.from_pretrained(base, **how).to(torch.float32)


def _in_halves(folder: Path) -> bool:
    weights = [file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin")]
    return bool(weights) and all(".fp16" in name for name in weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
