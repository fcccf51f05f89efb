"""What every benchmark comes to: rows of numbers with their counts and intervals, and the rule in words.

A number here is a share of two sums, in percent unless its name says otherwise; its interval resamples the units that
belong together (the questions on one picture). A share of nothing has no value: it is None, and not 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmalign.evaluate.statistics import Interval, share_interval

PERCENT = 100.0


@dataclass(frozen=True)
class Number:
    """`value` None: nothing to divide by. `interval` None: a number made of others, such as a mean of rows."""

    value: float | None
    interval: Interval | None = None
    # how many the tables show
    decimals: int = 1

    def __str__(self) -> str:
        return "-" if self.value is None else f"{self.value:.{self.decimals}f}"

    def to_dict(self) -> dict[str, Any]:
        low, high = (self.interval.low, self.interval.high) if self.interval else (None, None)
        return {"value": self.value, "low": low, "high": high}


@dataclass(frozen=True)
class Part:
    """One line of the table: all of the benchmark, or a category of it."""

    name: str
    items: int
    numbers: Mapping[str, Number]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What one set of answers comes to. `rule`: how the numbers come about; `notes`: what a reader should know of these
    answers."""

    parts: list[Part]
    rule: str
    notes: list[str] = field(default_factory=list)


def share(terms: Iterable[tuple[float, float, Hashable]], scale: float = PERCENT, decimals: int = 1) -> Number:
    """scale * sum of tops / sum of bottoms, from (top, bottom, unit) each; units enter a resample whole."""
    tops: dict[Hashable, float] = {}
    bottoms: dict[Hashable, float] = {}
    for top, bottom, unit in terms:
        tops[unit] = tops.get(unit, 0.0) + top
        bottoms[unit] = bottoms.get(unit, 0.0) + bottom
    units = [unit for unit, bottom in bottoms.items() if bottom]
    if not units:
        return Number(None, None, decimals)
    bounds = (0.0, 1.0) if all(tops[unit] <= bottoms[unit] for unit in units) else None
    found = share_interval(
        np.array([tops[unit] for unit in units]), np.array([bottoms[unit] for unit in units]), units, bounds
    )
    interval = Interval(scale * found.value, scale * found.low, scale * found.high)
    return Number(interval.value, interval, decimals)


def mean(numbers: Iterable[Number]) -> Number:
    """The plain mean of some numbers; None where one of them has no value."""
    values = [number.value for number in numbers]
    known = [value for value in values if value is not None]
    return Number(sum(known) / len(known) if known and len(known) == len(values) else None)


def some(things: Iterable[object], limit: int = 5) -> str:
    """The first few, for messages."""
    listed = list(things)
    more = f" and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return ", ".join(str(one) for one in listed[:limit]) + more
