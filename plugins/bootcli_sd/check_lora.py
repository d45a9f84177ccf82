"""Runs an exported LoRA on its teacher with diffusers alone; started after an export as `LoraExporter.check` says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(folder: str, inputs: str, outputs: str, base: str) -> None:
    """One step from given noise, part by part, and of the pipeline as users call it."""
    given = load_file(inputs)
    noise, text, pooled = given["noise"], given["text"], given.get("pooled")
    pipeline = _pipeline(Path(base), watermark=pooled is not None)
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


def _pipeline(base: Path, *, watermark: bool) -> Any:
    weights = [file.name for file in (base / "unet").glob("*") if file.suffix in (".safetensors", ".bin")]
    how: dict[str, Any] = {"variant": "fp16"} if weights and all(".fp16" in name for name in weights) else {}
    if watermark:  # of some installations of SDXL: it would be a difference
        how["add_watermarker"] = False
    return DiffusionPipeline.from_pretrained(base, **how).to(torch.float32)


if __name__ == "__main__":
    main(*sys.argv[1:])
