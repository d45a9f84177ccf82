"""Shuffled epochs: each prompt once, and a draw depends on its place alone."""

from __future__ import annotations

import pytest
import torch

from bootcli.deck import Deck
from bootcli.trainer import stream


def deck(size: int, seed: int = 0) -> Deck:
    return Deck(size, lambda epoch: stream(seed, 0, epoch))


def test_every_prompt_once_before_any_comes_again() -> None:
    drawn = deck(7).take(28).reshape(4, 7)
    assert all(epoch.sort().values.equal(torch.arange(7)) for epoch in drawn)
    assert len({tuple(epoch.tolist()) for epoch in drawn}) > 1, "each epoch has an order of its own"
    assert not drawn.flatten().equal(deck(7, seed=1).take(28))


@pytest.mark.parametrize("sizes", [(1,) * 50, (3, 20, 7, 20), (49, 1)])
def test_draws_do_not_depend_on_how_they_are_taken(sizes: tuple[int, ...]) -> None:
    split = deck(6)
    assert torch.cat([split.take(size) for size in sizes]).equal(deck(6).take(50))
    again = deck(6)
    again.drawn = 17
    assert again.take(33).equal(deck(6).take(50)[17:])


def test_a_million_are_shuffled_once_an_epoch() -> None:
    orders = []
    large = Deck(1_000_000, lambda epoch: orders.append(epoch) or stream(0, 0, epoch))  # type: ignore[func-returns-value]
    large.drawn = 999_990
    for _ in range(100):
        large.take(8)
    assert orders == [0, 1]


def test_what_comes_is_known() -> None:
    some = deck(10)
    some.take(7)
    assert some.upcoming(7, 8).equal(torch.unique(deck(10).take(15)[7:]))
    assert some.upcoming(7, 20).equal(torch.arange(10)), "two epochs hold at least a whole one"
    assert some.drawn == 7
