"""Train the embedded `fashion` teacher: an unconditional DDPM on 16x16 Fashion-MNIST, saved as a diffusers folder.

The recipe is DDPM's (Ho et al. 2020, arXiv:2006.11239): linear betas, mean squared error of eps, EMA weights.

    python examples/train_fashion_teacher.py --output fashion-teacher --work runs/teacher --minutes 35

Every random draw is seeded by (seed, step), so `--resume` continues exactly where the last checkpoint stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from fashion_data import DEFAULT_DATA, RESOLUTION, load_fashion, to_uint8, to_unit
from PIL import Image
from torch import Tensor

from bootcli.muon import Muon

BIN_EDGES = (0, 50, 200, 500, 1000)  # timestep bins of the loss log: the mean over all t hides the hard, low-noise end
GRAD_CLIP = 1.0


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


def learning_rate(step: int, progress: float, peak: float, final: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` to `final` as progress goes from 0 to 1."""
    cosine = final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(progress, 1.0)))
    return cosine * min(1.0, (step + 1) / warmup)


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator that depends on (seed, step) alone, so that a resumed run draws what the first would have drawn."""
    return torch.Generator().manual_seed((seed << 32) + step)


def stratified_timesteps(batch: int, total: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `batch` equal strata of 0..total-1: uniform, with less variance than iid draws."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return (u * total).long().clamp(max=total - 1)


class Batches:
    """Shuffled minibatches of float images (n, 1, 16, 16), addressed by step; epoch orders depend on (seed, epoch)."""

    def __init__(self, images: Tensor, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.per_epoch = len(images) // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, step: int) -> Tensor:
        """Images of this step: float32 (batch, 1, 16, 16) in [-1, 1]."""
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = step_generator(self.seed + 1, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=generator)
        return self.images[self._order[k * self.batch_size : (k + 1) * self.batch_size]]


@torch.no_grad()
def update_ema(ema: UNet2DModel, model: UNet2DModel, step: int, decay: float) -> None:
    """ema <- d * ema + (1 - d) * model, with d ramping up so that the random start is soon forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


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


def save_grid(images: Tensor, path: Path, columns: int, scale: int = 3) -> None:
    """Tile images (n, 1, h, w) in [-1, 1] into one PNG, each pixel enlarged `scale` times."""
    n, _, h, w = images.shape
    rows = math.ceil(n / columns)
    canvas = torch.zeros(rows * columns, h, w, dtype=torch.uint8)
    canvas[:n] = to_uint8(images)[:, 0]
    tiled = canvas.reshape(rows, columns, h, w).permute(0, 2, 1, 3).reshape(rows * h, columns * w)
    size = (columns * w * scale, rows * h * scale)
    Image.fromarray(tiled.numpy()).resize(size, Image.Resampling.NEAREST).save(path, optimize=True)


def save_curve(log: Path, path: Path) -> None:
    """Plot the loss log (jsonl) against the step, overall and per timestep bin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], color="black", label="all t")
    for name in rows[0]["bins"]:
        axes.plot(steps, [row["bins"][name] for row in rows], linewidth=1, label=f"t in [{name.replace('-', ', ')})")
    axes.set(yscale="log", xlabel="step", ylabel="eps mean squared error", title="fashion teacher, training loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


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


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a crash leaves either the old file or the new one."""
    scratch = path.with_suffix(".tmp")
    torch.save(state, scratch)
    scratch.replace(path)


def parse_args() -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the idx .gz files")
    parser.add_argument("--output", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint, the log and the PNGs")
    parser.add_argument("--steps", type=int, default=8000, help="optimiser steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop early, fully annealed, at this budget")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--lr-final", type=float, default=1e-5)
    parser.add_argument("--warmup", type=int, default=200, help="warm-up steps")
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="autocast of the forward pass")
    parser.add_argument("--log-every", type=int, default=50, help="steps averaged per line of the log")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (and exports)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    return parser.parse_args()


def main() -> None:
    """Train, checkpoint, export."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.work / "state.pt", args.work / "log.jsonl"

    images, _ = load_fashion(args.data, "train")
    batches = Batches(to_unit(images), args.batch_size, args.seed)
    model, ema, scheduler = build_unet(), build_unet().requires_grad_(False).eval(), build_scheduler()
    ema.load_state_dict(model.state_dict())
    optimizer = Muon(model.parameters(), lr=args.lr, betas=(0.9, 0.99))
    total_timesteps = int(scheduler.config.num_train_timesteps)

    step, spent = 0, 0.0  # spent: seconds of training in earlier runs
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        if state["seed"] != args.seed or state["batch_size"] != args.batch_size:
            raise SystemExit("--resume needs the checkpoint's --seed and --batch-size")
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        # Lines logged after the checkpoint will be produced again.
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in kept))
    else:
        log.write_text("")

    def save(seconds: float) -> None:
        save_state(
            checkpoint,
            {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
                "seed": args.seed,
                "batch_size": args.batch_size,
            },
        )
        export(ema, scheduler, args.output)

    edges = torch.tensor(BIN_EDGES[1:-1])
    names = [f"{a}-{b}" for a, b in itertools.pairwise(BIN_EDGES)]
    sums, counts = torch.zeros(len(names)), torch.zeros(len(names))
    start = time.monotonic() - spent
    while True:
        # Both budgets drive the schedule, so a run cut by the clock still ends at the final learning rate.
        seconds = time.monotonic() - start
        progress = max(step / args.steps, seconds / (60 * args.minutes))
        if progress >= 1:
            break
        lr = learning_rate(step, progress, args.lr, args.lr_final, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        generator = step_generator(args.seed, step)
        x0 = batches[step]
        eps = torch.randn(x0.shape, generator=generator)
        t = stratified_timesteps(len(x0), total_timesteps, generator)
        xt = scheduler.add_noise(x0, eps, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            prediction = model(xt, t).sample
        loss = F.mse_loss(prediction.float(), eps, reduction="none").mean(dim=(1, 2, 3))
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        update_ema(ema, model, step, args.ema_decay)
        step += 1

        index = torch.bucketize(t, edges, right=True)
        sums.index_add_(0, index, loss.detach())
        counts.index_add_(0, index, torch.ones_like(loss))
        if step % args.log_every == 0:
            bins = {name: round(value, 5) for name, value in zip(names, (sums / counts).tolist(), strict=True)}
            mean = float(sums.sum() / counts.sum())
            row = {"step": step, "seconds": round(seconds, 1), "lr": lr, "loss": round(mean, 5), "bins": bins}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            sums.zero_()
            counts.zero_()
        if step % args.save_every == 0:
            save(time.monotonic() - start)

    save(time.monotonic() - start)
    noise = torch.randn(128, 1, RESOLUTION, RESOLUTION, generator=step_generator(args.seed, 0))
    save_grid(sample_ddim(ema, scheduler, noise, steps=50), args.work / "samples.png", columns=16)
    save_curve(log, args.work / "curve.png")
    print(f"{step} steps in {(time.monotonic() - start) / 60:.1f} min, exported to {args.output}")


if __name__ == "__main__":
    main()
