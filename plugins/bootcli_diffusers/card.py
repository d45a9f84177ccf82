"""The model card of a folder of diffusers."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import metadata_load
from yaml import YAMLError

_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)")


def card_of(path: Path) -> dict[str, str]:
    """What the model card and the path say; a teacher without a readable card is no worse for it."""
    try:
        metadata = metadata_load(path / "README.md") if (path / "README.md").is_file() else None
    except (OSError, ValueError, RecursionError, YAMLError):  # unreadable, not UTF-8 or no table, too deep, not YAML
        metadata = None
    licence = metadata.get("license") if metadata else None
    card = {"licence": licence} if isinstance(licence, str) and licence else {}
    hub = next((match for part in path.absolute().parts if (match := _HUB_CACHE.fullmatch(part))), None)
    return card | ({"source": f"{hub[1]}/{hub[2]}"} if hub else {})
