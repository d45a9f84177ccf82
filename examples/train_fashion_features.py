"""Train the feature network of a fashion teacher and store its reference statistics.

    python examples/train_fashion_features.py --output bootcli/teachers/features/fashion-cnn-64
    python examples/train_fashion_features.py --captioned --epochs 5 --output NEW

The training images' statistics become the Frechet reference; the 10,000 test images, which neither the teacher nor this
network trained on, give the floor: the distance that a perfect model would still show.

The features of 10,000 single images are what precision and recall compare with. They are training images, drawn at
random, for three reasons: the teacher learned their distribution; it is the set of the Frechet reference, so that all
numbers speak of one thing; and the test images stay free to show what real images score that no network has seen. The
feature network trained on them too, but that does not show: test images score what other training images score.

    python examples/train_fashion_features.py --output FOLDER --manifold-only

writes these features alone, for the network that is in the folder.

The second command made `fashion-colour-cnn-64`, for a teacher of `train_sd_teacher.py`: coloured pieces of clothing
before a background (`captioned_fashion.py`), of which there are two for each of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from captioned_fashion import NAMES, SIDE, draw
from fashion_data import CLASSES, DEFAULT_DATA, Split, load_fashion, read_idx
from safetensors.torch import save_file
from torch import Tensor

from bootcli.manifold import MOST_ROWS, manifold_of, precision_recall, some_rows
from bootcli.teachers.feature_folder import (
    CONFIG,
    MANIFOLD,
    REFERENCE,
    WEIGHTS,
    FeatureNetwork,
    load_feature_network,
    save_manifold,
    sha256,
)

ARCHITECTURE: dict[str, object] = {"channels": [32, 64, 64], "features": 64, "classes": 10, "size": 16}
CAPTIONED = ARCHITECTURE | {"size": SIDE, "colours": 3}


def load_captioned(folder: Path, split: Split, copies: int) -> tuple[Tensor, Tensor]:
    """Coloured pieces, uint8 (n, 3, 32, 32), and their classes (n,): ``copies`` of each, coloured and placed anew."""
    pieces = read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:, None].repeat(copies, 1, 1, 1)
    classes = read_idx(folder / f"{split}-labels-idx1-ubyte.gz").long().repeat(copies)
    seed = {"train": 0, "t10k": 1}[split]
    return draw(pieces, classes, torch.Generator().manual_seed(seed)).images, classes


@torch.no_grad()
def extract(network: FeatureNetwork, images: Tensor, batch_size: int = 1000) -> Tensor:
    """Features (n, d) in float64 of uint8 images (n, c, h, w)."""
    return torch.cat([network(batch.float()) for batch in images.split(batch_size)]).double()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), as `np.cov(rowvar=False)` defines it."""
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) between two Gaussians (Heusel et al. 2017, arXiv:1706.08500).

    tr (A B)^(1/2) is computed from the symmetric A^(1/2) B A^(1/2), which has the same eigenvalues as A B.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Translate every image (b, 1, 16, 16) by its own -1, 0 or 1 pixel per axis, filling with the black background;
    coloured ones are at places of their own already."""
    if images.shape[1] > 1:
        return images
    b, _, h, w = images.shape
    padded = F.pad(images, (1, 1, 1, 1))
    dy, dx = torch.randint(0, 3, (2, b, 1, 1), generator=generator)
    rows, columns = torch.arange(h)[None, :, None] + dy, torch.arange(w)[None, None, :] + dx
    return padded[torch.arange(b)[:, None, None], 0, rows, columns][:, None]


@torch.no_grad()
def accuracy(network: FeatureNetwork, images: Tensor, labels: Tensor) -> float:
    """Fraction of uint8 images (n, c, h, w) classified as their labels (n,)."""
    predicted = torch.cat([network.logits(batch.float()).argmax(1) for batch in images.split(1000)])
    return float((predicted == labels).double().mean())


def write_manifold(folder: Path, network: FeatureNetwork, images: Tensor, test_images: Tensor) -> None:
    """Keep features of `MOST_ROWS` of the training images (n, c, h, w) and print how other real images score."""
    features = extract(network, images)
    save_manifold(folder, some_rows(features, MOST_ROWS))
    (folder / MANIFOLD).chmod(0o644)  # safetensors writes 0600
    kept, rest = some_rows(features, 2 * MOST_ROWS).split(MOST_ROWS)
    for name, others in (("test images", extract(network, test_images)), ("other training images", rest)):
        quality = precision_recall(manifold_of(kept), manifold_of(others))
        print(f"{len(others):,} {name}: precision {quality.precision:.3f}, recall {quality.recall:.3f}")


def parse_args() -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the idx .gz files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--captioned", action="store_true", help="coloured pieces, for fashion-sd")
    parser.add_argument("--manifold-only", action="store_true", help=f"only write {MANIFOLD}, for the network there")
    return parser.parse_args()


def main() -> None:
    """Train, take the reference statistics, save."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = load_captioned(args.data, "train", 2) if args.captioned else load_fashion(args.data, "train")
    test_images, test_labels = (
        load_captioned(args.data, "t10k", 1) if args.captioned else load_fashion(args.data, "t10k")
    )
    architecture = CAPTIONED if args.captioned else ARCHITECTURE
    if args.manifold_only:
        write_manifold(args.output, load_feature_network(args.output), images, test_images)
        return

    network = FeatureNetwork(**architecture)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=1e-2)
    per_epoch = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * per_epoch)
    start = time.monotonic()
    for epoch in range(args.epochs):
        network.train()
        order = torch.randperm(len(images), generator=generator)[: per_epoch * args.batch_size]
        total = 0.0
        for index in order.split(args.batch_size):
            batch = shift(images[index].float(), generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.captioned):
                logits = network.logits(batch)
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        network.eval()
        seconds, test = time.monotonic() - start, accuracy(network, test_images, test_labels)
        print(f"epoch {epoch + 1}: loss {total / per_epoch:.4f}, test accuracy {test:.4f}, {seconds:.0f} s", flush=True)

    mean, cov = statistics(extract(network, images))
    held_out = extract(network, test_images)
    floor = {str(n): round(frechet_distance(*statistics(held_out[:n]), mean, cov), 4) for n in (10_000, 5_000)}

    args.output.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), args.output / WEIGHTS)
    save_file({"mean": mean, "cov": cov}, args.output / REFERENCE)
    config = {
        "name": "fashion-colour-cnn-64" if args.captioned else "fashion-cnn-64",
        "architecture": architecture,
        "parameters": sum(p.numel() for p in network.parameters()),
        "test_accuracy": accuracy(network, test_images, test_labels),
        "source": f"the {len(images):,} training images of Fashion-MNIST at 16x16"
        if not args.captioned
        else f"{len(images):,} coloured training images of Fashion-MNIST at {SIDE}x{SIDE}",
        "reference_images": len(images),
        "floor": floor,  # distance of the first n test images to the reference
        "sha256": sha256(args.output / WEIGHTS),
    }
    if args.captioned:
        config["words"] = [NAMES[name] for name in CLASSES]
    scratch = args.output / f".{CONFIG}"
    scratch.write_text(json.dumps(config, indent=2) + "\n")
    scratch.replace(args.output / CONFIG)
    write_manifold(args.output, network, images, test_images)
    for name in (CONFIG, WEIGHTS, REFERENCE):
        (args.output / name).chmod(0o644)  # safetensors writes 0600
    print(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
