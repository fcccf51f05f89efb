"""From judged samples of several models, on the same prompts and seeds, to one table with intervals.

Refuses what would make the table lie: other prompts or seeds than the base's, missing samples, scores that are not
finite, a model without a base at its guidance scale.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.evaluate.diversity import diversity, diversity_gain, variety
from mmalign.evaluate.statistics import (
    DIFFERENCE,
    UNIT,
    Interval,
    mean_interval,
    paired_difference,
    share_interval,
    win_rate,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Truth:
    """Whether one fact that the prompt states holds in the sample. `kind` is e.g. object, attribute or relation."""

    kind: str
    text: str
    holds: bool


@dataclass(frozen=True)
class Judged:
    """One sample with what a scorer or oracle found. What a judge does not know stays empty."""

    prompt: str
    kind: str
    seed: int
    score: float
    correct: bool | None = None
    facts: tuple[Truth, ...] = ()
    # What the sample shows, for diversity: two samples differ if their contents do.
    content: Hashable = None
    image: Image | Path | None = None


@dataclass(frozen=True)
class Run:
    """One model's judged samples. `seed` is the training seed (None for a model that was not trained here).

    `repeated` are several samples each of some of the prompts; they tell how much these differ, and count for nothing
    else. `label` is what a reader shall see instead of the name.
    """

    name: str
    judged: Sequence[Judged]
    seed: int | None = None
    guidance: float | None = None
    label: str | None = None
    repeated: Sequence[Judged] = ()

    @property
    def shown_as(self) -> str:
        return self.label or self.name

    @property
    def several(self) -> Sequence[Judged]:
        """The samples in which a prompt may come more than once."""
        return self.repeated or self.judged


@dataclass(frozen=True)
class Row:
    """One line of the result table. Rates are shares from 0 to 1; gains are paired differences to the base.

    `seeds` are the training seeds in the row; a row with several pools them (`seed` is None, `n` counts all samples).
    `prompts` counts the distinct ones. `accuracy` and what follows from it is None where the judge gives scores only;
    the comparison is None in the base's own row. `diversity` is the mean distance between two pictures of one prompt,
    `variety` how often two right ones show different content; both are None where no prompt has two of them. `label` is
    the name for readers.
    """

    name: str
    label: str
    seed: int | None
    seeds: tuple[int, ...]
    guidance: float | None
    n: int
    prompts: int
    accuracy: Interval | None
    score: Interval
    diversity: Interval | None
    variety: Interval | None
    gain: Interval | None = None
    score_gain: Interval | None = None
    win_rate: Interval | None = None
    diversity_gain: Interval | None = None
    by_kind: dict[str, Interval] = field(default_factory=dict)
    by_fact: dict[str, Interval] = field(default_factory=dict)
    gain_by_kind: dict[str, Interval] = field(default_factory=dict)
    gain_by_fact: dict[str, Interval] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an interval becomes {value, low, high}."""
        return dataclasses.asdict(self)


def summarise(runs: Sequence[Run], base: str = "base", bounds: tuple[float, float] | None = UNIT) -> list[Row]:
    """The table: a row per run, models in the order of their first run, and a row that pools the seeds of each model
    that has several.

    The run called `base` with the same guidance scale is what each run is held against, sample by sample. `bounds` are
    the least and greatest possible score (None if unknown, e.g. for CLIP).
    """
    bases = {run.guidance: run for run in runs if run.name == base}
    for run in runs:
        _check(run, bases, base)
    models: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        models.setdefault((run.name, run.guidance), []).append(run)
    rows = []
    for group in models.values():
        seeds = [run.seed for run in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"two runs are called {group[0].name!r} with seed and guidance alike; give them other names"
            )
        against = None if group[0].name == base else bases[group[0].guidance]
        rows += [_row([run], against, bounds) for run in group]
        if len(group) > 1:
            rows.append(_row(group, against, bounds))
    return rows


