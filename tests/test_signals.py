"""Signals while a run is watched: the first is a wish, what comes after it is not always one more."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from bootcli.signals import watch_signals


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """As a terminal has them: the tests themselves may run under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_wish_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with watch_signals() as wish:
        os.kill(os.getpid(), number)
        assert wish.signum == number
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once() -> None:
    with watch_signals() as wish:
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert wish.signum == signal.SIGHUP


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_a_hangup_that_comes_as_well_is_no_second_wish(first: signal.Signals) -> None:
    """A shell sends it on to what the terminal had told already; systemd sends it after SIGTERM."""
    with watch_signals() as wish:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGHUP)
        assert wish.signum == first


def test_nohup_stays_in_force() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with watch_signals() as wish:
        os.kill(os.getpid(), signal.SIGHUP)
        assert wish.signum is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
