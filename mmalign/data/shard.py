"""One tar shard as random-access records: where each member lies, found by one scan over the headers alone.

A record is a run of adjacent members with the same key, the path up to the first dot after the last slash. Contents are
read when asked for, with pread, so that a member nobody needs costs nothing. A damaged tar keeps what comes before the
damage; the rest is one `problem`. Refused: links, devices and everything else that is not a plain file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmalign.data.columns import Columns
from mmalign.data.errors import RecordError
from mmalign.data.schema import Record, decode

_BLOCK = 512
_PLAIN = (b"0", b"\0", b"7")
# A name or a pax header longer than this is damage, not a name.
_LONGEST_NAME = 1 << 16


@dataclass(frozen=True)
class Entry:
    """A record of a shard: its key, and start and length of each member's content in the file."""

    key: str
    fields: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class ShardIndex:
    """The records of a tar in their order, and in plain words what cut the list short, if anything did."""

    entries: list[Entry]
    problem: str | None

    @property
    def places(self) -> int:
        """Records, and one more for the unreadable rest of a damaged shard: it is counted, not passed over."""
        return len(self.entries) + (self.problem is not None)


class Members(Mapping[str, bytes]):
    """The members of one record, field to content, each read from the file when it is asked for."""

    def __init__(self, descriptor: int, fields: Mapping[str, tuple[int, int]]):
        self._descriptor = descriptor
        self._fields = fields

    def __getitem__(self, name: str) -> bytes:
        start, length = self._fields[name]
        return os.pread(self._descriptor, length, start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, name: object) -> bool:
        return name in self._fields


class OpenShard:
    """A shard that is open for reading: `read(place)` decodes its record number `place`."""

    def __init__(self, path: Path, name: str):
        self.name = name
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.index = scan(self._descriptor)

    def read(self, place: int, need: frozenset[str], columns: Columns | None) -> Record:
        """Raises RecordError; `broken_tar` for a place beyond what could be read."""
        if place >= len(self.index.entries):
            problem = self.index.problem or f"it holds {len(self.index.entries)} records, fewer than its manifest says"
            raise RecordError("broken_tar", self.name, f"#{place}", problem)
        entry = self.index.entries[place]
        return decode(Members(self._descriptor, entry.fields), entry.key, self.name, need, columns)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> OpenShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def scan(descriptor: int) -> ShardIndex:
    """The index of an open, uncompressed tar. Reads headers only."""
    entries: list[Entry] = []
    previous = ""
    try:
        for name, start, length in _members(descriptor):
            folder, _, base = name.rpartition("/")
            stem, dot, field = base.partition(".")
            if not stem or not dot or not field:
                continue
            key = f"{folder}/{stem}" if folder else stem
            # A field seen again starts the next record: two records may carry the same key.
            if key != previous or field in entries[-1].fields:
                entries.append(Entry(key, {}))
                previous = key
            entries[-1].fields[field] = (start, length)
    except _Damage as damage:
        # The members before the damage may be a part of a record; only what another record follows is known whole.
        cut = f", in or after record {entries.pop().key}" if entries else ""
        return ShardIndex(entries, f"{damage}{cut}")
    return ShardIndex(entries, None)


class _Damage(Exception):
    pass


def _members(descriptor: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and length of every plain file. Raises _Damage."""
    size, position = os.fstat(descriptor).st_size, 0
    overrides: dict[str, str] = {}
    while position < size:
        header = os.pread(descriptor, _BLOCK, position)
        if not header.strip(b"\0") and len(header) == _BLOCK:
            return
        _check_header(header, position)
        length = int(overrides.get("size", _number(header[124:136], position)))
        start = position + _BLOCK
        if start + length > size:
            raise _Damage(f"the file ends at byte {size}, inside a member that needs {start + length - size} more")
        kind = header[156:157]
        position = start + -(-length // _BLOCK) * _BLOCK
        if kind in (b"x", b"L"):
            overrides.update(_extension(os.pread(descriptor, length, start), kind, start))
            continue
        if kind in _PLAIN:
            yield overrides.get("path", _name(header)), start, length
        if kind not in (b"g", b"K"):
            overrides = {}


def _check_header(header: bytes, position: int) -> None:
    # The checksum is taken with its own eight bytes as spaces.
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if len(header) < _BLOCK or _number(header[148:156], position) != total:
        raise _Damage(f"no tar header at byte {position}")


def _number(field: bytes, position: int) -> int:
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _Damage(f"no tar header at byte {position}") from None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # Only POSIX headers have a prefix; GNU tar keeps times in its place.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name)


def _extension(content: bytes, kind: bytes, position: int) -> dict[str, str]:
    """What a pax header or a GNU long name says about the member that follows: its path, its size."""
    if len(content) > _LONGEST_NAME:
        raise _Damage(f"a header of {len(content)} bytes at byte {position}")
    if kind == b"L":
        return {"path": os.fsdecode(content.partition(b"\0")[0])}
    found = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(content):
            raise _Damage(f"no pax header at byte {position}")
        keyword, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        found[keyword.decode(errors="replace")] = os.fsdecode(value)
        content = content[int(digits) :]
    if not found.get("size", "0").isdigit():
        raise _Damage(f"no pax header at byte {position}")
    return {name: value for name, value in found.items() if name in ("path", "size")}
