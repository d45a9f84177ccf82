"""The settings that come with a teacher's files, whoever made those."""

from __future__ import annotations

import json
from pathlib import Path

from bootcli.errors import BootError

RECIPE = "recipe.json"


def read_recipe(folder: Path) -> dict[str, object]:
    """The settings in a folder's ``recipe.json``; none where there is no such file.

    Raises `BootError` for a broken one, and for one that names prompts: they might be any file of the user. What a
    family's code adds is its own.
    """
    file = folder / RECIPE
    if not file.is_file():
        return {}
    try:
        recipe = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BootError(f"{file} is not readable JSON: {error}", "Correct or remove it.") from None
    if not isinstance(recipe, dict):
        raise BootError(f"{file} is no table of settings.", "Correct or remove it.")
    if "prompts" in recipe:
        raise BootError(f"{file} names prompts, which is for the user to say.", "Take them out of it.")
    return recipe
