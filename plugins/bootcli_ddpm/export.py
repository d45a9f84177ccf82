"""A student as a diffusers folder that plain `DDIMPipeline` samples in one step."""

from __future__ import annotations

from pathlib import Path

from diffusers import DDIMPipeline, UNet2DModel
from huggingface_hub import ModelCardData
from torch import nn

from bootcli.plugin import BootError, Head, Teacher
from bootcli_ddpm.teacher import DDPMTeacher

_PIPELINE = """\
import torch
from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained("path/to/this/folder")
images = pipeline(num_inference_steps=1, eta=0, generator=torch.manual_seed(0)).images
images[0].save("sample.png")
"""

_BY_HAND = """\
import torch
from diffusers import DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("path/to/this/folder", subfolder="unet")
scheduler = DDIMScheduler.from_pretrained("path/to/this/folder", subfolder="scheduler")
scheduler.set_timesteps(1)

labels = torch.tensor([0])  # one class per image, from 0 to {last}
noise = torch.randn(len(labels), {channels}, {height}, {width}, generator=torch.manual_seed(0))
t = scheduler.timesteps[0]
with torch.no_grad():
    output = unet(noise, t, class_labels=labels).sample
images = scheduler.step(output, t, noise).prev_sample.clamp(-1, 1)  # in [-1, 1]
"""

_CARD = """\
---
{front_matter}
---

# A one-step image model

This model makes an image from noise in **one** call of its network. It was distilled with bootcli from a diffusion
model{source}, without any training images. It is a `UNet2DModel` like its teacher, {shape}.

{note}

```python
{snippet}```

More steps do not improve the images: the network expects pure noise, at the last timestep only.
"""


def write_diffusers(teacher: Teacher, net: nn.Module, head: Head, folder: Path) -> None:
    """Write unet/, scheduler/, model_index.json and a model card; see `Exporter.write`.

    The scheduler is the teacher's, set up so that its one step is the student's head: the last timestep, down to clean
    data, without clipping on the way (the pipeline clamps its images at the end, as bootcli does).

    Args:
        teacher: a `DDPMTeacher`.
        net: the student's network at t_min.
        head: ``x0`` if the network's output is the image, ``native`` if it is what the teacher predicts.
        folder: where to write; empty.
    """
    if not isinstance(teacher, DDPMTeacher) or not isinstance(net, UNet2DModel):
        raise BootError("Only a student of a DDPM teacher can be written as a diffusers DDIMPipeline.")
    scheduler = teacher.process.one_step(predicts_sample=head == "x0")
    DDIMPipeline(net, scheduler).save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").write_text(_model_card(teacher), encoding="utf-8")


def _model_card(teacher: Teacher) -> str:
    card = teacher.describe()
    spec, source = teacher.spec, card.get("source")
    channels, height, width = spec.sample_shape
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers:DDIMPipeline", "one-step", "distillation", "boot"],
        base_model=source,
        license=card.get("licence"),
    )
    if spec.conditioning == "class":
        note = "It takes a class label, which `DDIMPipeline` cannot pass on; so use the network itself:"
        snippet = _BY_HAND.format(last=spec.num_classes - 1, channels=channels, height=height, width=width)
    else:
        note, snippet = "With [diffusers](https://github.com/huggingface/diffusers):", _PIPELINE
    return _CARD.format(
        front_matter=data.to_yaml(),
        source=f" ([{source}](https://huggingface.co/{source}))" if source else "",
        shape=f"{height}x{width} pixels, {channels} channel{'s' if channels > 1 else ''}",
        note=note,
        snippet=snippet,
    )
