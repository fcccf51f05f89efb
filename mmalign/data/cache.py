"""Where a shard can be read from: the file itself, or a local copy of what is remote or compressed.

A copy is streamed once, through webdataset's gopen, and kept in a folder that holds at most `limit` shards, the least
recently used going first. Processes share the folder: a lock file makes one of them fetch. A known sha256 is checked.
`pipe:` runs a shell command; only locations that the user wrote (config, command line) may have one, see manifest.
"""

from __future__ import annotations

import bz2
import fcntl
import gzip
import hashlib
import lzma
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen

from mmalign.data.durable import clear_when_full

REMOTE = ("pipe", "http", "https", "sftp", "ftps", "scp", "gs", "htgs", "ais", "hf", "s3")
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_TRIES = 3


def is_remote(location: str) -> bool:
    return location.partition(":")[0] in REMOTE and ":" in location


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmalign" / "shards"


class ShardCache:
    """`path(location, sha256)` gives a plain local tar. Picklable: it holds no open file."""

    def __init__(self, folder: Path | None, limit: int):
        self.folder = folder or default_folder()
        self.limit = limit

    def path(self, location: str, sha256: str | None = None) -> Path:
        """Raises FileNotFoundError for a missing local file and OSError for what cannot be fetched or verified."""
        if not is_remote(location):
            with open(location, "rb") as file:
                if _opener(file.read(6)) is None:
                    return Path(location)
        copy = self.folder / f"{_name(location, sha256)}.tar"
        if not _touch(copy):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _lock(copy.with_suffix(".lock")):
                if not _touch(copy):
                    _fetch(location, sha256, copy)
                    self._evict()
        return copy

    def _evict(self) -> None:
        # Whoever has an evicted copy open keeps reading it: the file goes when the last descriptor closes.
        copies = []
        for copy in self.folder.glob("*.tar"):
            try:
                copies.append((copy.stat().st_mtime, copy))
            except FileNotFoundError:
                continue
        for _, copy in sorted(copies)[: max(0, len(copies) - self.limit)]:
            copy.unlink(missing_ok=True)


def read_remote(location: str) -> bytes:
    """The whole of a small remote file, e.g. a manifest."""
    with _open(location) as stream:
        return stream.read()


def _open(location: str) -> Any:
    if location.startswith("s3:"):
        raise ValueError(f"{location}: webdataset does not open s3: itself; write pipe:aws s3 cp {location} -")
    return gopen(location, "rb")


def _name(location: str, sha256: str | None) -> str:
    """Names a copy after what it is a copy of: a local file that changes gets a new one."""
    version = sha256
    if version is None and not is_remote(location):
        status = os.stat(location)
        version = f"{status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(f"{location}\n{version}".encode()).hexdigest()[:32]


def _touch(copy: Path) -> bool:
    try:
        os.utime(copy)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when its holder dies. The file stays: others may wait."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(location: str, sha256: str | None, copy: Path) -> None:
    # The lock is held: what a killed process left under this name is overwritten.
    temporary = copy.with_suffix(".part")
    try:
        for attempt in range(_TRIES):
            try:
                with clear_when_full(copy):
                    _download(location, sha256, temporary)
                break
            except OSError:
                if attempt == _TRIES - 1 or not is_remote(location):
                    raise
                time.sleep(0.2 * 4**attempt)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


def _download(location: str, sha256: str | None, temporary: Path) -> None:
    with _open(location) as stream, open(temporary, "wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
    if sha256 is not None:
        came = file_sha256(temporary)
        if came != sha256:
            raise OSError(f"{location}: sha256 is {came[:16]}..., but the manifest says {sha256[:16]}...")
    with open(temporary, "rb") as file:
        opener = _opener(file.read(6))
    if opener is not None:
        _expand(opener, temporary)


def _expand(opener: Any, temporary: Path) -> None:
    """Replaces a compressed tar by the tar; one that breaks off keeps what came before."""
    expanded = temporary.with_suffix(".expanded")
    try:
        with opener(temporary, "rb") as stream, open(expanded, "wb") as file:
            try:
                while chunk := stream.read1(1 << 16):
                    file.write(chunk)
            except (EOFError, lzma.LZMAError, gzip.BadGzipFile):
                file.write(b"broken off")
        os.replace(expanded, temporary)
    finally:
        expanded.unlink(missing_ok=True)


def _opener(start: bytes) -> Any:
    return next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
