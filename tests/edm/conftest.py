"""Tiny EDM networks, in files as the training code writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_edm.architecture import Architecture
from edm_pickle import write_pickle

REFERENCE = Path(__file__).with_name("reference")

SONG: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 3,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "augment_dim": 2,
    "dropout": 0.1,
}
ADM: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 3,
    "model_type": "DhariwalUNet",
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "label_dropout": 0.1,
}

MakePickle = Callable[..., Path]


@pytest.fixture
def make_pickle(tmp_path: Path) -> MakePickle:
    """``make_pickle(class_name, arguments, snapshot=False)``: a file with random weights."""

    def make(
        class_name: str = "EDMPrecond", arguments: dict[str, Any] | None = None, *, snapshot: bool = False
    ) -> Path:
        torch.manual_seed(0)
        architecture = Architecture(class_name, SONG if arguments is None else arguments)
        path = tmp_path / "network.pkl"
        write_pickle(path, architecture, architecture.build(), snapshot=snapshot)
        return path

    return make
