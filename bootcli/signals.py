"""Ctrl-C, SIGTERM and a closed terminal as a wish to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANGUP = getattr(signal, "SIGHUP", None)
"""Of a terminal that closes; Windows has none."""


class StopWish:
    """Holds the signal that arrived, or None."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second one stops at once, unless it is the hangup that a shell sends again."""
        if self.signum is None:
            self.signum = signum
        elif signum != HANGUP:
            raise KeyboardInterrupt


@contextmanager
def watch_signals() -> Iterator[StopWish]:
    """Catch SIGINT, SIGTERM and, unless nohup has it ignored, SIGHUP while the block runs. Outside the main thread
    nothing can be caught."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    watched = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        watched.append(HANGUP)
    old = {number: signal.signal(number, wish.handle) for number in watched}
    try:
        yield wish
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
