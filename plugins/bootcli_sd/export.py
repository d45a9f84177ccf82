"""A student as a diffusers folder that plain `StableDiffusionPipeline` samples in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import ModelCardData
from torch import nn

from bootcli.plugin import BootError, Head, Teacher
from bootcli_sd.teacher import GuidanceInput, SDTeacher

_CARD = """\
---
{front_matter}
---

# A one-step text-to-image model

This model makes an image from noise and a prompt in **one** call of its network. It was distilled with bootcli from
{teacher}, without any training images. {guidance}

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
prompt, generator = "a red fox in snow", torch.manual_seed(0)
image = pipeline(prompt, num_inference_steps=1, guidance_scale={scale:g}, generator=generator).images[0]
image.save("sample.png")
```
"""


def write_diffusers(teacher: Teacher, net: nn.Module, head: Head, folder: Path) -> None:
    """Write the pipeline: the student's UNet, a scheduler whose one step is its head, and the teacher's other parts.

    See `Exporter.write`; ``teacher`` is an `SDTeacher`.
    """
    if not isinstance(teacher, SDTeacher) or not isinstance(net, UNet2DConditionModel):
        raise BootError("Only a student of a Stable Diffusion teacher can be written as a diffusers pipeline.")
    scheduler = teacher.process.one_step(predicts_sample=head == "x0")
    parts: dict[str, Any] = {"unet": net, "vae": teacher.vae, "scheduler": scheduler}
    for name, (encoder, tokenizer) in zip(("", "_2"), teacher.text.pairs, strict=False):
        parts |= {f"text_encoder{name}": encoder, f"tokenizer{name}": tokenizer}
    if "text_encoder_2" in parts:
        pipeline = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=teacher.text.zero_negative)
    else:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **nothing)
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").write_text(_model_card(teacher, net), encoding="utf-8")


def _model_card(teacher: SDTeacher, net: UNet2DConditionModel) -> str:
    card = teacher.describe()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "one-step", "distillation", "boot"],
        base_model=card.get("source"),
        license=card.get("licence"),
    )
    source = card.get("source")
    named = f"[{source}](https://huggingface.co/{source})" if source else f"`{teacher.home.name}`"
    guidance, scale = "Guidance is part of it: leave the guidance scale at 1.", 1.0
    if isinstance(given := net.time_embedding.cond_proj, GuidanceInput):
        low, high = given.limits
        guidance, scale = f"It takes a guidance scale from {low:g} to {high:g}.", (low + high) / 2
    return _CARD.format(front_matter=data.to_yaml(), teacher=named, guidance=guidance, scale=scale)
