"""Runs an exported folder with diffusers alone; started after an export as `Exporter.check` says."""

from __future__ import annotations

import sys

import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(folder: str, inputs: str, outputs: str) -> None:
    """One step from given noise, part by part; where no labels are needed, also of the pipeline as users call it."""
    given = load_file(inputs)
    noise, labels = given["noise"], given.get("labels")
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(1)
    t = pipeline.scheduler.timesteps[0]
    output = pipeline.unet(noise, t, class_labels=labels).sample
    result = {"sample": pipeline.scheduler.step(output, t, noise).prev_sample}
    if labels is None:
        generator = torch.manual_seed(0)  # draws the given noise again
        images = pipeline(len(noise), generator, num_inference_steps=1, eta=0, output_type="np").images
        result["images"] = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    save_file({name: tensor.contiguous() for name, tensor in result.items()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
