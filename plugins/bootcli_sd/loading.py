"""How diffusers and transformers load a part: quietly, and whole or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.utils import logging as diffusers
from transformers.utils import logging as transformers

from bootcli.plugin import BootError

NAMED = 3
"""Tensors that a message names."""
INCOMPLETE = "It is incomplete, or another program renamed them: get it as it was published."


@contextmanager
def quietly() -> Iterator[None]:
    """Without bars and warnings of both, which come back for others: what matters is told of as a `BootError`."""
    before = diffusers.get_verbosity(), transformers.get_verbosity(), diffusers.is_progress_bar_enabled()
    diffusers.set_verbosity_error()
    transformers.set_verbosity_error()
    diffusers.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.set_verbosity(before[0])
        transformers.set_verbosity(before[1])
        if before[2]:
            diffusers.enable_progress_bar()


def check_whole(place: Path, lacking: Collection[str]) -> None:
    """Raise `BootError` where a folder or a file lacks tensors, for which the libraries put random numbers or none."""
    if lacking:
        first = ", ".join(sorted(lacking)[:NAMED]) + (" and others" if len(lacking) > NAMED else "")
        raise BootError(f"{place} lacks {len(lacking)} of the tensors that its model has: {first}.", INCOMPLETE)
