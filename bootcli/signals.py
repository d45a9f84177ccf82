"""Ctrl-C and SIGTERM as a wish to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopWish:
    """Holds the signal that arrived, or None."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second one of any kind stops at once."""
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def watch_signals() -> Iterator[StopWish]:
    """Catch SIGINT and SIGTERM while the block runs. Outside the main thread nothing can be caught."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    old = {number: signal.signal(number, wish.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
