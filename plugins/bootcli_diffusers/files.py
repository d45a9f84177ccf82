"""The configurations of a diffusers folder. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from bootcli.plugin import BootError


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises `BootError` where the file is missing, unreadable or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BootError(
            f"{path} is missing.",
            "Download or save the folder again, as a whole.",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BootError(f"{path} is not readable JSON: {error}", "Download or save the folder again.") from None
    if not isinstance(content, dict):
        raise BootError(f"{path} does not hold a JSON object.", "Download or save the folder again.")
    return content
