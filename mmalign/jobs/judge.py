"""Scores the candidates of shards and writes preferences: best against worst of each prompt, ties dropped.

    mmalign judge shards=runs/candidates output=runs/pairs
    mmalign judge shards=runs/candidates output=runs/pairs scorer.name=clip scorer.weights=vit_b_32.safetensors

Works shard by shard: shards that exist are skipped, so that it can be killed and run again. Pictures are copied byte by
byte. Scorers: `oracle` (exact, the embedded world only) and `clip` (a local weights file).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from mmalign.core.types import Sample
from mmalign.data import Candidate, Manifest, Record, open_image, read_shard
from mmalign.feedback import PairingSettings, Scorer, pair
from mmalign.jobs.scorers import ScorerSettings, cautions, load_scorer
from mmalign.jobs.shards import Share, Skipped, by_name, remaining, work_through
from mmalign.jobs.sources import device_of

POSITIONAL = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    # folder with shards.json, tars, or URLs
    shards: str | list[str]
    # folder of the new shards
    output: str
    scorer: ScorerSettings = field(default_factory=ScorerSettings)
    pairing: PairingSettings = field(default_factory=PairingSettings)
    # keep records without a preference (ties); training skips and counts them
    keep_ties: bool = False
    # the share of records that may be unreadable before the job stops
    max_bad_share: float = 0.01
    # [place, of how many]: this process's part of the shards; null: RANK and WORLD_SIZE, as torchrun sets them
    share: Share | None = None
    # cpu, cuda, cuda:1, mps; auto takes what is there
    device: str = "auto"


def run(settings: Settings) -> Path:
    manifest = Manifest.read(settings.shards)
    folder, shards = Path(settings.output), by_name(manifest)

    @functools.cache
    def scorer() -> Scorer:
        return load_scorer(settings.scorer, str(device_of(settings.device)))

    if remaining(folder, list(shards), settings.share):
        scorer()  # before anything is written
    skipped = Skipped(settings.max_bad_share)
    need = frozenset({"raw", "latent"} if manifest.encoder is not None else {"raw"})
    ties = 0

    def records_of(name: str) -> Iterator[Record]:
        nonlocal ties
        for record in skipped.good(read_shard(shards[name], need)):
            judged, tied = _judge(record, scorer(), settings)
            ties += tied
            if judged.preferred or settings.keep_ties:
                yield judged

    work_through(folder, list(shards), records_of, "judge, shards", manifest.encoder, settings.share)
    Console().print(f"{skipped.seen} records judged, {ties} ties dropped, {skipped.log.total} skipped -> {folder}")
    for caution in cautions(scorer() if skipped.seen else None):
        Console().print(caution)
    return folder


def _judge(record: Record, scorer: Scorer, settings: Settings) -> tuple[Record, int]:
    scores = scorer(_samples(record))
    candidates = [
        dataclasses.replace(candidate, score=score) for candidate, score in zip(record.candidates, scores, strict=True)
    ]
    if len(candidates) < 2:
        return dataclasses.replace(record, candidates=candidates), 0
    pairing = pair(scores, settings.pairing)
    meta = {**record.meta, "scorer": settings.scorer.name}
    judged = dataclasses.replace(record, candidates=candidates, preferred=list(pairing.preferred), meta=meta)
    return judged, pairing.ties


def _samples(record: Record) -> Sequence[Sample]:
    return [
        Sample(key=record.name, prompt=record.prompt, group=0, draw=0, image=_picture(candidate), text=candidate.text)
        for candidate in record.candidates
    ]


def _picture(candidate: Candidate):
    return open_image(candidate.image) if isinstance(candidate.image, bytes) else candidate.image
