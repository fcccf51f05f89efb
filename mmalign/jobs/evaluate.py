"""Compares models on the same held-out prompts and seeds: a table with intervals, pictures side by side, a report.

    mmalign evaluate output=runs/eval 'models=[{name: base, path: world}, {name: dpo, path: runs/dpo/model}]'

The model called `base` is what the others are held against, picture by picture. Pictures are kept as shards under
`samples/`, so that a second call draws only what is missing. In the embedded world the oracle judges (accuracy by kind
of prompt and of fact); elsewhere CLIP scores. Writes report.html and results.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmalign.config import to_yaml
from mmalign.core.types import Sample
from mmalign.data import Manifest, Record, read_shard
from mmalign.evaluate.comparison import compare
from mmalign.evaluate.report import Report, installed_versions, write_report
from mmalign.evaluate.statistics import UNIT
from mmalign.evaluate.suite import Judged, Row, Run, summarise
from mmalign.evaluate.world import judge
from mmalign.jobs import generate
from mmalign.jobs.scorers import ScorerSettings, load_scorer
from mmalign.jobs.shards import Skipped
from mmalign.jobs.sources import seed_of
from mmalign.modalities.diffusion import DiffusionSampling, DiffusionSettings

POSITIONAL = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the comparison."""

    # rows with the same name are training seeds of one method; `base` is the one to beat
    name: str
    # folder or hub name of a pipeline; world is the one that ships with mmalign
    path: str
    # folder of LoRA weights to merge into it
    adapter: str | None = None
    # its training seed
    seed: int | None = None
    # its metrics.jsonl, for the curves of the report
    metrics: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    # folder of samples, report.html and results.json
    output: str
    models: list[Entry]
    # world:train, world:tune, world:test, a .txt file (a prompt a line) or a .jsonl file ({"prompt": ...} a line)
    prompts: str = "world:test"
    count: int | None = 1024
    images_per_prompt: int = 1
    # guidance scales; 1.0 is without
    guidance: list[float] = field(default_factory=lambda: [1.0, 3.0])
    # of prompts and pictures: all models get the same
    seed: int = 0
    title: str = "Evaluation"
    sampling: DiffusionSampling = field(default_factory=DiffusionSampling)
    # how the models are loaded; path and adapter come from `models`
    model: DiffusionSettings = field(default_factory=DiffusionSettings)
    scorer: ScorerSettings = field(default_factory=ScorerSettings)
    # cpu, cuda, cuda:1, mps; auto takes what is there
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Story:
    """What the report says beside the numbers; the demo fills it in."""

    command: str = ""
    config: str = ""
    health: Sequence[str] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


def run(settings: Settings) -> list[Row]:
    if "base" not in [entry.name for entry in settings.models]:
        raise ValueError("models: one must be called base, the model that the others are held against")
    for entry, scale in draws(settings):
        generate.run(drawing(settings, entry, scale))
    return report(settings, Story(command="mmalign evaluate", config=to_yaml(settings)))


def draws(settings: Settings) -> list[tuple[Entry, float]]:
    """All that has to be drawn: each model at each guidance scale."""
    return [(entry, scale) for scale in settings.guidance for entry in settings.models]


def drawing(settings: Settings, entry: Entry, scale: float) -> generate.Settings:
    """The settings that draw the pictures of one model at one guidance scale."""
    return generate.Settings(
        output=str(samples_folder(settings, entry, scale)),
        prompts=settings.prompts,
        count=settings.count,
        candidates=settings.images_per_prompt,
        seed=settings.seed,
        device=settings.device,
        model=dataclasses.replace(settings.model, path=entry.path, adapter=entry.adapter),
        sampling=dataclasses.replace(settings.sampling, guidance_scale=scale),
    )


def samples_folder(settings: Settings, entry: Entry, scale: float) -> Path:
    name = entry.name if entry.seed is None else f"{entry.name}-seed{entry.seed}"
    return Path(settings.output) / "samples" / f"{name}-guidance{scale:g}"


def report(settings: Settings, story: Story) -> list[Row]:
    """Judges what was drawn; writes report.html and results.json and prints the table."""
    scorer = None if settings.scorer.name == "oracle" else load_scorer(settings.scorer, settings.device)
    runs = []
    for entry, scale in draws(settings):
        judged = [
            one
            for record in _records(samples_folder(settings, entry, scale))
            for one in _judged(record, settings.seed, scorer)
        ]
        runs.append(Run(entry.name, judged, entry.seed, scale))
    rows = summarise(runs, bounds=UNIT if scorer is None else None)
    metrics: dict[str, list[str | Path]] = {}
    for entry in settings.models:
        if entry.metrics:
            metrics.setdefault(entry.name, []).append(entry.metrics)
    page = write_report(
        settings.output,
        Report(
            title=settings.title,
            rows=rows,
            comparison=_comparison(runs),
            metrics=metrics,
            health=story.health,
            skipped=story.skipped,
            config=story.config,
            command=story.command,
            versions=installed_versions(),
            notes=story.notes,
        ),
    )
    _print(rows, page)
    return rows


def _records(folder: Path) -> list[Record]:
    skipped = Skipped(max_bad_share=0.0)
    shards = Manifest.read(folder).shards
    return [record for shard in shards for record in skipped.good(read_shard(shard, need=frozenset({"image"})))]


def _judged(record: Record, seed: int, scorer) -> list[Judged]:
    found = []
    for place, candidate in enumerate(record.candidates):
        drawn = seed_of(seed, int(record.key), place)
        if scorer is None:
            found.append(judge(record.prompt, drawn, candidate.image))  # pyright: ignore[reportArgumentType]
            continue
        sample = Sample(record.name, record.prompt, group=0, draw=0, image=candidate.image)  # pyright: ignore
        [score] = scorer([sample])
        found.append(Judged(record.prompt, "prompt", drawn, score, image=candidate.image))  # pyright: ignore
    return found


def _comparison(runs: Sequence[Run]):
    """The first aligned model at the first guidance scale, beside the base."""
    aligned = next((run for run in runs if run.name != "base"), None)
    if aligned is None:
        return None
    base = next(run for run in runs if run.name == "base" and run.guidance == aligned.guidance)
    return compare(base, aligned)


def _print(rows: Sequence[Row], page: Path) -> None:
    table = Table(title=f"report: {page}")
    for column in ("model", "seed", "guidance", "n", "accuracy", "gain", "win rate", "diversity"):
        table.add_column(column)
    for row in rows:
        shown = (row.accuracy or row.score, row.gain or row.score_gain, row.win_rate, row.diversity)
        seed = "" if not row.seeds else str(row.seed) if row.seed is not None else f"{len(row.seeds)} seeds"
        table.add_row(row.name, seed, f"{row.guidance:g}", str(row.n), *(str(one) if one else "" for one in shown))
    Console().print(table)
