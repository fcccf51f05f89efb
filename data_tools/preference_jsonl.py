"""Rows of prompt (or question), chosen, rejected and images (or image) to shards of text pairs about pictures.

  python -m data_tools.preference_jsonl rlaif.jsonl ... --folder shards/rlaif

prompt: text or chat messages. chosen, rejected: text or chat messages, of which the last must be the assistant's.
images: a list of paths beside the file, base64 texts or {"bytes", "path"} dicts; image: a single one; neither: a text
pair. Rows whose chosen and rejected answers are equal are dropped as ties; what was dropped is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_tools.rows import Dropped, Row, image_bytes, run
from mmalign.data import Candidate, Record


def record_of(row: Row, key: str, folder: Path) -> Record:
    """Raises Dropped for a row without a clear preference, ValueError for a file with other columns."""
    prompt = row.get("prompt", row.get("question"))
    if prompt is None or "chosen" not in row or "rejected" not in row:
        raise ValueError(f"expected the columns prompt (or question), chosen and rejected; found {', '.join(row)}")
    answers = [_answer(row["chosen"]), _answer(row["rejected"])]
    if answers[0] == answers[1]:
        raise Dropped("tie")
    pictures = row.get("images", row.get("image"))
    pictures = [] if pictures is None else pictures if isinstance(pictures, list) else [pictures]
    return Record(
        key=key,
        prompt=prompt,
        candidates=[Candidate(text=answer) for answer in answers],
        preferred=[(0, 1)],
        prompt_images=[image_bytes(picture, folder) for picture in pictures],
    )


def _answer(value: Any) -> str:
    """The text of an answer; of chat messages, what the assistant says last."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        last = value[-1]
        if last.get("role") != "assistant":
            raise Dropped("without an answer of the assistant")
        value = last.get("content")
    if isinstance(value, list):
        value = "".join(part.get("text") or "" for part in value if isinstance(part, Mapping))
    if not isinstance(value, str) or not value.strip():
        raise Dropped("without an answer")
    return value


def in_folder(folder: Path) -> Callable[[Row, str], Record]:
    return functools.partial(record_of, folder=folder)


if __name__ == "__main__":
    run(__doc__, in_folder)
