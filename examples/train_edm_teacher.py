"""Train the embedded `fashion-edm` teacher: a class-conditional EDM network on 16x16 Fashion-MNIST, as an EDM pickle.

The recipe is EDM's (Karras et al. 2022, arXiv:2206.00364, section 5): log-normal noise levels, the weight that makes
the loss of every level equal at the start, averaged weights; a tenth of the images without their label, so that it can
be guided.

    python examples/train_edm_teacher.py --output edm-fashion.pkl --work runs/edm-teacher --minutes 40
"""

from __future__ import annotations

import copy
import math

import torch
from bootcli_edm.architecture import Architecture
from bootcli_edm.preconditioning import Preconditioned
from bootcli_edm.teacher import EDMTeacher
from edm_pickle import write_pickle
from fashion_data import CLASSES, RESOLUTION, load_fashion, to_unit
from teacher_training import Batches, Losses, parser, save_curve, save_grid, step_generator, stratified, train
from torch import Tensor
from torch.nn.functional import one_hot

from bootcli.maths.sampling import heun
from bootcli.teachers.view import TeacherView

SIGMA_DATA = 0.7  # of the images in [-1, 1], most of which is black
P_MEAN, P_STD = -1.2, 1.2
LABEL_DROPOUT = 0.1
BIN_EDGES = (0.0, 0.1, 0.5, 2.0, math.inf)


def architecture() -> Architecture:
    """DDPM++ at about the size of the `fashion` teacher, attention at the lowest (4x4) resolution only."""
    return Architecture(
        "EDMPrecond",
        {
            "img_resolution": RESOLUTION,
            "img_channels": 1,
            "label_dim": len(CLASSES),
            "sigma_data": SIGMA_DATA,
            "model_type": "SongUNet",
            "model_channels": 32,
            "channel_mult": [1, 2, 2],
            "num_blocks": 1,
            "attn_resolutions": [4],
            "dropout": 0.0,
            "label_dropout": LABEL_DROPOUT,
        },
    )


@torch.no_grad()
def sample(net: Preconditioned, noise: Tensor, classes: list[int], steps: int) -> Tensor:
    """EDM's Heun from ``noise`` (b, 1, 16, 16) ~ N(0, 1); images in [-1, 1]."""
    teacher = EDMTeacher(architecture(), net, {})
    view, schedule, cond = TeacherView(teacher), teacher.spec.schedule, teacher.condition(classes)
    *_, x = heun(lambda x, t: view.x0(x, t, cond), schedule, schedule.prior_scale * noise, schedule.grid(steps))
    return x.clamp(-1, 1)


def main() -> None:
    """Train, checkpoint, export."""
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, classes = load_fashion(args.data, "train")
    pictures, labels = (
        Batches(rows, args.batch_size, args.seed) for rows in (to_unit(images), one_hot(classes, len(CLASSES)).float())
    )
    model = architecture().build()
    ema = copy.deepcopy(model).requires_grad_(False)

    def losses(step: int, generator: torch.Generator) -> Losses:
        x_0, label = pictures[step], labels[step]
        u = stratified(len(x_0), generator).clamp(1e-6, 1 - 1e-6)
        sigma = (P_MEAN + P_STD * math.sqrt(2) * torch.erfinv(2 * u - 1)).exp()
        eps = torch.randn(x_0.shape, generator=generator)
        label = label * (torch.rand(len(x_0), 1, generator=generator) >= LABEL_DROPOUT)
        denoised = model(x_0 + sigma[:, None, None, None] * eps, sigma, label)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        return Losses(weight * (denoised - x_0).square().mean(dim=(1, 2, 3)), sigma)

    minutes = train(args, model, ema, losses, BIN_EDGES, lambda: write_pickle(args.output, architecture(), ema))
    noise = torch.randn(120, 1, RESOLUTION, RESOLUTION, generator=step_generator(args.seed, 0))
    drawn = sample(ema, noise, [i % len(CLASSES) for i in range(len(noise))], steps=18)
    save_grid(drawn, args.work / "samples.png", columns=2 * len(CLASSES))
    log, curve = args.work / "log.jsonl", args.work / "curve.png"
    save_curve(log, curve, "fashion-edm teacher, training loss", "weighted squared error", "all sigma", "sigma in [{})")
    print(f"trained for {minutes:.1f} min, exported to {args.output}")


if __name__ == "__main__":
    main()
