"""What a plugin has to test: the contract, with one call, and whatever only it knows."""

from pathlib import Path

import pytest
import torch
from bootcli_glyphs import family
from bootcli_glyphs.drawing import CLASSES, draw

from bootcli.plugin import BootError, UsageError, check_teacher

SHIPPED = Path(family.aliases["glyphs-8"].source)


def test_contract() -> None:
    check_teacher(family.load(SHIPPED), family)


def test_shipped_teacher_is_trained() -> None:
    """Given nearly clean pictures, the prediction is their noise less the picture."""
    teacher, generator = family.load(SHIPPED), torch.Generator().manual_seed(0)
    labels = torch.arange(64) % len(CLASSES)
    x_0 = draw(labels, generator)
    eps, t = torch.randn(x_0.shape, generator=generator), torch.full((64,), 0.3, dtype=torch.float64)
    with torch.no_grad():
        velocity = teacher.predict(teacher.net, 0.7 * x_0 + 0.3 * eps, t, teacher.condition(labels.tolist()))
    assert (velocity - (eps - x_0)).square().mean() < 0.5


def test_labels_are_checked() -> None:
    teacher = family.load(SHIPPED)
    assert teacher.condition([0, None]).tensors["label"].tolist() == [0, len(CLASSES)]
    with pytest.raises(UsageError, match="no glyph"):
        teacher.condition([len(CLASSES)])


def test_broken_folder_is_reported(tmp_path: Path) -> None:
    for file in SHIPPED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    with pytest.raises(BootError, match="not a whole glyph teacher"):
        family.load(tmp_path)
