"""Working shard by shard: what is done is skipped, so that a job can be killed and run again, on one machine or many.

Under torchrun, or with RANK and WORLD_SIZE set, each process takes every WORLD_SIZE-th shard; whoever finds all shards
in place writes the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmalign.data import ErrorLog, Record, RecordError, describe_shard, write_manifest, write_shard


def work_through(
    folder: Path,
    names: Sequence[str],
    records_of: Callable[[str], Iterable[Record]],
    title: str,
    encoder: Mapping[str, Any] | None = None,
    share: tuple[int, int] | None = None,
) -> Path:
    """Writes `records_of(name)` to each missing shard of `folder`, then its manifest. Returns the folder.

    `share` is (place, of how many): this process's part of the shards; None: RANK and WORLD_SIZE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place, parts = share or (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    mine = names[place::parts]
    todo = [name for name in mine if not (folder / name).exists()]
    with progress_bar() as progress:
        bar = progress.add_task(title, total=len(mine), completed=len(mine) - len(todo))
        for name in todo:
            write_shard(folder / name, records_of(name))
            progress.advance(bar)
    if all((folder / name).exists() for name in names):
        write_manifest(folder, [describe_shard(folder / name) for name in names], encoder)
    return folder


class Skipped:
    """Records that could not be used, by kind; an error once they are more than a share of all that were seen."""

    def __init__(self, max_bad_share: float):
        self.log = ErrorLog()
        self.seen = 0
        self._max_bad_share = max_bad_share

    def good(self, found: Iterable[Record | RecordError]) -> Iterator[Record]:
        """The records among `found`. Raises ValueError, with the counts, when `found` ends and too many were bad."""
        for record in found:
            self.seen += 1
            if isinstance(record, RecordError):
                self.log.add(record)
            else:
                yield record
        if self.log.total > self._max_bad_share * self.seen:
            raise ValueError(
                f"{self.log.total} of {self.seen} records cannot be used, more than max_bad_share="
                f"{self._max_bad_share:g} allows: {self.log.summary()}"
            )


def progress_bar(console: Console | None = None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
