"""How often a model's descriptions of world scenes are false, how much they say, and how that compares with the base.

Rates are per distinct stated fact: a fact that a description repeats counts once, so that repetition gains nothing.
What a model leaves out is seen in the coverage, which therefore stands beside every rate. Models are compared scene by
scene: each resample of the bootstrap draws scenes, and with a scene the answers of both models. A rate that does not
exist, because nothing of that kind was stated, is None, never 0.

Refuses runs on other scenes than the base's or in another order, and runs with missing answers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import bootstrap

from mmalign.evaluate.statistics import CONFIDENCE, RESAMPLES, UNIT, Interval, Values, share_interval
from mmalign.world.description import KINDS, tally
from mmalign.world.scene import Scene

if TYPE_CHECKING:
    from PIL.Image import Image

# What an aligned model shall reach: every rate lower by this share of the base's, with an interval below zero ...
FEWER = 0.30
# ... the coverage at most this far below the base's ...
COVERAGE_LOST = 0.03
# ... and the length at most this share longer or shorter.
LENGTH_OFF = 0.10
_ROUNDING = 1e-9

# column -> a sum per scene
_Table = dict[str, Values]


@dataclass(frozen=True)
class DescribedRun:
    """One model's descriptions, one per scene. `seed` is the training seed (None for a model not trained here);
    `lengths` are tokens, `images` the pictures that it saw; `label` is what a reader shall see."""

    name: str
    label: str
    seed: int | None
    texts: Sequence[str]
    scenes: Sequence[Scene]
    lengths: Sequence[int]
    images: Sequence[Image]


@dataclass(frozen=True)
class Goals:
    """Which goals a row reaches. A rate that cannot be compared with the base's reaches none."""

    rates: dict[str, bool]
    coverage: bool
    length: bool
    met: bool


