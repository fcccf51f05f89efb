"""From the scores of one prompt's candidates to preferred pairs.

Refuses NaN and infinite scores: they would compare as neither above nor below and silently become ties or preferences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PairingSettings:
    """How the scores of a record become pairs."""

    # best_worst: one pair, the highest score against the lowest; all: every pair of candidates above the margin;
    # length_balanced: of those the ones that keep chosen and rejected texts of a shard equally long on the whole.
    rule: Literal["best_worst", "all", "length_balanced"] = "best_worst"
    # The scores of a pair must differ by more than this; what differs less is a tie. In units of the scorer.
    margin: float = 0.0
    # length_balanced: at most so many pairs of a prompt
    pairs: int = 1
    # length_balanced: no pair may push the chosen texts of a shard more words than this, in all, above or below the
    # rejected ones; null: the best pair there is is always taken
    max_excess: int | None = None


@dataclass(frozen=True)
class Pairing:
    """`preferred` holds (chosen, rejected) places of candidates; `ties` counts the pairs dropped for lack of margin,
    `unbalanced` those dropped for their lengths."""

    preferred: tuple[tuple[int, int], ...]
    ties: int
    unbalanced: int = 0


@dataclass
class Balance:
    """How many more words the chosen texts have than the rejected ones, over all pairs so far."""

    excess: int = 0


def pair(scores: Sequence[float], settings: PairingSettings) -> Pairing:
    """The preferred pairs of one prompt. Among equal scores the first candidate stands for all of them.

    Raises ValueError on a score that is not finite, on fewer than two scores, on a negative margin and on the rule
    length_balanced, which `pair_balanced` follows.
    """
    _check(scores, settings)
    places = range(len(scores))
    if settings.rule == "best_worst":
        contests = [(max(places, key=scores.__getitem__), min(places, key=scores.__getitem__))]
    elif settings.rule == "all":
        contests = _contests(scores)
    else:
        raise ValueError(f"pairing.rule {settings.rule} needs the lengths of texts; these candidates have none")
    preferred = tuple((high, low) for high, low in contests if scores[high] - scores[low] > settings.margin)
    return Pairing(preferred, ties=len(contests) - len(preferred))


def pair_balanced(
    scores: Sequence[float], lengths: Sequence[int], settings: PairingSettings, balance: Balance
) -> Pairing:
    """At most `settings.pairs` of the pairs above the margin: one after the other the pair that brings `balance`
    nearest to zero, among equals the one with the widest margin. `balance`, which is updated, knows earlier prompts.

    A policy that learns from such pairs is not told that short answers are good, as it is where fewer claims mean fewer
    false ones (RLAIF-V balances lengths too, arXiv 2405.17220; the rule is ours). Raises ValueError as `pair` does.
    """
    _check(scores, settings)
    contests = _contests(scores)
    left = [(high, low) for high, low in contests if scores[high] - scores[low] > settings.margin]
    ties, unbalanced = len(contests) - len(left), 0
    preferred: list[tuple[int, int]] = []
    while left and len(preferred) < settings.pairs:
        after = {both: balance.excess + lengths[both[0]] - lengths[both[1]] for both in left}
        best = min(left, key=lambda both: (abs(after[both]), scores[both[1]] - scores[both[0]]))
        excess = abs(after[best])
        if settings.max_excess is not None and excess > max(settings.max_excess, abs(balance.excess)):
            unbalanced = len(left)
            break
        balance.excess = after[best]
        preferred.append(best)
        left.remove(best)
    return Pairing(tuple(preferred), ties, unbalanced)


def _contests(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Every two candidates, the better one first."""
    both = itertools.combinations(range(len(scores)), 2)
    return [(first, second) if scores[first] >= scores[second] else (second, first) for first, second in both]


def _check(scores: Sequence[float], settings: PairingSettings) -> None:
    if not settings.margin >= 0:
        raise ValueError(f"pairing.margin is {settings.margin}; expected 0 or more, in units of the scorer")
    if settings.pairs < 1 or (settings.max_excess is not None and settings.max_excess < 0):
        raise ValueError("pairing.pairs must be 1 or more, pairing.max_excess 0 or more (or null)")
    if len(scores) < 2:
        raise ValueError(f"a preference needs at least 2 candidates per prompt, got {len(scores)}")
    for place, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"the score of candidate {place} is {score}; a preference needs finite scores")
