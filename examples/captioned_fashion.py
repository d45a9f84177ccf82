"""Fashion-MNIST with captions: coloured pieces of clothing at a place before a background, 32x32, and what they are.

Images are made on the way from a seed, so that there are as many as training asks for: which piece, its colour, where
it is, and the colour behind it. A caption tells some of that in one of several ways; what it leaves out is drawn at
random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fashion_data import CLASSES
from torch import Tensor

SIDE, PIECE = 32, 20
NAMES = {name: name for name in CLASSES} | {"trouser": "pair of trousers"}
COLOURS = {
    "red": (220, 40, 40),
    "green": (50, 160, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 210, 60),
    "purple": (150, 70, 190),
    "orange": (240, 140, 40),
    "pink": (240, 150, 190),
    "brown": (130, 90, 60),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
PLACES = {"on the left": (6, 0), "on the right": (6, 12), "at the top": (0, 6), "at the bottom": (12, 6), "": (6, 6)}
TEMPLATES = (
    "a photo of a {piece}",
    "a {colour} {piece}",
    "a photo of a {colour} {piece}",
    "a {colour} {piece} on a {background} background",
    "a {colour} {piece} {place}",
    "a {piece} {place}, {background} background",
    "{colour} {piece} {place} on a {background} background",
)


@dataclass(frozen=True)
class Batch:
    """Images and what is on them.

    Args:
        images: uint8 (n, 3, 32, 32).
        captions: one for each.
        classes: of the piece, (n,), int64.
    """

    images: Tensor
    captions: list[str]
    classes: Tensor


def draw(pieces: Tensor, classes: Tensor, generator: torch.Generator) -> Batch:
    """Colour and place these pieces.

    Args:
        pieces: uint8 (n, 1, 28, 28).
        classes: (n,).
        generator: of colours, places and captions.
    """
    n = len(pieces)
    shade = F.interpolate(
        pieces.float() / 255, size=(PIECE, PIECE), mode="bilinear", antialias=True, align_corners=False
    )

    def chosen(count: int) -> Tensor:
        return torch.randint(count, (n,), generator=generator)

    colour, background, place, template = map(chosen, (len(COLOURS), len(BACKGROUNDS), len(PLACES), len(TEMPLATES)))
    mask = torch.zeros(n, 1, SIDE, SIDE)
    captions = []
    for i in range(n):
        top, left = list(PLACES.values())[place[i]]
        mask[i, :, top : top + PIECE, left : left + PIECE] = shade[i]
        words = {
            "piece": NAMES[CLASSES[classes[i]]],
            "colour": list(COLOURS)[colour[i]],
            "background": list(BACKGROUNDS)[background[i]],
            "place": list(PLACES)[place[i]],
        }
        captions.append(" ".join(TEMPLATES[template[i]].format(**words).replace(" ,", ",").split()))
    of_piece, behind = (torch.tensor(list(table.values()))[row].float()[:, :, None, None]
                        for table, row in ((COLOURS, colour), (BACKGROUNDS, background)))  # fmt: skip
    images = behind * (1 - mask) + of_piece * mask
    return Batch(images.round().to(torch.uint8), captions, classes)


def all_captions() -> list[str]:
    """Every caption there is, once."""
    found = {
        " ".join(
            template.format(piece=piece, colour=colour, background=background, place=place).replace(" ,", ",").split()
        )
        for template in TEMPLATES
        for piece in NAMES.values()
        for colour in COLOURS
        for background in BACKGROUNDS
        for place in PLACES
    }
    return sorted(found)
