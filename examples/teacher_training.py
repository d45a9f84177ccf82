"""What the scripts that train embedded teachers share: one loop, seeded by step, that can stop and go on.

Every random draw is seeded by (seed, step), so ``--resume`` continues exactly where the last checkpoint stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fashion_data import DEFAULT_DATA, to_uint8
from PIL import Image
from torch import Tensor, nn

from bootcli.muon import Muon

GRAD_CLIP = 1.0


def learning_rate(step: int, progress: float, peak: float, final: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` to `final` as progress goes from 0 to 1."""
    cosine = final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(progress, 1.0)))
    return cosine * min(1.0, (step + 1) / warmup)


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator that depends on (seed, step) alone, so that a resumed run draws what the first would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def stratified(batch: int, generator: torch.Generator) -> Tensor:
    """One number from each of ``batch`` equal strata of [0, 1): uniform, with less variance than independent draws."""
    return (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch


class Batches:
    """Shuffled minibatches of rows, addressed by step; epoch orders depend on (seed, epoch)."""

    def __init__(self, rows: Tensor, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.per_epoch = len(rows) // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, step: int) -> Tensor:
        """The rows of this step, (batch, ...)."""
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = step_generator(self.seed + 1, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=generator)
        return self.rows[self._order[k * self.batch_size : (k + 1) * self.batch_size]]


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema <- d * ema + (1 - d) * model, with d ramping up so that the random start is soon forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def save_grid(images: Tensor, path: Path, columns: int, scale: int = 3) -> None:
    """Tile images (n, 1, h, w) in [-1, 1] into one PNG, each pixel enlarged `scale` times."""
    n, _, h, w = images.shape
    rows = math.ceil(n / columns)
    canvas = torch.zeros(rows * columns, h, w, dtype=torch.uint8)
    canvas[:n] = to_uint8(images)[:, 0]
    tiled = canvas.reshape(rows, columns, h, w).permute(0, 2, 1, 3).reshape(rows * h, columns * w)
    size = (columns * w * scale, rows * h * scale)
    Image.fromarray(tiled.numpy()).resize(size, Image.Resampling.NEAREST).save(path, optimize=True)


def save_curve(log: Path, path: Path, title: str, ylabel: str, everywhere: str, of_bin: str) -> None:
    """Plot the loss log (jsonl) against the step, overall and per bin of noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], color="black", label=everywhere)
    for name in rows[0]["bins"]:
        axes.plot(steps, [row["bins"][name] for row in rows], linewidth=1, label=of_bin.format(name.replace("-", ", ")))
    axes.set(yscale="log", xlabel="step", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a crash leaves either the old file or the new one."""
    scratch = path.with_suffix(".tmp")
    torch.save(state, scratch)
    scratch.replace(path)


def parser(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """The options of a training script; ``defaults`` replace some of them."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the idx .gz files")
    options.add_argument("--output", type=Path, required=True, help="what to write")
    options.add_argument("--work", type=Path, required=True, help="folder of the checkpoint, the log and the PNGs")
    options.add_argument("--steps", type=int, default=8000, help="optimiser steps")
    options.add_argument("--minutes", type=float, default=math.inf, help="stop early, fully annealed, at this budget")
    options.add_argument("--batch-size", type=int, default=128)
    options.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    options.add_argument("--lr-final", type=float, default=1e-5)
    options.add_argument("--warmup", type=int, default=200, help="warm-up steps")
    options.add_argument("--ema-decay", type=float, default=0.999)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="autocast of the forward pass")
    options.add_argument("--log-every", type=int, default=50, help="steps averaged per line of the log")
    options.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (and exports)")
    options.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work, if there is one")
    options.set_defaults(**defaults)
    return options


@dataclass(frozen=True)
class Losses:
    """Of one batch.

    Args:
        values: one for each sample, (b,), with a gradient.
        noise: how noisy each sample was, (b,): what the bins of the log divide.
    """

    values: Tensor
    noise: Tensor


def train(
    args: argparse.Namespace,
    model: nn.Module,
    ema: nn.Module,
    losses: Callable[[int, torch.Generator], Losses],
    bin_edges: Sequence[float],
    export: Callable[[], None],
) -> float:
    """Train ``model`` and its average, log, checkpoint and export; gives the minutes it took, earlier runs included.

    Args:
        args: of `parser`.
        model, ema: the network and its average, of the same weights.
        losses: the loss of a step, whose draws all come from the generator.
        bin_edges: of the log, in the units of `Losses.noise`.
        export: writes what has been learned; called at every checkpoint.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.work / "state.pt", args.work / "log.jsonl"
    optimizer = Muon(model.parameters(), lr=args.lr, betas=(0.9, 0.99))
    step, spent = 0, 0.0  # spent: seconds of training in earlier runs
    if args.resume and checkpoint.exists():
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
        export()

    edges = torch.tensor(bin_edges[1:-1])
    names = [f"{a:g}-{b:g}" for a, b in itertools.pairwise(bin_edges)]
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
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = losses(step, step_generator(args.seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss.values.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        update_ema(ema, model, step, args.ema_decay)
        step += 1

        index = torch.bucketize(loss.noise, edges, right=True)
        sums.index_add_(0, index, loss.values.detach())
        counts.index_add_(0, index, torch.ones_like(loss.values))
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
    return (time.monotonic() - start) / 60
