"""Why a file is not read."""

from __future__ import annotations


class Refused(Exception):
    """What a file holds that is not read: it would run code, or it is not what it should be. The message says it."""


def shown(text: object, limit: int = 60) -> str:
    """Words of a file as they may stand in a message: short, and without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in f"{text!s:.{limit}}")
