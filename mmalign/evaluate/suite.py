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
    """One model's judged samples. `seed` is the training seed (None for a model that was not trained here)."""

    name: str
    judged: Sequence[Judged]
    seed: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the result table. Rates are shares from 0 to 1; gains are paired differences to the base.

    `seeds` are the training seeds in the row; a row with several pools them (`seed` is None, `n` counts all samples).
    `prompts` counts the distinct ones. `accuracy` and what follows from it is None where the judge gives scores only;
    the comparison is None in the base's own row; `diversity` is None where no prompt has two right samples.
    """

    name: str
    seed: int | None
    seeds: tuple[int, ...]
    guidance: float | None
    n: int
    prompts: int
    accuracy: Interval | None
    score: Interval
    diversity: Interval | None
    gain: Interval | None = None
    score_gain: Interval | None = None
    win_rate: Interval | None = None
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
    wanted = [(one.prompt, one.seed) for one in bases[run.guidance].judged]
    if [(one.prompt, one.seed) for one in run.judged] != wanted:
        raise ValueError(f"{place} was not judged on the prompts and seeds of {base!r}, in the same order")


def _row(group: Sequence[Run], against: Run | None, bounds: tuple[float, float] | None) -> Row:
    judged = [one for run in group for one in run.judged]
    has_verdict = judged[0].correct is not None
    seeds = tuple(run.seed for run in group if run.seed is not None)
    row = Row(
        name=group[0].name,
        seed=group[0].seed if len(group) == 1 else None,
        seeds=seeds,
        guidance=group[0].guidance,
        n=len(judged),
        prompts=len(set(_prompts(judged))),
        accuracy=mean_interval(_correct(judged), _prompts(judged)) if has_verdict else None,
        score=mean_interval(_scores(judged), _prompts(judged), bounds),
        diversity=diversity([run.judged for run in group]),
        by_kind=_by(judged, _kinds, _kind_rate) if has_verdict else {},
        by_fact=_by(judged, _fact_kinds, _fact_rate),
    )
    return row if against is None else _compare(row, judged, list(against.judged) * len(group), bounds)


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


def diversity(models: Sequence[Sequence[Judged]]) -> Interval | None:
    """Of two right samples of one prompt by one model, how often do they show different content?

    A prompt with k right samples gives the share of its k (k - 1) / 2 pairs that differ: 0 if the model always draws
    the same picture, 1 if it never repeats itself, whatever k is. Wrong samples are left out, lest errors count as
    variety; where there is no verdict, every sample counts. Averaged over prompts and models; None without two.
    """
    shares, prompts = [], []
    for judged in models:
        contents: dict[str, list[Hashable]] = {}
        for one in judged:
            if one.correct is not False and one.content is not None:
                contents.setdefault(one.prompt, []).append(one.content)
        for prompt, shown in contents.items():
            if len(shown) > 1:
                shares.append(np.mean([first != second for first, second in itertools.combinations(shown, 2)]))
                prompts.append(prompt)
    return mean_interval(np.array(shares), prompts) if shares else None


def _prompts(judged: Sequence[Judged]) -> list[str]:
    return [one.prompt for one in judged]


def _scores(judged: Sequence[Judged]) -> np.ndarray:
    return np.array([one.score for one in judged], dtype=float)


def _correct(judged: Sequence[Judged]) -> np.ndarray:
    return np.array([float(bool(one.correct)) for one in judged])
