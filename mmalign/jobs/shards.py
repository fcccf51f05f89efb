"""Working shard by shard: what is done is skipped, so that a job can be killed and run again, on one machine or many.

Under torchrun, or with RANK and WORLD_SIZE set, each process takes every WORLD_SIZE-th shard; whoever finds all shards
in place writes the manifest. Refused: a share that is none, and a folder whose shards another encoder made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmalign.data import ErrorLog, Record, RecordError, describe_shard, write_manifest, write_shard
from mmalign.data.manifest import MANIFEST_NAME, Manifest, Shard

# [place, of how many]: the part of the shards that one process works on
Share = tuple[int, int]


def by_name(manifest: Manifest) -> dict[str, Shard]:
    """Each shard under the name of the new shard that is made from it: shards of one name in several folders, and
    those behind a URL, have names that are none for a file."""
    found = {re.sub(r"[^\w.\-]+", "-", shard.row.name).lstrip("-."): shard for shard in manifest.shards}
    if len(found) < len(manifest.shards):
        raise ValueError(f"{len(manifest.shards)} shards have only {len(found)} names; give each its own file name")
    return found


def remaining(folder: Path, names: Sequence[str], share: Share | None = None) -> list[str]:
    """The shards that this process still has to make; nothing is touched."""
    return [name for name in _own(names, share) if not (folder / name).exists()]


def work_through(
    folder: Path,
    names: Sequence[str],
    records_of: Callable[[str], Iterable[Record]],
    title: str,
    encoder: Mapping[str, Any] | None = None,
    share: Share | None = None,
) -> Path:
    """Writes `records_of(name)` to each missing shard of `folder`, then its manifest. Returns the folder.

    `share` is this process's part of the shards; None: the RANK-th of WORLD_SIZE.
    """
    todo, own = remaining(folder, names, share), len(_own(names, share))
    written = _manifest(folder)
    # Shards in place stay as they are; another fingerprint in the manifest would be a lie about them.
    if written and written["encoder"] != json.loads(json.dumps(encoder)):
        raise ValueError(
            f"{folder} holds shards that another encoder made; choose another output, or remove the folder"
        )
    if written and not todo and [row["name"] for row in written["shards"]] == list(names):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar() as progress:
        bar = progress.add_task(title, total=own, completed=own - len(todo))
        for name in todo:
            write_shard(folder / name, records_of(name))
            progress.advance(bar)
    if all((folder / name).exists() for name in names):
        write_manifest(folder, [describe_shard(folder / name) for name in names], encoder)
    return folder


def _own(names: Sequence[str], share: Share | None) -> Sequence[str]:
    place, parts = share or (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if not 0 <= place < parts:
        raise ValueError(f"share is [{place}, {parts}]; expected [place, of how many], the places counted from 0")
    return names[place::parts]


def _manifest(folder: Path) -> dict[str, Any]:
    """What shards.json says, whether or not its shards are all there; nothing where there is none."""
    path = folder / MANIFEST_NAME
    return {"encoder": None, **json.loads(path.read_text())} if path.is_file() else {}


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
