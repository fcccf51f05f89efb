"""Foreign shard layouts, read through a column map: which member is the prompt, which are the candidates, what is said.

A member is named by its field (what follows the key), e.g. `original_prompt.txt`. `jpg;png;webp` means the first of
these that is there. `json:caption` reads the entry `caption` of the member `json`. Labels are parsed as numbers: the
text "0.0" is a zero, not a truthy string. Pickles, numpy files and anything else executable are never looked at.

  jpg_0.jpg / jpg_1.jpg / label_0.txt / original_prompt.txt:
      {prompt: original_prompt.txt, candidates: [jpg_0.jpg, jpg_1.jpg], label: label_0.txt}
  img2dataset (key.jpg / key.txt / key.json), liked pictures only:
      {prompt: txt, candidates: [jpg]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmalign.data.errors import Defect


@dataclass(frozen=True)
class Columns:
    """A column map. Without feedback columns every candidate counts as liked, which `liked` (sft) can read."""

    prompt: str | None = "txt"  # the member or json entry with the prompt; null: records without one (empty prompt)
    candidates: tuple[str, ...] = ("jpg;jpeg;png;webp",)  # the member of each candidate's picture
    label: str | None = None  # for two candidates: 1 prefers the first, 0 the second, 0.5 is a tie
    scores: tuple[str, ...] = ()  # one column per candidate, higher is preferred

    def __post_init__(self) -> None:
        if self.label is not None and len(self.candidates) != 2:
            raise ValueError(
                f"data.columns.label compares two candidates, but data.columns.candidates lists {len(self.candidates)}"
            )
        if self.scores and len(self.scores) != len(self.candidates):
            raise ValueError(
                f"data.columns.scores lists {len(self.scores)} columns for {len(self.candidates)} candidates; "
                "give one score per candidate"
            )
        if self.scores and self.label is not None:
            raise ValueError("data.columns has both label and scores; keep the one that says which is preferred")

    def entry(self, members: Mapping[str, bytes]) -> dict[str, Any]:
        """The record as the json member of schema 1 would describe it. Raises Defect."""
        candidates: list[dict[str, Any]] = [{"image": _first_present(name, members)} for name in self.candidates]
        entry: dict[str, Any] = {"schema": 1, "prompt": "", "candidates": candidates}
        if self.prompt is not None:
            entry["prompt"] = _text(self.prompt, members)
        if self.label is not None:
            label = _number(self.label, members)
            if label not in (0.0, 0.5, 1.0):
                raise Defect("invalid_record", f"{self.label} is {label:g}; expected 1, 0 or 0.5 (a tie)")
            candidates[0]["score"], candidates[1]["score"] = label, 1.0 - label
            entry["preferred"] = [] if label == 0.5 else [[0, 1]] if label == 1.0 else [[1, 0]]
        for candidate, column in zip(candidates, self.scores, strict=False):
            candidate["score"] = _number(column, members)
        return entry


def _first_present(name: str, members: Mapping[str, bytes]) -> str:
    for alternative in name.split(";"):
        if alternative in members:
            return alternative
    raise Defect(
        "missing_member", f"no member {name}; the record has {', '.join(members)} (data.columns names the members)"
    )


def _value(column: str, members: Mapping[str, bytes]) -> Any:
    name, _, entry = column.partition(":")
    content = members[_first_present(name, members)]
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise Defect("invalid_record", f"{name} is not UTF-8 text") from None
    if not entry:
        return text
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Defect("invalid_json", f"{name}: {error}") from None
    if not isinstance(values, dict) or entry not in values:
        raise Defect("missing_member", f"{name} has no entry {entry!r} (data.columns asks for {column})")
    return values[entry]


def _text(column: str, members: Mapping[str, bytes]) -> str:
    value = _value(column, members)
    if not isinstance(value, str):
        raise Defect("invalid_record", f"{column} is a {type(value).__name__}; expected text")
    return value.strip()


def _number(column: str, members: Mapping[str, bytes]) -> float:
    value = _value(column, members)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Defect("invalid_record", f"{column} is {value!r}; expected a number") from None
    if not math.isfinite(number):
        raise Defect("nan_score", f"{column} is {number}")
    return number
