"""Runs an exported folder with diffusers alone; started after an export as `Exporter.check` says."""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(folder: str, inputs: str, outputs: str) -> None:
    """One step from given noise, part by part, and of the pipeline as users call it."""
    given = load_file(inputs)
    noise, text, pooled = given["noise"], given["text"], given.get("pooled")
    scales = given.get("guidance", torch.ones(len(noise)))
    # A watermark of some installations of SDXL would be a difference.
    pipeline = DiffusionPipeline.from_pretrained(folder, **({} if pooled is None else {"add_watermarker": False}))
    pipeline.set_progress_bar_config(disable=True)
    prompts = {"prompt_embeds": text} | ({} if pooled is None else {"pooled_prompt_embeds": pooled})
    sides: tuple[int | None, ...] = (None, None)  # what the folder says
    if pooled is not None and noise.shape[2] != noise.shape[3]:  # diffusers' SDXL has no such size of its own
        sides = tuple(side * pipeline.vae_scale_factor for side in noise.shape[2:])
    once = {"num_inference_steps": 1, "height": sides[0], "width": sides[1]}
    made: dict[str, torch.Tensor] = {}
    for scale in set(scales.tolist()):  # the pipeline takes one for all images
        asked, rows = {**prompts, **once, "guidance_scale": scale}, scales == scale
        latents = pipeline(**asked, latents=noise, output_type="latent").images
        generator = torch.manual_seed(0)  # draws the given noise again
        images = torch.from_numpy(pipeline(**asked, generator=generator, output_type="np").images)
        for name, tensor in {"sample": latents, "images": images.permute(0, 3, 1, 2) * 2 - 1}.items():
            made.setdefault(name, torch.empty_like(tensor.contiguous()))[rows] = tensor[rows]
    save_file(made, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
