"""Writes the manifest (shards.json) of shards that have none: records, bytes and sha256 of each.

mmalign index path/to/shards
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mmalign.data import index_shards
from mmalign.jobs.shards import progress_bar

POSITIONAL = "shards"


@dataclass(frozen=True, kw_only=True)
class Settings:
    # the folder of the tars
    shards: str


def run(settings: Settings) -> Path:
    with progress_bar() as progress:
        bar = progress.add_task("index, shards", total=None)
        manifest = index_shards(
            [settings.shards], lambda done, total: progress.update(bar, completed=done, total=total)
        )
    path = Path(manifest.shards[0].location).parent / "shards.json"
    Console().print(f"{manifest.records} records in {len(manifest.shards)} shards -> {path}")
    return path
