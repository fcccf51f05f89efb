"""The order: every epoch a permutation, mixed across a window, the same for everyone and for ever."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.data import Order, draw_of

PINNED = [(2, 2), (0, 2), (2, 1), (2, 3), (0, 1), (0, 0), (2, 0), (1, 0), (1, 1)]
PINNED_DRAW = 5263705564029192622

COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any)


@given(COUNTS, st.integers(1, 15), st.integers(0, 2**40))
def test_every_epoch_has_every_record_once(counts: list[int], window: int, seed: int):
    order = Order(counts, window, seed)
    everything = Counter((shard, offset) for shard, count in enumerate(counts) for offset in range(count))
    for epoch in range(3):
        places = [order.place(epoch * order.records + slot) for slot in range(order.records)]
        assert {place.epoch for place in places} == {epoch}
        assert Counter((place.shard, place.offset) for place in places) == everything


@given(COUNTS, st.integers(1, 15), st.lists(st.integers(0, 200), max_size=30))
def test_a_place_does_not_depend_on_what_was_asked_before(counts: list[int], window: int, slots: list[int]):
    order = Order(counts, window, 3)
    assert [order.place(slot) for slot in slots] == [Order(counts, window, 3).place(slot) for slot in slots]


@given(COUNTS, st.integers(1, 5))
def test_only_a_window_of_shards_is_read_at_a_time(counts: list[int], window: int):
    order = Order(counts, window, 0)
    shards = [order.place(slot).shard for slot in range(order.records)]
    seen = list(dict.fromkeys(shards))
    filled = [shard for shard in order._epoch(0).shards.tolist() if counts[shard]]
    assert sorted(seen) == sorted(filled)
    runs = [shards.index(shard) for shard in seen], [len(shards) - 1 - shards[::-1].index(shard) for shard in seen]
    for slot in range(order.records):
        alive = sum(first <= slot <= last for first, last in zip(*runs, strict=True))
        assert alive <= window


def test_records_mix_across_shards_and_epochs_differ():
    order = Order([100] * 8, 8, 0)
    first = [order.place(slot) for slot in range(800)]
    assert len({place.shard for place in first[:40]}) == 8
    second = [order.place(800 + slot) for slot in range(800)]
    assert [(place.shard, place.offset) for place in first] != [(place.shard, place.offset) for place in second]
    other = [Order([100] * 8, 8, 1).place(slot) for slot in range(800)]
    assert other != first


def test_the_order_never_changes_between_versions():
    """A checkpoint of last year must resume this year: these numbers are fixed for good."""
    order = Order([3, 2, 4], 2, 7)
    places = [(place.shard, place.offset) for place in (order.place(slot) for slot in range(9))]
    assert places == PINNED
    assert draw_of(7, 1, "000001.tar", 3) == PINNED_DRAW


def test_draws_are_63_bits_and_differ():
    draws = {draw_of(seed, epoch, "0.tar", place) for seed in range(4) for epoch in range(4) for place in range(50)}
    assert len(draws) == 800
    assert all(0 <= draw < 2**63 for draw in draws)
    assert draw_of(0, 0, "0.tar", 0) != draw_of(0, 0, "1.tar", 0)


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="data.window"):
        Order([1], 0, 0)
    with pytest.raises(ValueError, match="no records"):
        Order([0, 0], 1, 0)
