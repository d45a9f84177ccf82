"""Why a file is not read."""

from __future__ import annotations


class Refused(Exception):
    """What a file holds that is not read: it would run code, or it is not what it should be. The message says it."""


_PLAIN = (str, bytes, int, float, type(None), Exception)


def shown(text: object, limit: int = 60) -> str:
    """Words of a file as they may stand in a message: short, and without what a terminal would obey.

    Of what nests only the type: a file of few bytes can hold what is endless when it is written out.
    """
    flat = isinstance(text, _PLAIN) or (
        isinstance(text, list | tuple) and all(isinstance(each, _PLAIN) for each in text)
    )
    try:
        words = str(text) if flat else type(text).__name__
    except ValueError:  # a number of thousands of digits
        words = type(text).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in words[:limit])