def _check(run: Run, bases: dict[float | None, Run], base: str) -> None:
    place = f"run {run.name!r} (seed {run.seed}, guidance {run.guidance})"
    if not run.judged:
        raise ValueError(f"{place} has no judged samples")
    if run.guidance not in bases:
        raise ValueError(f"{place} has nothing to be compared with: no run {base!r} at guidance {run.guidance}")
    for one in run.judged:
        if not math.isfinite(one.score):
            raise ValueError(f"{place}: the score of {one.prompt!r}, seed {one.seed}, is {one.score}")
    if len({one.correct is None for one in run.judged}) > 1:
        raise ValueError(f"{place}: some samples have a verdict and others have none")
    against = bases[run.guidance]
    for own, wanted in ((run.judged, against.judged), (run.repeated, against.repeated)):
        if [(one.prompt, one.seed) for one in own] != [(one.prompt, one.seed) for one in wanted]:
            raise ValueError(f"{place} was not judged on the prompts and seeds of {base!r}, in the same order")


def _row(group: Sequence[Run], against: Run | None, bounds: tuple[float, float] | None) -> Row:
    judged = [one for run in group for one in run.judged]
    has_verdict = judged[0].correct is not None
    seeds = tuple(run.seed for run in group if run.seed is not None)
    row = Row(
        name=group[0].name,
        label=group[0].shown_as,
        seed=group[0].seed if len(group) == 1 else None,
        seeds=seeds,
        guidance=group[0].guidance,
        n=len(judged),
        prompts=len(set(_prompts(judged))),
        accuracy=mean_interval(_correct(judged), _prompts(judged)) if has_verdict else None,
        score=mean_interval(_scores(judged), _prompts(judged), bounds),
        diversity=diversity([run.several for run in group]),
        variety=variety([run.several for run in group]),
        by_kind=_by(judged, _kinds, _kind_rate) if has_verdict else {},
        by_fact=_by(judged, _fact_kinds, _fact_rate),
    )
    if against is None:
        return row
    row = dataclasses.replace(row, diversity_gain=diversity_gain([run.several for run in group], against.several))
    return _compare(row, judged, list(against.judged) * len(group), bounds)


def _compare(row: Row, judged: list[Judged], base: list[Judged], bounds: tuple[float, float] | None) -> Row:
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    has_verdict = row.accuracy is not None and base[0].correct is not None
    prompts = _prompts(judged)
    return dataclasses.replace(
        row,
        gain=paired_difference(_correct(judged), _correct(base), prompts) if has_verdict else None,
        score_gain=paired_difference(_scores(judged), _scores(base), prompts, span),
        win_rate=win_rate(_scores(judged), _scores(base), prompts),
        gain_by_kind=_by(judged, _kinds, _kind_rate, base) if has_verdict else {},
        gain_by_fact=_by(judged, _fact_kinds, _fact_rate, base),
    )


# -- shares within a kind ----------------------------------------------------------------------------------------------

# (what is true, out of how many) in one sample
Count = tuple[float, float]


def _by(
    judged: Sequence[Judged],
    kinds_of: Callable[[Judged], Iterable[str]],
    rate: Callable[[Judged, str], Count],
    base: Sequence[Judged] | None = None,
) -> dict[str, Interval]:
    """The share in each kind that occurs, or its paired difference to `base`, in order of first appearance."""
    shares = {}
    for kind in dict.fromkeys(itertools.chain.from_iterable(map(kinds_of, judged))):
        counts = np.array([rate(one, kind) for one in judged], dtype=float)
        if base is not None:
            counts[:, 0] -= [rate(one, kind)[0] for one in base]
        here = np.flatnonzero(counts[:, 1])
        prompts = [judged[int(place)].prompt for place in here]
        bounds = UNIT if base is None else DIFFERENCE
        shares[kind] = share_interval(counts[here, 0], counts[here, 1], prompts, bounds)
    return shares


def _kinds(one: Judged) -> tuple[str, ...]:
    return (one.kind,)


def _kind_rate(one: Judged, kind: str) -> Count:
    return (float(bool(one.correct)), 1.0) if one.kind == kind else (0.0, 0.0)


def _fact_kinds(one: Judged) -> list[str]:
    return [fact.kind for fact in one.facts]


def _fact_rate(one: Judged, kind: str) -> Count:
    holds = [fact.holds for fact in one.facts if fact.kind == kind]
    return float(sum(holds)), float(len(holds))


def _prompts(judged: Sequence[Judged]) -> list[str]:
    return [one.prompt for one in judged]


def _scores(judged: Sequence[Judged]) -> np.ndarray:
    return np.array([one.score for one in judged], dtype=float)


def _correct(judged: Sequence[Judged]) -> np.ndarray:
    return np.array([float(bool(one.correct)) for one in judged])
