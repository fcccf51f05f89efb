"""Whether the records hold the feedback that an objective asks for, found out from the first ones before any model."""

from __future__ import annotations

from mmalign.core.objectives import FAMILIES, BoundObjective, bind_objective
from mmalign.core.types import Sample
from mmalign.data import ROWS, DataSettings, Manifest, RecordError
from mmalign.data.reader import SlotReader

# Records that are looked at: some may be broken, tied or without feedback.
PEEK = 32
WHAT = {
    "pair": "pairs (a preferred pair, or two different scores)",
    "liked": "liked answers (a preferred pair, a desirable candidate, or a single one)",
    "labelled": "labels (desirable candidates, or pairs)",
    "ranked": "ranked answers (two or more scores, or a preferred pair)",
    "segmented": "answers with labelled segments (see `mmalign judge`, fine_grained)",
}


def check_feedback(
    objective: BoundObjective, manifest: Manifest, settings: DataSettings, seed: int, row: str | None = None
) -> None:
    """Raises ValueError where none of the first records can serve `objective`, naming objectives that would work.

    `row` is what the model makes of a record, where that is not for the objective to say.
    """
    row = row or objective.row
    if row == "rollout":
        raise ValueError(f"objective {objective.name} learns from its own rollouts, not from records")
    rows = _rows(row, manifest, settings, seed)
    if not rows:
        able = [kind for kind in ROWS if kind != row and _rows(kind, manifest, settings, seed)]
        raise ValueError(
            f"objective {objective.name} reads {WHAT[row]}, and none of the first "
            f"{min(PEEK, manifest.records)} records of {manifest.records} holds any; {_advice(able)}"
        )
    for name, has in (("reward_margin", _has_scores), ("consistency", _has_consistency)):
        asking = [term.name for term in objective.terms if name in term.data]
        if asking and not any(has(row) for row in rows):
            source = "a score on both candidates" if name == "reward_margin" else "meta.consistency in the record"
            raise ValueError(
                f"objective {asking[0]} reads {source}, and none of the first records has it; objective dpo needs none"
            )


def _rows(kind: str, manifest: Manifest, settings: DataSettings, seed: int) -> list[tuple[Sample, ...]]:
    reader = SlotReader(manifest, settings, seed, frozenset(), ROWS[kind])
    found = [reader[slot] for slot in range(min(PEEK, manifest.records))]
    return [row for row in found if not isinstance(row, RecordError)]


def _has_scores(row: tuple[Sample, ...]) -> bool:
    return all(sample.score is not None for sample in row)


def _has_consistency(row: tuple[Sample, ...]) -> bool:
    return all("consistency" in sample.numbers for sample in row)


def _advice(able: list[str]) -> str:
    if able == ["segmented"]:
        return "they hold labelled segments, from which reward models learn: set model.kind to lvlm_segment_reward"
    if not able:
        return "write feedback with `mmalign judge`, or map it with data.columns"
    names = [name for table in FAMILIES.values() for name in table if bind_objective({"name": name}).row in able]
    return f"these objectives would work: {', '.join(names)}"
