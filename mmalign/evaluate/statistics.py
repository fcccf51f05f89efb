"""How sure a number is: bootstrap 95% intervals for rates, paired differences and win rates.

The unit that is resampled is the *prompt*: several pictures of one prompt are not independent, so they enter or leave a
resample together. Intervals say how far the number would move with other prompts of the same kind; they say nothing of
other training seeds, which is why tables also list every seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap

Values = Float[np.ndarray, " sample"]
CONFIDENCE = 0.95
RESAMPLES = 4000
# With fewer prompts than this, percentile intervals come out visibly too narrow.
ENOUGH_PROMPTS = 30
UNIT = (0.0, 1.0)
DIFFERENCE = (-1.0, 1.0)


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """+1 if all of the interval lies above zero, -1 if below, 0 if it holds zero."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(
    values: Values, prompts: Sequence[Hashable], bounds: tuple[float, float] | None = UNIT, seed: int = 0
) -> Interval:
    """The mean of `values` with its interval, resampling `prompts` (one per value).

    `bounds` are the least and greatest possible values; None if there are none.
    """
    return share_interval(values, np.ones(len(values)), prompts, bounds, seed)


def share_interval(
    sums: Values,
    counts: Values,
    prompts: Sequence[Hashable],
    bounds: tuple[float, float] | None = UNIT,
    seed: int = 0,
) -> Interval:
    """sum(sums) / sum(counts), e.g. true facts over facts, with its interval.

    The percentile bootstrap (Efron 1979) over prompts: 4,000 resamples, seeded. Where every prompt gives the same
    number, no resample can show any doubt; if the bounds are known, the interval then reaches as far as the share of
    unseen prompts can (exact binomial, Clopper and Pearson 1934): 0 of 20 gives [0, 0.17].
    """
    if len(sums) == 0 or not len(sums) == len(counts) == len(prompts):
        raise ValueError(
            f"expected as many sums as counts and prompts, and some: {len(sums)}, {len(counts)}, {len(prompts)}"
        )
    if not (np.isfinite(sums).all() and np.isfinite(counts).all()):
        raise ValueError("an interval needs finite values; NaN or infinity came")
    sums, counts = _per_prompt(sums, prompts), _per_prompt(counts, prompts)
    value = float(sums.sum() / counts.sum())
    if np.ptp(sums / counts) < 1e-12:
        return _without_spread(value, len(sums), bounds)
    result = bootstrap(
        (sums, counts),
        lambda top, bottom, axis: top.sum(axis) / bottom.sum(axis),
        n_resamples=RESAMPLES,
        batch=500,
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(result.low), float(result.high))


def paired_difference(
    values: Values,
    base: Values,
    prompts: Sequence[Hashable],
    bounds: tuple[float, float] | None = DIFFERENCE,
    seed: int = 0,
) -> Interval:
    """The mean of values[i] - base[i], both measured on the same prompt and seed."""
    return mean_interval(_paired(values, base), prompts, bounds, seed)


def win_rate(values: Values, base: Values, prompts: Sequence[Hashable], seed: int = 0) -> Interval:
    """How often values[i] beats base[i]; a tie counts one half. 0.5 is no difference."""
    return mean_interval((1 + np.sign(_paired(values, base))) / 2, prompts, UNIT, seed)


def _paired(values: Values, base: Values) -> Values:
    if len(values) != len(base):
        raise ValueError(f"a paired comparison needs equal lengths, got {len(values)} and {len(base)}")
    return values - base


def _per_prompt(values: Values, prompts: Sequence[Hashable]) -> Values:
    """Values added up within each prompt, in order of first appearance."""
    places: dict[Hashable, int] = {}
    inverse = [places.setdefault(prompt, len(places)) for prompt in prompts]
    return np.bincount(inverse, weights=values)


def _without_spread(value: float, count: int, bounds: tuple[float, float] | None) -> Interval:
    if bounds is None:
        return Interval(value, value, value)
    # With this share of prompts elsewhere, `count` in a row would still agree with probability 2.5%.
    unseen = 1 - ((1 - CONFIDENCE) / 2) ** (1 / count)
    low, high = bounds
    return Interval(value, value - unseen * (value - low), value + unseen * (high - value))
