"""Pick-a-Pic style rows (jpg_0, jpg_1, label_0, caption) to shards of pairs.

  python -m data_tools.pickapic train-00000.parquet ... --folder shards/pickapic

label_0 is 1 where the first picture was preferred, 0 where the second was, 0.5 for a tie. Ties are dropped, and so are
rows with has_label false (the splits other than train have them); what was dropped is counted. JPEG bytes are copied as
they are. In JSON lines the pictures are base64 text or paths beside the file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from data_tools.rows import Dropped, Row, image_bytes, run
from mmalign.data import Candidate, Record

_META = ("ranking_id", "user_id", "image_0_uid", "image_1_uid", "created_at")


def record_of(row: Row, key: str, folder: Path) -> Record:
    """Raises Dropped for a row without a clear preference."""
    missing = [name for name in ("jpg_0", "jpg_1", "label_0", "caption") if name not in row]
    if missing:
        raise ValueError(f"no column {', '.join(missing)} among {', '.join(row)}")
    if row.get("has_label") is False:
        raise Dropped("without label")
    preferred = _preferred(row["label_0"])
    if not isinstance(row["caption"], str) or not row["caption"].strip():
        raise Dropped("without caption")
    candidates = [
        Candidate(image=image_bytes(row[f"jpg_{place}"], folder), source=row.get(f"model_{place}"))
        for place in range(2)
    ]
    meta = {name: value for name in _META if isinstance(value := row.get(name), (str, int))}
    return Record(key, row["caption"].strip(), candidates, [preferred], meta)


def _preferred(label: object) -> tuple[int, int]:
    try:
        number = float(label)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise Dropped("with a label that is no number") from None
    if number == 0.5:
        raise Dropped("tie")
    if number not in (0.0, 1.0):
        raise Dropped("with a label other than 0, 0.5 and 1")
    return (0, 1) if number == 1.0 else (1, 0)


def in_folder(folder: Path) -> Callable[[Row, str], Record]:
    return functools.partial(record_of, folder=folder)


if __name__ == "__main__":
    run(__doc__, in_folder)
