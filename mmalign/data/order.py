"""The order of a data set: a pure function of (seed, epoch) and of how many records each shard holds.

Shards are permuted, grouped into windows of `window` shards, and the records of a window are permuted together. So
records mix across shards while only a window's shards are read at a time. Ranks, workers, batch size and resuming play
no part: slot p of the endless sequence of epochs is the same record for everyone.

Memory: 8 bytes per record of the current window and of the one before, and 8 bytes per shard.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Place:
    """Where the record of a slot is: `offset` counts the records of shard number `shard`."""

    epoch: int
    shard: int
    offset: int


class Order:
    """`Order(counts, window, seed).place(slot)` for any slot >= 0, computed window by window."""

    def __init__(self, counts: Sequence[int], window: int, seed: int):
        if window < 1:
            raise ValueError(f"data.window is {window}; expected the number of shards to shuffle together, at least 1")
        if not sum(counts):
            raise ValueError("the data set has no records; check data.shards")
        self.counts = np.asarray(counts, dtype=np.int64)
        self.window = window
        self.seed = seed
        self.records = int(self.counts.sum())
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[tuple[int, int], _Window] = {}

    def place(self, slot: int) -> Place:
        epoch, within = divmod(slot, self.records)
        plan = self._epoch(epoch)
        number = bisect_right(plan.starts, within) - 1
        window = self._window(epoch, number)
        flat = int(window.permutation[within - plan.starts[number]])
        nth = bisect_right(window.firsts, flat) - 1
        return Place(epoch, window.shards[nth], flat - window.firsts[nth])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = _permutation(len(self.counts), self.seed, epoch, "shards")
            firsts = _firsts(self.counts[shards])
            _remember(self._epochs, epoch, _Epoch(shards, firsts[:: self.window]))
        return self._epochs[epoch]

    def _window(self, epoch: int, number: int) -> _Window:
        if (epoch, number) not in self._windows:
            shards = self._epoch(epoch).shards[number * self.window : (number + 1) * self.window]
            counts = self.counts[shards]
            permutation = _permutation(int(counts.sum()), self.seed, epoch, f"window {number}")
            window = _Window(permutation, shards.tolist(), _firsts(counts))
            _remember(self._windows, (epoch, number), window)
        return self._windows[epoch, number]


@dataclass(frozen=True)
class _Epoch:
    shards: np.ndarray  # shard numbers in the order of this epoch
    starts: list[int]  # the first slot of each window, counted within the epoch


@dataclass(frozen=True)
class _Window:
    permutation: np.ndarray  # place in the window to number of the record, counted over the window's shards
    shards: list[int]
    firsts: list[int]  # the number of each shard's first record


def _firsts(counts: np.ndarray) -> list[int]:
    """Where each run starts when runs of these lengths lie end to end."""
    return (np.cumsum(counts) - counts).tolist()


def draw_of(seed: int, epoch: int, shard: str, offset: int) -> int:
    """The 63-bit seed of everything random about one record in one epoch."""
    return _digest(seed, epoch, shard, offset) >> 1


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def _permutation(length: int, *parts: object) -> np.ndarray:
    # Raw words of a bit generator are promised to stay the same across numpy versions; Generator.permutation is not.
    words = np.random.PCG64(_digest(*parts)).random_raw(length)
    return np.argsort(words, kind="stable")


def _remember(cache: dict, key: object, value: object) -> None:
    """Keeps two: slots near a boundary go back and forth between neighbours."""
    while len(cache) >= 2:
        cache.pop(next(iter(cache)))
    cache[key] = value
