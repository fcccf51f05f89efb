"""Base beside aligned, picture by picture: how many prompts were mended or broken, and a fair choice to look at.

Pictures are drawn at random (seeded) in proportion to their outcome, never picked by hand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmalign.evaluate.suite import Judged, Run

# outcome -> (base right, aligned right)
OUTCOMES = {
    "mended": (False, True),
    "broken": (True, False),
    "right in both": (True, True),
    "wrong in both": (False, False),
}


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side. `sample` are random pairs of all; `by_outcome` some of each outcome, empty if the judge
    gives no verdict; `counts` how many of the `n` prompts have it."""

    base: str
    name: str
    # what a reader shall see instead of the two names
    labels: tuple[str, str]
    seed: int | None
    guidance: float | None
    n: int
    sample: tuple[tuple[Judged, Judged], ...]
    by_outcome: dict[str, tuple[tuple[Judged, Judged], ...]]
    counts: dict[str, int]


def compare(base: Run, aligned: Run, count: int = 6, each: int = 6, seed: int = 0) -> Comparison:
    """`count` pairs from everywhere and up to `each` per outcome. Raises ValueError where prompts or seeds differ."""
    pairs = list(zip(base.judged, aligned.judged, strict=False))
    if len(base.judged) != len(aligned.judged) or any(
        (first.prompt, first.seed) != (second.prompt, second.seed) for first, second in pairs
    ):
        raise ValueError(f"runs {base.name!r} and {aligned.name!r} were not judged on the same prompts and seeds")
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    groups = {
        name: [(first, second) for first, second in shuffled if (first.correct, second.correct) == outcome]
        for name, outcome in OUTCOMES.items()
    }
    counts = {name: len(group) for name, group in groups.items()} if any(groups.values()) else {}
    return Comparison(
        base=base.name,
        name=aligned.name,
        labels=(base.shown_as, aligned.shown_as),
        seed=aligned.seed,
        guidance=aligned.guidance,
        n=len(pairs),
        sample=tuple(_in_proportion(list(groups.values()), count) if counts else shuffled[:count]),
        by_outcome={name: tuple(groups[name][:each]) for name in counts if groups[name]},
        counts=counts,
    )


def _in_proportion(groups: Sequence[Sequence[tuple[Judged, Judged]]], count: int) -> list[tuple[Judged, Judged]]:
    """`count` pairs, each group by its share (largest remainders), in the order of the groups."""
    total = sum(map(len, groups))
    shares = [len(group) * min(count, total) / total for group in groups]
    places = [int(share) for share in shares]
    missing = min(count, total) - sum(places)
    for index in sorted(range(len(groups)), key=lambda index: places[index] - shares[index])[:missing]:
        places[index] += 1
    return [pair for group, wanted in zip(groups, places, strict=True) for pair in group[:wanted]]
