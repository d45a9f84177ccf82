"""Progress that nobody reads any more stops no run; the rest of `bootcli.ui` is seen in the tests of the commands."""

from __future__ import annotations

import io
import sys

import pytest

from bootcli import ui
from bootcli.pipelines.events import Comparing, Warned


class Gone(io.StringIO):
    """A stream whose reader went away."""

    encoding = "utf-8"
    tries = 0

    def __init__(self, error: Exception, *, terminal: bool) -> None:
        super().__init__()
        self.error = error
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.tries += 1
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "I/O error"), ValueError("closed")])
def test_progress_that_cannot_be_shown_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, *, terminal: bool
) -> None:
    stderr = Gone(error, terminal=terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stderr)
    with ui.training() as show:
        for event in (Comparing(1000), Warned(3, "it goes wrong")):
            show(event)
    with ui.counter() as count:
        for done in (1, 2):
            count("images", done, 2)
    assert stderr.tries >= 4
