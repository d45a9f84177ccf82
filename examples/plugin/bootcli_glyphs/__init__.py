"""What bootcli sees before it loads anything: one `TeacherFamily`. Importing this costs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bootcli.plugin import Alias, TeacherFamily

if TYPE_CHECKING:
    from bootcli.plugin import Teacher

__all__ = ["family"]

CONFIG, WEIGHTS = "glyphs.json", "glyphs.safetensors"


def _matches(path: Path) -> bool:
    return (path / CONFIG).is_file()  # not the weights: of a hub repository they are fetched after this


def _load(path: Path) -> Teacher:
    from bootcli_glyphs.teacher import load

    return load(path)


def _build(config: Mapping[str, object]) -> Teacher:
    from bootcli_glyphs.teacher import build

    return build(config)


family = TeacherFamily(
    name="glyphs",
    summary="flow-matching mixers that draw 8x8 glyphs",
    accepts=(f"a folder with {CONFIG} and {WEIGHTS}, as train.py writes it",),
    matches=_matches,
    load=_load,
    build=_build,
    aliases={"glyphs-8": Alias(str(Path(__file__).parent / "weights"), "dots, rings, bars and crosses, 8x8 grey")},
    hub_weights=((WEIGHTS,),),
)
