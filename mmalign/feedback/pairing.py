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

    # best_worst: one pair, the highest score against the lowest; all: every pair of candidates above the margin.
    rule: Literal["best_worst", "all"] = "best_worst"
    # The scores of a pair must differ by more than this; what differs less is a tie. In units of the scorer.
    margin: float = 0.0


@dataclass(frozen=True)
class Pairing:
    """`preferred` holds (chosen, rejected) places of candidates; `ties` counts the pairs dropped for lack of margin."""

    preferred: tuple[tuple[int, int], ...]
    ties: int


def pair(scores: Sequence[float], settings: PairingSettings) -> Pairing:
    """The preferred pairs of one prompt. Among equal scores the first candidate stands for all of them.

    Raises ValueError on a score that is not finite, on fewer than two scores and on a negative margin.
    """
    if not settings.margin >= 0:
        raise ValueError(f"pairing.margin is {settings.margin}; expected 0 or more, in units of the scorer")
    if len(scores) < 2:
        raise ValueError(f"a preference needs at least 2 candidates per prompt, got {len(scores)}")
    for place, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"the score of candidate {place} is {score}; a preference needs finite scores")
    places = range(len(scores))
    if settings.rule == "best_worst":
        contests = [(max(places, key=scores.__getitem__), min(places, key=scores.__getitem__))]
    else:
        contests = [sorted(both, key=lambda place: -scores[place]) for both in itertools.combinations(places, 2)]
    preferred = tuple((high, low) for high, low in contests if scores[high] - scores[low] > settings.margin)
    return Pairing(preferred, ties=len(contests) - len(preferred))
