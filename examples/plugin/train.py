"""Trains the teacher by flow matching: python train.py FOLDER (a minute or two on one CPU core).

Lipman et al. 2023 (arXiv 2210.02747): x_t = (1 - t) x_0 + t eps, and the network regresses the velocity eps - x_0.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from bootcli_glyphs import CONFIG, WEIGHTS
from bootcli_glyphs.drawing import CLASSES, draw
from bootcli_glyphs.teacher import GlyphTeacher
from safetensors.torch import save_file

STEPS, BATCH, PEAK, LABEL_DROPOUT, EMA = 1500, 128, 5e-3, 0.1, 0.995


def main(folder: Path) -> None:
    generator = torch.manual_seed(0)
    teacher = GlyphTeacher(width=32, depth=4)
    net, average = teacher.net.train(), copy.deepcopy(teacher.net)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, STEPS)
    for step in range(STEPS):
        label = torch.randint(len(CLASSES), (BATCH,), generator=generator)
        x_0 = draw(label, generator)
        eps, t = torch.randn(x_0.shape, generator=generator), torch.rand(BATCH, generator=generator)
        label[torch.rand(BATCH, generator=generator) < LABEL_DROPOUT] = len(CLASSES)
        x_t = torch.lerp(x_0, eps, t[:, None, None, None])
        loss = (net(x_t, t, label) - (eps - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
        for mean, now in zip(average.parameters(), net.parameters(), strict=True):
            mean.data.lerp_(now.data, 1 - min(EMA, (1 + step) / (10 + step)))
        if step % 500 == 499:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(teacher.config()) + "\n", encoding="utf-8")
    save_file(average.state_dict(), folder / WEIGHTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
