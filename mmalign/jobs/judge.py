"""Judges the candidates of shards: scores and preferences, or labels for every segment of a text.

    mmalign judge shards=runs/candidates output=runs/pairs
    mmalign judge shards=runs/candidates output=runs/pairs scorer.name=clip scorer.weights=vit_b_32.safetensors
    mmalign judge shards=runs/answers output=runs/labelled fine_grained.facts.model=qwen3-8b \\
        fine_grained.verification.model=llava-34b fine_grained.score=rejected pairing.rule=length_balanced

Works shard by shard: shards that exist are skipped, so that it can be killed and run again. Pictures are copied byte by
byte. Preferences: best against worst of each prompt, ties dropped. Scorers: `oracle` (exact, the embedded world only)
and `clip` (a local weights file). With `fine_grained`, a language model lists the facts that each segment of a text
states and a vision-language model verifies them, behind an OpenAI-compatible endpoint (OPENAI_BASE_URL,
OPENAI_API_KEY), in this process, or as the world's oracle; all their answers are kept in a journal, and none is asked
for twice.
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
from mmalign.feedback import Balance, Pairing, PairingSettings, Scorer, pair, pair_balanced
from mmalign.jobs.fine_grained import FineGrainedSettings, Labeller, usable
from mmalign.jobs.scorers import ScorerSettings, cautions, load_scorer
from mmalign.jobs.shards import Share, Skipped, by_name, progress_bar, remaining, work_through
from mmalign.jobs.sources import device_of

POSITIONAL = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    # folder with shards.json, tars, or URLs
    shards: str | list[str]
    # folder of the new shards
    output: str
    scorer: ScorerSettings = field(default_factory=ScorerSettings)
    # labels for the segments of text candidates, in place of a scorer; null: none
    fine_grained: FineGrainedSettings | None = None
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
    if settings.fine_grained is not None:
        return _run_fine_grained(settings, settings.fine_grained)
    manifest = Manifest.read(settings.shards)
    folder, shards = Path(settings.output), by_name(manifest)

    @functools.cache
    def scorer() -> Scorer:
        return load_scorer(settings.scorer, str(device_of(settings.device)))

    if remaining(folder, list(shards), settings.share):
        scorer()  # before anything is written
    skipped, paired = Skipped(settings.max_bad_share), Paired(settings)

    def records_of(name: str) -> Iterator[Record]:
        def scored() -> Iterator[Record]:
            for record in skipped.good(read_shard(shards[name], _need(manifest))):
                yield _scored(record, scorer(), settings.scorer.name)

        return paired(scored())

    work_through(folder, list(shards), records_of, "judge, shards", manifest.encoder, settings.share)
    console = Console()
    console.print(f"{skipped.seen} records judged, {paired}, {skipped.log.total} skipped -> {folder}")
    for caution in cautions(scorer() if skipped.seen else None):
        console.print(caution)
    return folder


def _run_fine_grained(settings: Settings, fine_grained: FineGrainedSettings) -> Path:
    manifest = Manifest.read(settings.shards)
    folder, shards = Path(settings.output), by_name(manifest)
    skipped, paired = Skipped(settings.max_bad_share), Paired(settings)
    console = Console()
    if not remaining(folder, list(shards), settings.share):
        return work_through(folder, list(shards), lambda name: (), "judge", manifest.encoder, settings.share)
    # before anything is written
    label = Labeller(fine_grained, folder, settings.share, device_of(settings.device))

    def records_of(name: str) -> Iterator[Record]:
        found = skipped.good(map(usable, read_shard(shards[name], _need(manifest))))
        with progress_bar() as progress:
            progress.live.transient = True  # one line for the shard at work, none for those before
            bar = progress.add_task(f"{name}, records", total=shards[name].row.records)
            labelled = label(found, lambda count: progress.advance(bar, count))
            yield from labelled if fine_grained.score is None else paired(labelled)

    try:
        work_through(folder, list(shards), records_of, "judge, shards", manifest.encoder, settings.share)
    finally:
        for line in label.report():
            console.print(line)
    pairs = "" if fine_grained.score is None else f"{paired}, "
    console.print(f"{skipped.seen} records judged, {pairs}{skipped.log.total} skipped -> {folder}")
    return folder


def _need(manifest: Manifest) -> frozenset[str]:
    return frozenset({"raw", "latent"} if manifest.encoder is not None else {"raw"})


class Paired:
    """The preferred pairs of records whose candidates have scores, shard by shard, and what was dropped."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._pairs, self._ties, self._unbalanced = 0, 0, 0

    def __call__(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records of one shard. Lengths are balanced within it, so that shards do not depend on one another."""
        balance = Balance()
        for record in records:
            pairing = _pair(record, self._settings.pairing, balance)
            self._pairs += len(pairing.preferred)
            self._ties += pairing.ties
            self._unbalanced += pairing.unbalanced
            if pairing.preferred or self._settings.keep_ties:
                yield dataclasses.replace(record, preferred=list(pairing.preferred))

    def __str__(self) -> str:
        lengths = f", {self._unbalanced} dropped for their lengths" if self._unbalanced else ""
        return f"{self._pairs} pairs, {self._ties} ties dropped{lengths}"


def _pair(record: Record, settings: PairingSettings, balance: Balance) -> Pairing:
    """Of the candidates that have a score."""
    scored = [
        (place, float(candidate.score), candidate.text)
        for place, candidate in enumerate(record.candidates)
        if candidate.score is not None
    ]
    if len(scored) < 2:
        return Pairing((), ties=0)
    places, scores, texts = zip(*scored, strict=True)
    if settings.rule == "length_balanced" and None not in texts:
        pairing = pair_balanced(scores, [len(text.split()) for text in texts], settings, balance)
    else:
        pairing = pair(scores, settings)
    preferred = tuple((places[high], places[low]) for high, low in pairing.preferred)
    return dataclasses.replace(pairing, preferred=preferred)


def _scored(record: Record, scorer: Scorer, name: str) -> Record:
    scores = scorer(_samples(record))
    candidates = [
        dataclasses.replace(candidate, score=score) for candidate, score in zip(record.candidates, scores, strict=True)
    ]
    meta = {**record.meta, "scorer": name} if len(candidates) > 1 else record.meta
    return dataclasses.replace(record, candidates=candidates, meta=meta)


def _samples(record: Record) -> Sequence[Sample]:
    return [
        Sample(key=record.name, prompt=record.prompt, group=0, draw=0, image=_picture(candidate), text=candidate.text)
        for candidate in record.candidates
    ]


def _picture(candidate: Candidate):
    return open_image(candidate.image) if isinstance(candidate.image, bytes) else candidate.image
