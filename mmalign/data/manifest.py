"""Which shards make a data set, and how many records each holds: shards.json, or found out by looking.

shards.json lies in the folder of its shards and names them by plain file names. So it can neither point elsewhere nor
run a command; a `pipe:` is accepted only where the user wrote it. Refused: an empty data set, a manifest of another
schema, shards that are not there, sources that were encoded differently.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from mmalign.data.cache import ShardCache, default_folder, file_sha256, is_remote, read_remote
from mmalign.data.columns import Columns
from mmalign.data.durable import write_atomically
from mmalign.data.errors import RecordError
from mmalign.data.schema import SCHEMA, Record
from mmalign.data.shard import OpenShard

MANIFEST_NAME = "shards.json"
_PLAIN_NAME = re.compile(r"\w[\w.\-]*")
# How many copies of remote shards are kept while their records are counted; they are read one after the other.
_COUNTING_COPIES = 4


@dataclass(frozen=True)
class ShardRow:
    """A line of shards.json. `records` counts the unreadable rest of a damaged shard as one."""

    name: str
    records: int
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Shard:
    """A shard of a data set and where it is. `row.name` is what errors and draws call it."""

    location: str
    row: ShardRow


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set, in an order that does not depend on the file system, and what encoded its latents."""

    shards: tuple[Shard, ...]
    encoder: Mapping[str, Any] | None = None

    @property
    def records(self) -> int:
        return sum(shard.row.records for shard in self.shards)

    @property
    def digest(self) -> str:
        """Equal for equal data sets, wherever they lie. Two of them must agree for a run to resume."""
        rows = [asdict(shard.row) for shard in self.shards]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    @staticmethod
    def read(source: str | Path | Sequence[str | Path], cache: str | Path | None = None) -> Manifest:
        """The data set at `source`: a folder with shards.json, tars, brace patterns, URLs (`pipe:` too), or a list.

        Shards without a manifest are counted: a header scan where local, one download each where remote. Raises
        FileNotFoundError and ValueError, both saying what to change.
        """
        sources = [source] if isinstance(source, (str, Path)) else list(source)
        shards: list[Shard] = []
        encoders: list[Mapping[str, Any] | None] = []
        for item in sources:
            if not str(item):
                raise ValueError("data.shards is empty; expected a folder with shards.json, tar files or URLs")
            for location in _expand(str(item)):
                rows, encoder = _read_source(location, Path(cache) if cache else None)
                shards += rows
                encoders.append(encoder)
        if any(encoder != encoders[0] for encoder in encoders):
            raise ValueError("data.shards mixes data sets with different encoders; encode them alike or train from one")
        manifest = Manifest(_distinct(shards), encoders[0] if encoders else None)
        if not manifest.records:
            raise ValueError(f"no records in {_short(sources)}; check data.shards")
        return manifest


def write_manifest(folder: str | Path, rows: Sequence[ShardRow], encoder: Mapping[str, Any] | None = None) -> Manifest:
    """Writes shards.json atomically, after all the shards it names; `encoder` says what made the latents."""
    folder = Path(folder)
    for row in rows:
        _check_name(row.name)
    content = {"schema": SCHEMA, "shards": [asdict(row) for row in rows], "encoder": encoder}
    write_atomically(folder / MANIFEST_NAME, json.dumps(content, indent=1).encode())
    return Manifest(tuple(Shard(str(folder / row.name), row) for row in rows), encoder)


def index_shards(
    paths: Sequence[str | Path],
    progress: Callable[[int, int], None] | None = None,
    cache: str | Path | None = None,
) -> Manifest:
    """Counts and hashes foreign shards, all in one folder, and writes its shards.json. `progress(done, all)` per shard.

    `paths`: tars, or the folder of them. Raises FileNotFoundError and ValueError.
    """
    tars = sorted(tar for path in paths for tar in _tars(Path(path)))
    folders = {tar.parent.resolve() for tar in tars}
    if len(folders) != 1:
        raise ValueError(
            f"a manifest lies beside its shards, but these are in {len(folders)} folders; index one at a time"
        )
    rows = []
    for done, tar in enumerate(tars, start=1):
        rows.append(describe_shard(tar, cache))
        if progress is not None:
            progress(done, len(tars))
    return write_manifest(tars[0].parent, rows)


def describe_shard(path: str | Path, cache: str | Path | None = None) -> ShardRow:
    """The manifest row of a local tar: a header scan and a hash over the file."""
    path = Path(path)
    row = _count(str(path), ShardCache(Path(cache) if cache else None, _COUNTING_COPIES))
    return replace(row, sha256=file_sha256(path))


def read_shard(
    shard: Shard, need: frozenset[str], columns: Columns | None = None, cache: str | Path | None = None
) -> Iterator[Record | RecordError]:
    """The records of one shard in their order, for jobs that work shard by shard; a bad one comes as its error."""
    path = ShardCache(Path(cache) if cache else None, _COUNTING_COPIES).path(shard.location, shard.row.sha256)
    with OpenShard(path, shard.row.name) as opened:
        for place in range(opened.index.places):
            try:
                yield opened.read(place, need, columns)
            except RecordError as error:
                yield RecordError(*error.args)


