"""Train the embedded `fashion` teacher: an unconditional DDPM on 16x16 Fashion-MNIST, saved as a diffusers folder.

The recipe is DDPM's (Ho et al. 2020, arXiv:2006.11239): linear betas, mean squared error of eps, EMA weights.

    python examples/train_fashion_teacher.py --output fashion-teacher --work runs/teacher --minutes 35
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from fashion_data import RESOLUTION, load_fashion, to_unit
from teacher_training import Batches, Losses, parser, save_curve, save_grid, step_generator, stratified, train
from torch import Tensor

BIN_EDGES = (0, 50, 200, 500, 1000)  # timestep bins of the loss log: the mean over all t hides the hard, low-noise end


def build_unet() -> UNet2DModel:
    """The eps network: 1.54M parameters, attention at the lowest (4x4) resolution only."""
    return UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        dropout=0.0,
    )


def build_scheduler() -> DDPMScheduler:
    """The noise schedule of `google/ddpm-cifar10-32`."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="fixed_large",
        clip_sample=True,
        prediction_type="epsilon",
    )


@torch.no_grad()
def sample_ddim(unet: UNet2DModel, scheduler: DDPMScheduler, noise: Tensor, steps: int) -> Tensor:
    """Deterministic DDIM (eta 0) from `noise` (b, 1, 16, 16) ~ N(0, 1) with trailing timesteps; images in [-1, 1]."""
    ddim = DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", clip_sample=True, set_alpha_to_one=True
    )
    ddim.set_timesteps(steps)
    x = noise
    for t in ddim.timesteps:
        x = ddim.step(unet(x, t).sample, t, x, eta=0.0).prev_sample
    return x.clamp(-1, 1)


def export(ema: UNet2DModel, scheduler: DDPMScheduler, output: Path) -> None:
    """Write the diffusers folder in fp16, file by file, so a reader never sees a half-written file.

    Other files already in `output` (the model card, the feature network) stay.
    """
    half = build_unet().half()
    half.load_state_dict(ema.state_dict())
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))  # same filesystem: rename is atomic
    try:
        DDPMPipeline(unet=half, scheduler=scheduler).save_pretrained(scratch)
        for file in sorted(scratch.rglob("*")):
            if file.is_file():
                target = output / file.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.chmod(0o644)  # safetensors writes 0600
                file.replace(target)
    finally:
        shutil.rmtree(scratch)


def main() -> None:
    """Train, checkpoint, export."""
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, _ = load_fashion(args.data, "train")
    batches = Batches(to_unit(images), args.batch_size, args.seed)
    model, ema, scheduler = build_unet(), build_unet().requires_grad_(False).eval(), build_scheduler()
    ema.load_state_dict(model.state_dict())
    total = int(scheduler.config.num_train_timesteps)

    def losses(step: int, generator: torch.Generator) -> Losses:
        x0 = batches[step]
        eps = torch.randn(x0.shape, generator=generator)
        t = (stratified(len(x0), generator) * total).long().clamp(max=total - 1)
        prediction = model(scheduler.add_noise(x0, eps, t), t).sample
        return Losses(F.mse_loss(prediction.float(), eps, reduction="none").mean(dim=(1, 2, 3)), t)

    minutes = train(args, model, ema, losses, BIN_EDGES, lambda: export(ema, scheduler, args.output))
    noise = torch.randn(128, 1, RESOLUTION, RESOLUTION, generator=step_generator(args.seed, 0))
    save_grid(sample_ddim(ema, scheduler, noise, steps=50), args.work / "samples.png", columns=16)
    log, curve = args.work / "log.jsonl", args.work / "curve.png"
    save_curve(log, curve, "fashion teacher, training loss", "eps mean squared error", "all t", "t in [{})")
    print(f"trained for {minutes:.1f} min, exported to {args.output}")


if __name__ == "__main__":
    main()
