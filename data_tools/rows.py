"""Rows of parquet and JSON-lines files, one dict at a time, and what every converter does with them.

Parquet needs pyarrow (the extra `data`); without it the error says so. No pandas, nothing is unpickled.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.data import Record, RecordError, ShardWriter

Row = Mapping[str, Any]
# Rows are pulled from parquet in small batches: one of them may hold two pictures of a megabyte.
_PARQUET_BATCH = 64


class Dropped(Exception):
    """A row that makes no record, and in a few words why; reasons are counted."""


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a .parquet, .jsonl or .json (lines) file. Raises FileNotFoundError and ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        yield from _json_lines(path)
    else:
        raise ValueError(f"{path} is neither .parquet nor .jsonl")


def image_bytes(value: Any, folder: Path) -> bytes:
    """A picture as rows hold it: bytes, base64 text, a path below `folder`, or {"bytes": ..., "path": ...}."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)) and value:
        return bytes(value)
    if not isinstance(value, str) or not value:
        raise Dropped("no picture")
    path = (folder / value).resolve() if len(value) < 1024 and "\0" not in value else None
    if path is not None and path.is_relative_to(folder.resolve()) and path.is_file():
        return path.read_bytes()
    try:
        return base64.b64decode(value.partition("base64,")[2] or value, validate=True)
    except (binascii.Error, ValueError):
        raise Dropped("no picture at its path") from None


def convert(rows: Iterable[Row], record_of: Callable[[Row, str], Record], writer: ShardWriter) -> Counter[str]:
    """Writes a record per row under a running number; counts what was written and, by reason, what was dropped."""
    counts: Counter[str] = Counter()
    for row in rows:
        try:
            writer.write(record_of(row, f"{counts['written']:09d}"))
            counts["written"] += 1
        except Dropped as reason:
            counts[str(reason)] += 1
        except RecordError as error:
            counts[error.kind] += 1
    return counts


def run(description: str | None, record_of_folder: Callable[[Path], Callable[[Row, str], Record]]) -> None:
    """The command line that every converter has. `record_of_folder` makes the converter for rows of a file's folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="parquet or JSON-lines files")
    parser.add_argument("--folder", required=True, type=Path, help="where the shards go")
    parser.add_argument("--records-per-shard", type=int, default=1000)
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    try:
        with ShardWriter(arguments.folder, arguments.records_per_shard) as writer:
            for source in arguments.sources:
                offset = counts["written"]
                numbered = _shifted(record_of_folder(source.parent), offset)
                counts += convert(read_rows(source), numbered, writer)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(", ".join(f"{count} {reason}" for reason, count in counts.most_common()))


def _shifted(record_of: Callable[[Row, str], Record], offset: int) -> Callable[[Row, str], Record]:
    """Keys go on counting from file to file."""
    return lambda row, key: record_of(row, f"{offset + int(key):09d}")


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError(
            f"reading {path.name} needs pyarrow: pip install 'mmalign[data]', or convert it to .jsonl"
        ) from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=_PARQUET_BATCH):
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file, or is damaged: {error}") from None


def _json_lines(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is a {type(row).__name__}; expected one object per line")
            yield row
