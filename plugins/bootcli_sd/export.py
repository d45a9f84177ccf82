"""A student for diffusers: a folder that plain `StableDiffusionPipeline` samples in one step, or a LoRA for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import ModelCardData
from safetensors.torch import save_file
from torch import Tensor, nn

from bootcli.plugin import BootError, Head, LoraWeights, Teacher
from bootcli_sd.layout import variant_of
from bootcli_sd.teacher import GuidanceInput, SDTeacher

LORA = "pytorch_lora_weights.safetensors"
"""Where diffusers looks for a LoRA in a folder."""
_KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}

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
image = pipeline(prompt, {size}num_inference_steps=1, guidance_scale={scale:g}, generator=generator).images[0]
image.save("sample.png")
```
"""

_LORA_CARD = """\
---
{front_matter}
---

# A one-step LoRA

This LoRA of rank {rank} makes {teacher} draw an image from noise and a prompt in **one** call of its network. It was
distilled with bootcli, without any training images. Guidance is part of it: leave the guidance scale at 1.

Its layers have the names that ComfyUI and AUTOMATIC1111 know, too: there, sample in one step at a CFG scale of 1.

```python
import torch
from diffusers import {scheduler}, {pipeline}

pipeline = {pipeline}.{base}
pipeline.load_lora_weights("path/to/this/folder")
pipeline.scheduler = {scheduler}.from_pretrained("path/to/this/folder", subfolder="scheduler")
prompt, generator = "a red fox in snow", torch.manual_seed(0)
image = pipeline(prompt, {size}num_inference_steps=1, guidance_scale=1, generator=generator).images[0]
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
    save_pipeline(pipeline, folder)
    (folder / "README.md").write_text(_CARD.format(**_card(teacher), **_guidance(net)), encoding="utf-8")


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Save a pipeline with the names of tensors that every version of transformers reads.

    Before 5.6 it knows those of the text encoder by their longer names alone, later by either; those of SDXL's second
    encoder have no others.
    """
    pipeline.save_pretrained(folder, safe_serialization=True)
    longer = {f"text_model.{name}": tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
    pipeline.text_encoder.save_pretrained(folder / "text_encoder", state_dict=longer)


def write_lora(teacher: Teacher, lora: LoraWeights, folder: Path) -> None:
    """Write the LoRA, the scheduler of its one step and a card; see `LoraExporter.write`."""
    if not isinstance(teacher, SDTeacher):
        raise BootError("Only a LoRA on a Stable Diffusion teacher can be written for diffusers.")
    save_file(common_names(lora), folder / LORA, {"format": "pt"})
    scheduler = teacher.process.one_step(predicts_sample=False)  # a LoRA keeps its teacher's prediction type
    scheduler.save_pretrained(folder / "scheduler")
    facts = _card(teacher, "lora") | {"rank": lora.rank, "scheduler": type(scheduler).__name__}
    facts["size"] = _size(teacher)  # the teacher that it is loaded onto may have another of its own
    facts |= _base(teacher)
    (folder / "README.md").write_text(_LORA_CARD.format(**facts), encoding="utf-8")


def common_names(lora: LoraWeights) -> dict[str, Tensor]:
    """The tensors by the names of kohya's scripts, which every program reads that reads LoRAs: "lora_unet_", the
    module with "_" for each ".", and "lora_down" and "lora_up" where peft has A and B.

    ComfyUI does not know peft's names of attention layers, and goes on without them.
    """
    tensors = {}
    for name, tensor in lora.tensors.items():
        module, part, weight = name.rsplit(".", 2)
        layer = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{layer}.{_KOHYA[part]}.{weight}"] = tensor.contiguous()
        tensors[f"{layer}.alpha"] = torch.tensor(float(lora.rank))
    return tensors


def _base(teacher: SDTeacher) -> dict[str, str]:
    """How the card loads the teacher."""
    if teacher.kind:
        kind = StableDiffusionXLPipeline if len(teacher.text.pairs) > 1 else StableDiffusionPipeline
        return {"pipeline": kind.__name__, "base": f'from_single_file("path/to/{teacher.home.name}")'}
    halves = ', variant="fp16"' if any(variant_of(part) for part in teacher.home.iterdir() if part.is_dir()) else ""
    source = teacher.describe().get("source", "path/to/the/teacher")
    return {"pipeline": "DiffusionPipeline", "base": f'from_pretrained("{source}"{halves})'}


def _card(teacher: SDTeacher, *tags: str) -> dict[str, Any]:
    """Front matter, and the teacher by name."""
    card = teacher.describe()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "one-step", "distillation", "boot", *tags],
        base_model=card.get("source"),
        license=card.get("licence"),
    )
    source = card.get("source")
    named = f"[{source}](https://huggingface.co/{source})" if source else f"`{teacher.home.name}`"
    _, height, width = teacher.spec.sample_shape
    # Of these two pipelines the larger one does not know a size of its own that is no square.
    size = _size(teacher) if len(teacher.text.pairs) > 1 and height != width else ""
    return {"front_matter": data.to_yaml(), "teacher": named, "size": size}


def _size(teacher: SDTeacher) -> str:
    """The size of images, as arguments of a pipeline."""
    _, height, width = (side * teacher.pixels for side in teacher.spec.sample_shape)
    return f"height={height}, width={width}, "


def _guidance(net: UNet2DConditionModel) -> dict[str, Any]:
    """What the user is told of guidance, and a scale to begin with."""
    if not isinstance(given := net.time_embedding.cond_proj, GuidanceInput):
        return {"guidance": "Guidance is part of it: leave the guidance scale at 1.", "scale": 1.0}
    low, high = given.limits
    return {"guidance": f"It takes a guidance scale from {low:g} to {high:g}.", "scale": (low + high) / 2}
