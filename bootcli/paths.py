"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str) -> Path:
    """A path with ``~`` replaced; that of a user who is not known here stays as it is, and leads nowhere."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # pathlib's raises RuntimeError for such a user
