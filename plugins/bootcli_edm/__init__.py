"""EDM teachers (Karras et al. 2022): NVlabs' network pickles, read without executing them, and their descendants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bootcli.plugin import Alias, TeacherFamily
from bootcli_edm.files import network_file

if TYPE_CHECKING:
    from bootcli.plugin import Teacher

__all__ = ["family"]


def _matches(path: Path) -> bool:
    return network_file(path) is not None


def _load(path: Path) -> Teacher:
    from bootcli_edm.teacher import load

    return load(path)


def _build(config: Mapping[str, object]) -> Teacher:
    from bootcli_edm.teacher import build

    return build(config)


family = TeacherFamily(
    name="edm",
    summary="EDM networks: DDPM++, NCSN++ and ADM under EDM's, VP's, VE's or iDDPM's preconditioning",
    accepts=(
        "an EDM network pickle (.pkl) of NVlabs' code; nothing in it is executed",
        "an EDM teacher of openai/consistency_models (edm_*_ema.pt)",
        "bootcli's own form of either (.safetensors)",
        "a folder with one of these",
        "a hub repository with one of these, as edm:owner/name: its small files do not show it",
    ),
    matches=_matches,
    load=_load,
    build=_build,
    aliases={
        "fashion-edm": Alias(
            str(Path(__file__).parent / "fashion"), "Fashion-MNIST, 16x16 grey, ten classes, built in: no download"
        )
    },
    hub_weights=(("*.safetensors",), ("*.pkl",), ("*.pt", "*.pth")),
    complete=_matches,
)
