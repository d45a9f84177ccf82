"""What a plugin registers: a light description of one teacher family. Importing it costs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bootcli.teachers.protocol import Teacher


@dataclass(frozen=True)
class Alias:
    """A short name for a teacher.

    Args:
        source: a hub id, or an absolute folder (a teacher that ships inside the plugin).
        summary: one line for `bootcli teachers`.
    """

    source: str
    summary: str


@dataclass(frozen=True)
class TeacherFamily:
    """The object behind an entry point of the group ``bootcli.teachers``.

    Keep the module that defines it light: import torch inside ``load`` and ``build``, never at the top, since
    `bootcli teachers` and usage errors load it.

    Args:
        name: the family, equal to the entry point's name ("ddpm").
        summary: one line: what it accepts.
        accepts: layouts it reads, one line each.
        matches: cheap test of a local folder or file; reads at most small JSON files and never raises on junk. Of a
            hub repository it sees the ``*.json`` and the card alone: where they do not show the family, it is read
            as ``family:owner/name``.
        load: local folder or file -> teacher with weights. Raises `BootError` for a broken one.
        build: ``Teacher.config()`` -> the same teacher with untrained weights, for a stored student. Runs no code
            from the folder, and reads no value of a parameter: they are on the meta device.
        aliases: short names.
        hub_weights: which files hold the weights in a hub repository: alternatives, the best first, each a tuple of
            patterns. They are fetched in turn, beside its ``*.json`` and card, until ``complete``.
        complete: whether a folder has all weights that ``load`` needs; None: any file of an alternative is all.
        hub_files: patterns of other files that ``load`` needs.
    """

    name: str
    summary: str
    accepts: tuple[str, ...]
    matches: Callable[[Path], bool]
    load: Callable[[Path], Teacher]
    build: Callable[[Mapping[str, object]], Teacher]
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    hub_weights: tuple[tuple[str, ...], ...] = ()
    hub_files: tuple[str, ...] = ()
    complete: Callable[[Path], bool] | None = None

    def build_empty(self, config: Mapping[str, object]) -> Teacher:
        """`build`, with parameters that take no memory and no time to fill: weights are to take their place."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            return self.build(config)


def readers_of(path: Path, families: Sequence[TeacherFamily]) -> tuple[list[TeacherFamily], list[str]]:
    """The families that read ``path``, and a line on each that raised instead of an answer, which are none of them."""
    readers, broken = [], []
    for family in families:
        try:
            if family.matches(path):
                readers.append(family)
        except Exception as error:  # whatever a third party's code does: it stands in nobody's way
            broken.append(f"(not tried: {family.name}, {type(error).__name__}: {error})")
    return readers, broken