@dataclass(frozen=True)
class DescriptionRow:
    """One line of the table. Dicts are by kind of fact: object, attribute, relation.

    A row with several `seeds` pools them (`seed` is None; `n` counts all answers, `scenes` the distinct scenes).
    `rates` are the shares of distinct stated facts that are false, `stated` how many of these a description has.
    `length` is in tokens. `malformed` is the share of sentences outside the grammar, `repeated` that of sentences
    that say nothing new, `empty` that of answers without a word. What has no denominator is None.

    Against the base, None in its own rows: `changes` is each rate over the base's, minus 1 (-0.3: 30% lower); its upper
    end is infinite where the base's rate may be zero. `coverage_change` is a difference, `length_ratio` a quotient.
    """

    name: str
    label: str
    seed: int | None
    seeds: tuple[int, ...]
    n: int
    scenes: int
    rates: dict[str, Interval | None]
    stated: dict[str, float]
    coverage: Interval
    length: float
    malformed: float | None
    repeated: float | None
    empty: float
    changes: dict[str, Interval | None] | None = None
    coverage_change: Interval | None = None
    length_ratio: Interval | None = None
    goals: Goals | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an interval becomes {value, low, high}, an infinite end null."""
        return _plain(dataclasses.asdict(self))


def summarise_descriptions(runs: Sequence[DescribedRun], base: str = "base") -> list[DescriptionRow]:
    """A row per run, models in the order of their first run, and after them a row that pools a model's seeds.

    Every run is held against the model called `base`, all of whose seeds count if there are several.
    """
    _check(runs, base)
    tables = [_measure(run) for run in runs]
    models: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        models.setdefault(run.name, []).append(place)
    against = _mean([tables[place] for place in models[base]])
    rows = []
    for name, places in models.items():
        groups = [[place] for place in places] + ([places] if len(places) > 1 else [])
        for group in groups:
            row = _row([runs[place] for place in group], own := _mean([tables[place] for place in group]))
            rows.append(row if name == base else _compare(row, own, against))
    return rows


def _check(runs: Sequence[DescribedRun], base: str) -> None:
    if base not in [run.name for run in runs]:
        raise ValueError(
            f"no run is called {base!r}, so there is nothing to compare with: {[run.name for run in runs]}"
        )
    seen = set()
    for run in runs:
        place = f"run {run.name!r} (seed {run.seed})"
        if (run.name, run.seed) in seen:
            raise ValueError(f"two runs are called {run.name!r} with seed {run.seed}; give them other names or seeds")
        seen.add((run.name, run.seed))
        sizes = {name: len(getattr(run, name)) for name in ("texts", "scenes", "lengths", "images")}
        if not run.texts or len(set(sizes.values())) > 1:
            raise ValueError(f"{place} needs one text, length and image per scene, and some: it has {sizes}")
        if list(run.scenes) != list(runs[0].scenes):
            raise ValueError(f"{place} does not describe the scenes of {runs[0].name!r} in the same order")
        if any(length < 0 for length in run.lengths):
            raise ValueError(f"{place} has a negative length; lengths are numbers of tokens")


# -- counting ----------------------------------------------------------------------------------------------------------


def _measure(run: DescribedRun) -> _Table:
    """What the answers to each distinct scene state, added up."""
    places: dict[Scene, int] = {}
    where = [places.setdefault(scene, len(places)) for scene in run.scenes]
    columns: dict[str, list[float]] = {}
    for text, scene, length in zip(run.texts, run.scenes, run.lengths, strict=True):
        for column, value in _count(text, scene, length).items():
            columns.setdefault(column, []).append(value)
    return {column: np.bincount(where, weights=values) for column, values in columns.items()}


def _count(text: str, scene: Scene, length: int) -> dict[str, float]:
    found = tally([(text, scene)])
    return {
        **{f"stated {kind}": found.stated[kind] for kind in KINDS},
        **{f"false {kind}": found.false[kind] for kind in KINDS},
        "answers": 1,
        "coverage": found.coverage,
        "length": length,
        "sentences": found.sentences,
        "malformed": found.malformed,
        "repeated": found.repeated,
        "empty": not text.strip(),
    }


def _mean(tables: Sequence[_Table]) -> _Table:
    """One table for several seeds, as large as that of one."""
    return {column: np.mean([table[column] for table in tables], axis=0) for column in tables[0]}


def _row(group: Sequence[DescribedRun], own: _Table) -> DescriptionRow:
    seeds = tuple(run.seed for run in group if run.seed is not None)
    answers = own["answers"].sum()
    return DescriptionRow(
        name=group[0].name,
        label=group[0].label,
        seed=group[0].seed if len(group) == 1 else None,
        seeds=seeds,
        n=sum(len(run.texts) for run in group),
        scenes=len(own["answers"]),
        rates={kind: _share(own[f"false {kind}"], own[f"stated {kind}"]) for kind in KINDS},
        stated={kind: float(own[f"stated {kind}"].sum() / answers) for kind in KINDS},
        coverage=share_interval(own["coverage"], own["answers"], range(len(own["answers"]))),
        length=float(own["length"].sum() / answers),
        malformed=_quotient(own, "malformed", "sentences"),
        repeated=_quotient(own, "repeated", "sentences"),
        empty=float(own["empty"].sum() / answers),
    )


def _share(sums: Values, counts: Values) -> Interval | None:
    here = np.flatnonzero(counts)
    return share_interval(sums[here], counts[here], range(len(here)), UNIT) if len(here) else None


def _quotient(table: _Table, top: str, bottom: str) -> float | None:
    total = table[bottom].sum()
    return float(table[top].sum() / total) if total else None


# -- against the base --------------------------------------------------------------------------------------------------


def _compare(row: DescriptionRow, own: _Table, base: _Table) -> DescriptionRow:
    changes = {}
    for kind in KINDS:
        columns = f"false {kind}", f"stated {kind}"
        changes[kind] = relative_change([own[name] for name in columns], [base[name] for name in columns])
    answers = own["answers"]
    covered = share_interval(own["coverage"] - base["coverage"], answers, range(len(answers)), None)
    length = ratio([own["length"], answers], [base["length"], answers])
    goals = goals_of(changes, covered, length)
    return dataclasses.replace(row, changes=changes, coverage_change=covered, length_ratio=length, goals=goals)


def relative_change(own: Sequence[Values], base: Sequence[Values]) -> Interval | None:
    """How far the share own[0] / own[1] lies from base[0] / base[1], as a part of the latter; values are per scene.

    Where the own share is zero in every scene, no resample can show any doubt; the upper end is then how high the share
    can be in unseen scenes (as in `share_interval`) over how low the base's may be.
    """
    found = ratio(own, base)
    if found is None:
        return None
    high = found.high
    if found.value == 0:
        shares = _share(own[0], own[1]), _share(base[0], base[1])
        high = shares[0].high / shares[1].low if shares[0] and shares[1] and shares[1].low > 0 else math.inf
    return Interval(found.value - 1, found.low - 1, high - 1)


def ratio(own: Sequence[Values], base: Sequence[Values], seed: int = 0) -> Interval | None:
    """The share own[0] / own[1] over the share base[0] / base[1], values per scene, scenes resampled for both at once.

    None where one of the shares does not exist or the base's is zero. A resample in which that happens counts as
    infinitely high, so that it never speaks for the model; one in which both shares are zero counts as no change. The
    interval is the percentile bootstrap's (Efron 1979), ends rounded outward to a value that occurred.
    """
    sums = [*own, *base]
    value = float(_ratio(*(one.sum() for one in sums)))
    if not (own[1].sum() and base[0].sum() and base[1].sum()):
        return None
    if len(sums[0]) < 2:  # one scene says nothing of others
        return Interval(value, 0.0, math.inf)
    with np.errstate(invalid="ignore"):
        drawn = bootstrap(
            sums,
            lambda *samples, axis: _ratio(*(one.sum(axis) for one in samples)),
            n_resamples=RESAMPLES,
            batch=500,
            paired=True,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    low = np.quantile(drawn, (1 - CONFIDENCE) / 2, method="lower")
    high = np.quantile(drawn, (1 + CONFIDENCE) / 2, method="higher")
    return Interval(value, float(low), float(high))


def _ratio(top, bottom, base_top, base_bottom) -> np.ndarray:
    """(top / bottom) / (base_top / base_bottom), multiplied out so that equal shares give exactly 1."""
    own, base = np.asarray(top * base_bottom), np.asarray(base_top * bottom)
    exists = (np.asarray(bottom) > 0) & (np.asarray(base_bottom) > 0)
    instead = np.where(exists & (own == 0) & (base == 0), 1.0, np.inf)
    return np.divide(own, base, out=instead, where=base > 0)


def goals_of(changes: Mapping[str, Interval | None], coverage_change: Interval, length_ratio: Interval | None) -> Goals:
    """Which goals these comparisons with the base reach; a limit itself is still within."""
    rates = {
        kind: change is not None and change.value <= -FEWER + _ROUNDING and change.high < 0
        for kind, change in changes.items()
    }
    coverage = coverage_change.value >= -COVERAGE_LOST - _ROUNDING
    length = length_ratio is not None and abs(length_ratio.value - 1) <= LENGTH_OFF + _ROUNDING
    return Goals(rates, coverage, length, met=all(rates.values()) and coverage and length)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
