"""Files that are whole or not there: temporary name, sync, rename; and a full disk said in plain words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Raises ValueError for a full disk; `path` is then as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with clear_when_full(path), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Gives a synced file its name, and makes the name durable too."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def clear_when_full(path: Path) -> Iterator[None]:
    """Turns "no space left" into a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk is full: {path} was not written; free some space or choose another folder, and run again"
        ) from None
