"""Records to shards: each shard is written under a temporary name, synced and renamed, the manifest last of all.

So a folder never holds half a shard under a shard's name, and a manifest never names a shard that is not whole. The
same records give the same bytes. Refused: keys that a tar reader would split elsewhere, records that cannot be read
back, a folder that already holds a data set.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from webdataset.writer import TarWriter

from mmalign.data.durable import clear_when_full, publish
from mmalign.data.manifest import MANIFEST_NAME, Manifest, ShardRow, write_manifest
from mmalign.data.schema import Record, encode

# The key ends at the first dot after the last slash, so it must have no other.
_KEY = re.compile(r"[^./\s][^.]*")


def write_shard(path: str | Path, records: Iterable[Record], image_format: str = "png") -> ShardRow:
    """One shard, atomically, replacing what was there. Returns its manifest row.

    Raises RecordError for a record that cannot be written and ValueError for a key that cannot or for a full disk; no
    file is left then.
    """
    with _ShardFile(Path(path), image_format) as shard:
        for record in records:
            shard.write(record)
    return shard.row()


class ShardWriter:
    """`with ShardWriter(folder) as writer: writer.write(record)`; shards 000000.tar, ..., then shards.json.

    An exception inside the block leaves no manifest and no half-written shard.
    """

    def __init__(
        self,
        folder: str | Path,
        records_per_shard: int = 1000,
        encoder: Mapping[str, Any] | None = None,
        image_format: str = "png",
    ):
        if records_per_shard < 1:
            raise ValueError(f"records_per_shard is {records_per_shard}; expected at least 1")
        self.folder = Path(folder)
        if (self.folder / MANIFEST_NAME).exists():
            raise ValueError(f"{self.folder} already holds a data set; choose another folder or remove it")
        self.manifest: Manifest | None = None
        self._records_per_shard = records_per_shard
        self._encoder = encoder
        self._image_format = image_format
        self._rows: list[ShardRow] = []
        self._current: _ShardFile | None = None

    def write(self, record: Record) -> None:
        if self._current is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._current = _ShardFile(self.folder / f"{len(self._rows):06d}.tar", self._image_format)
        self._current.write(record)
        if self._current.records == self._records_per_shard:
            self._finish()

    def _finish(self) -> None:
        if self._current is not None:
            self._current.close()
            self._rows.append(self._current.row())
            self._current = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._current is not None:
                self._current.discard()
            return
        self._finish()
        if not self._rows:
            raise ValueError(f"no records were written to {self.folder}; an empty data set helps nobody")
        self.manifest = write_manifest(self.folder, self._rows, self._encoder)


class _ShardFile:
    """A shard in the making."""

    def __init__(self, path: Path, image_format: str):
        self.records = 0
        self._path = path
        self._image_format = image_format
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with clear_when_full(path):
            self._file = _HashedFile(open(self._temporary, "wb"))  # noqa: SIM115
        self._keys: set[str] = set()
        stream: Any = self._file
        self._tar = TarWriter(stream, encoder=False, mtime=0, user="", group="", format="PAX_FORMAT")

    def write(self, record: Record) -> None:
        if not _KEY.fullmatch(record.key) or record.key.endswith("/"):
            raise ValueError(
                f"key {record.key!r} cannot be written: a key has no dot and starts with no slash or space"
            )
        if record.key in self._keys:
            raise ValueError(f"key {record.key!r} came twice for {self._path.name}; keys must differ within a shard")
        members: dict[str, Any] = {"__key__": record.key, **encode(record, self._image_format)}
        with clear_when_full(self._path):
            self._tar.write(members)
        self._keys.add(record.key)
        self.records += 1

    def close(self) -> None:
        """Ends the tar, makes it durable and gives it its name."""
        try:
            with clear_when_full(self._path):
                self._tar.close()
                self._file.sync()
                publish(self._temporary, self._path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        # The tar has buffers of its own that want to be flushed, to a file that is about to be removed.
        with suppress(OSError, ValueError):
            self._tar.close()
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def row(self) -> ShardRow:
        return ShardRow(self._path.name, self.records, self._file.size, self._file.digest.hexdigest())

    def __enter__(self) -> _ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class _HashedFile:
    """A file that is only written to, front to back, and hashed on the way."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self._file.write(content)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        # Closing flushes, which fails again on a full disk; the file is about to be removed.
        with suppress(OSError):
            self._file.close()
