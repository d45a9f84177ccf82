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
    """One step from given noise; of the whole pipeline too, where the teacher is a folder."""
    given = load_file(inputs)
    noise, text, pooled = given["noise"], given["text"], given.get("pooled")
    pipeline = _pipeline(Path(base), watermark=pooled is not None)
    pipeline.load_lora_weights(folder)
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    prompts = {"prompt_embeds": text} | ({} if pooled is None else {"pooled_prompt_embeds": pooled})
    once = {"num_inference_steps": 1, "guidance_scale": 1, "height": None, "width": None}
    latents = pipeline(**prompts, **once, latents=noise, output_type="latent").images
    made = {"sample": latents}
    if pipeline.vae is not None:
        generator = torch.manual_seed(0)  # draws the given noise again
        images = pipeline(**prompts, **once, generator=generator, output_type="np").images
        made["images"] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1
    save_file(made, outputs)


def _pipeline(base: Path, *, watermark: bool) -> Any:
    if base.is_dir():
        weights = [file.name for file in (base / "unet").glob("*") if file.suffix in (".safetensors", ".bin")]
        how = {"variant": "fp16"} if weights and all(".fp16" in name for name in weights) else {}
        # A watermark of some installations of SDXL would be a difference.
        return DiffusionPipeline.from_pretrained(base, **how, **({"add_watermarker": False} if watermark else {}))
    raise SystemExit(f"{base} is no folder.")


if __name__ == "__main__":
    main(*sys.argv[1:])
