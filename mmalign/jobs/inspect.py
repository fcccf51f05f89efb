"""Counts, fields, feedback, bad records by kind, and a grid of pictures of shards.

mmalign inspect runs/pairs
mmalign inspect my-shards/ 'columns={prompt: txt, candidates: [jpg]}' grid=grid.png
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mmalign.data import Columns, Manifest, Record
from mmalign.data.inspect import Summary, picture_grid, records, summarise

POSITIONAL = "shards"


@dataclass(frozen=True, kw_only=True)
class Settings:
    # folder with shards.json, tars, or URLs
    shards: str | list[str]
    # how to read a foreign layout; null: records as mmalign writes them
    columns: Columns | None = None
    # how many records to look at, spread over the shards; null: all
    limit: int | None = None
    # where to write the grid of the first records with pictures; null: nowhere
    grid: str | None = None
    # records in the grid
    rows: int = 8


def run(settings: Settings) -> Summary:
    manifest = Manifest.read(settings.shards)
    # Latents that were stored without their pictures are looked at as tensors.
    need = frozenset({"latent"}) if manifest.encoder is not None else frozenset({"image"})
    summary = summarise(manifest, settings.columns, need, settings.limit)
    console = Console()
    for line in summary.lines():
        console.print(line, markup=False)
    if settings.grid is not None:
        if manifest.encoder is not None:
            raise ValueError("these shards hold latents; for a grid inspect the shards that were encoded")
        found = (one for one in records(manifest, settings.columns) if isinstance(one, Record))
        picture_grid(list(itertools.islice(found, settings.rows))).save(Path(settings.grid))
        console.print(f"pictures: {settings.grid}", markup=False)
    return summary