def _tars(path: Path) -> list[Path]:
    if path.is_dir():
        found = [tar for pattern in ("*.tar", "*.tar.gz", "*.tgz") for tar in path.glob(pattern)]
        if not found:
            raise FileNotFoundError(f"no tar files in {path}")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"no shard at {path}")
    return [path]


def _expand(source: str) -> list[str]:
    """A brace pattern to its files; `~` to the home folder. A `pipe:` without a range is one command, whatever braces
    it has."""
    if is_remote(source) and not re.search(r"\{[^{}]*(\.\.|,)[^{}]*\}", source):
        return [source]
    return expand_urls(source if is_remote(source) else os.path.expanduser(source))


def _read_source(location: str, cache: Path | None) -> tuple[list[Shard], Mapping[str, Any] | None]:
    if is_remote(location):
        return _read_remote(location, cache)
    path = Path(location)
    if not path.exists():
        raise FileNotFoundError(f"no shards at {path}; check data.shards")
    folder = path if path.is_dir() else path.parent
    manifest = folder / MANIFEST_NAME
    if path.is_dir() or path == manifest:
        if not manifest.is_file():
            raise FileNotFoundError(f"no {MANIFEST_NAME} in {folder}; make one with `mmalign index {folder}`")
        rows, encoder = _parse(manifest.read_bytes(), str(manifest))
        return [_local(folder, row) for row in rows], encoder
    if manifest.is_file():
        rows, encoder = _parse(manifest.read_bytes(), str(manifest))
        named = [_local(folder, row) for row in rows if row.name == path.name]
        if named:
            return named, encoder
    return [Shard(str(path), _count(str(path), ShardCache(cache, _COUNTING_COPIES)))], None


def _local(folder: Path, row: ShardRow) -> Shard:
    path = folder / row.name
    if not path.is_file():
        raise FileNotFoundError(f"{folder / MANIFEST_NAME} names {row.name}, but there is no such file")
    if path.stat().st_size > row.bytes:
        raise ValueError(
            f"{path} has grown since {MANIFEST_NAME} was written; write it anew with `mmalign index {folder}`"
        )
    return Shard(str(path), row)


def _read_remote(location: str, cache: Path | None) -> tuple[list[Shard], Mapping[str, Any] | None]:
    is_manifest = not location.startswith("pipe:") and location.endswith(("/", f"/{MANIFEST_NAME}"))
    try:
        if is_manifest:
            base = location.rpartition("/")[0]
            rows, encoder = _parse(read_remote(f"{base}/{MANIFEST_NAME}"), location)
            return [Shard(f"{base}/{row.name}", row) for row in rows], encoder
        return [Shard(location, _remembered_count(location, cache))], None
    except OSError as error:
        raise FileNotFoundError(f"cannot read {location} ({error}); check data.shards") from None


def _remembered_count(location: str, cache: Path | None) -> ShardRow:
    """Counting a remote shard takes a download, so the result is kept beside the copies."""
    folder = cache or default_folder()
    note = folder / f"{hashlib.sha256(location.encode()).hexdigest()[:32]}.count.json"
    if note.is_file():
        return ShardRow(**json.loads(note.read_text()))
    row = _count(location, ShardCache(folder, _COUNTING_COPIES))
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(asdict(row)).encode())
    return row


def _count(location: str, cache: ShardCache) -> ShardRow:
    name = location if location.startswith("pipe:") else location.rpartition("/")[2]
    path = cache.path(location)
    with OpenShard(path, name) as opened:
        size = path.stat().st_size if is_remote(location) else Path(location).stat().st_size
        return ShardRow(name, opened.index.places, size, None)


def _parse(content: bytes, name: str) -> tuple[list[ShardRow], Mapping[str, Any] | None]:
    try:
        values = json.loads(content)
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']!r}, expected {SCHEMA}")
        for row in values["shards"]:
            _check_name(row["name"])
        rows = [ShardRow(row["name"], row["records"], row["bytes"], row.get("sha256")) for row in values["shards"]]
        numbers = [number for row in rows for number in (row.records, row.bytes)]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("records and bytes must be whole numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} is not a manifest ({type(error).__name__}: {error}); see `mmalign index`") from None
    return rows, values.get("encoder")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"a shard is called {name!r}; a manifest may only name plain files in its own folder")


def _distinct(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Shards of one name, from several sources, are told apart by their number in the list."""
    seen = Counter(shard.row.name for shard in shards)
    return tuple(
        Shard(shard.location, replace(shard.row, name=f"{number}:{shard.row.name}"))
        if seen[shard.row.name] > 1
        else shard
        for number, shard in enumerate(shards)
    )


def _short(sources: Sequence[str | Path]) -> str:
    return ", ".join(str(source) for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
