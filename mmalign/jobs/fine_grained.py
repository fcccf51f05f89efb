"""Labels the segments of text candidates by judges, and scores the candidates by their false facts.

Every answer of a judge goes to a journal beside the shards, so that a run that is killed or loses its endpoint asks
only what is missing. Refused: a judge of whose answers more than `max_bad_share` cannot be used.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from rich.table import Table

from mmalign.data import Record, RecordError, open_image
from mmalign.data.errors import Defect
from mmalign.feedback import (
    KINDS,
    Agreement,
    Finding,
    FineGrained,
    Journal,
    Journalled,
    Response,
    Tally,
    Template,
    agreement,
    rejected,
    stated,
)
from mmalign.jobs.judges import FactsOracle, JudgeSection, Loader, TruthOracle
from mmalign.jobs.shards import Share

# Answers that are seen before a judge can be given up within a shard.
FEW = 50


@dataclass(frozen=True, kw_only=True)
class FineGrainedSettings:
    # who lists the facts that a segment states: a language model, which sees no picture
    facts: JudgeSection
    # who says whether a fact is right: a vision-language model
    verification: JudgeSection
    # a file that takes the place of feedback/prompts/facts.txt, with {response} and {segment}
    facts_prompt: str | None = None
    # a file that takes the place of feedback/prompts/statement.txt, with {fact}
    statement_prompt: str | None = None
    # rejected: minus the number of false facts (RLAIF-V); share: minus their share; null: no score and no pairs
    score: Literal["rejected", "share"] | None = None
    # folder of the raw answers; null: journal, in output
    journal: str | None = None
    # records whose questions are asked together
    records_at_once: int = 32
    # the share of answers that may be malformed, undecided or missing before the job stops
    max_bad_share: float = 0.1
    # compare the labels with the oracle's, for descriptions of the embedded world
    against_oracle: bool = False


class Labeller:
    """What the job does with records. `report()` says how it went."""

    def __init__(self, settings: FineGrainedSettings, output: Path, share: Share | None, device: torch.device):
        facts = Template.read(settings.facts_prompt, "facts", ("response", "segment"))
        statement = Template.read(settings.statement_prompt, "statement", ("fact",))
        loader = Loader(device)
        lister, verifier = loader.lister(settings.facts, facts), loader.verifier(settings.verification, statement)
        writer = share[0] if share else int(os.environ.get("RANK", 0))
        journal = Journal(settings.journal or output / "journal", writer)
        self._settings = settings
        self._judges = (Journalled(lister, journal, facts.hash), Journalled(verifier, journal, statement.hash))
        self._fine_grained = FineGrained(*self._judges, facts, statement)
        self._oracle = FineGrained(FactsOracle(facts), TruthOracle(statement), facts, statement)
        self._labels: list[list[dict[str, Any]]] = []
        self._truth: list[list[dict[str, Any]]] = []
        self.tally = Tally()
        self.unscored = 0

    def __call__(self, records: Iterable[Record], done: Callable[[int], None]) -> Iterator[Record]:
        """The records with segments, and where asked with scores; `done(n)` after every n of them."""
        rest = iter(records)
        while chunk := list(itertools.islice(rest, self._settings.records_at_once)):
            yield from self._label(chunk)
            self._check(FEW)
            done(len(chunk))
        self._check(1)

    def _label(self, records: list[Record]) -> Iterator[Record]:
        responses = [
            Response(candidate.text or "", pictures)
            for record in records
            for pictures in [_pictures(record)]
            for candidate in record.candidates
        ]
        findings = self._fine_grained(responses, self.tally)
        if self._settings.against_oracle:
            self._labels += map(_entries, findings)
            self._truth += map(_entries, self._oracle(responses, Tally()))
        rest = iter(findings)
        for record in records:
            candidates = [self._labelled(candidate, next(rest)) for candidate in record.candidates]
            yield dataclasses.replace(record, candidates=candidates, meta={**record.meta, **self._meta()})

    def _labelled(self, candidate: Any, findings: list[Finding]) -> Any:
        labelled = dataclasses.replace(candidate, segments=_entries(findings))
        if self._settings.score is None:
            return labelled
        score = score_of(findings, self._settings.score)
        self.unscored += score is None
        return dataclasses.replace(labelled, score=score)

    def _meta(self) -> dict[str, Any]:
        lister, verifier = self._judges
        prompts = self._fine_grained
        return {
            "judge": {"facts": lister.name, "verification": verifier.name},
            "prompt_hash": {"facts": prompts.facts_prompt.hash, "verification": prompts.statement_prompt.hash},
            "date": datetime.now(UTC).date().isoformat(),
        }

    def _check(self, few: int) -> None:
        for name, count in (("facts", self.tally.facts), ("verification", self.tally.statements)):
            if count.asked >= few and count.bad_share > self._settings.max_bad_share:
                raise ValueError(
                    f"fine_grained.{name}: {count.bad_share:.0%} of the answers cannot be used, more than "
                    f"fine_grained.max_bad_share={self._settings.max_bad_share:g} allows: {count}. All answers are in "
                    "the journal; change the judge or its prompt, or raise the share"
                )

    def report(self) -> list[str | Table]:
        """What was asked, labelled and lost, and how the labels agree with the oracle's where that was asked."""
        tally, (lister, verifier) = self.tally, self._judges
        lines: list[str | Table] = [
            f"facts: {tally.facts}; {lister.asked} of them now",
            f"verification: {tally.statements}; {verifier.asked} of them now",
            f"{tally.segments} segments, {tally.unlabelled} left without labels",
        ]
        if self._settings.score is not None:
            lines.append(f"{self.unscored} candidates without a score, for not all of their facts are known")
        lines += [caution for judge in self._judges for caution in judge.cautions()]
        lines.append(_label_table(tally))
        if self._settings.against_oracle:
            lines.append(_agreement_table(agreement(self._labels, self._truth)))
        return lines


def score_of(findings: list[Finding], rule: Literal["rejected", "share"]) -> float | None:
    """Higher is better. None for a text without a word, and where the truth of a fact is not known."""
    false = rejected(findings) if findings else None
    if false is None:
        return None
    return float(-false) if rule == "rejected" else -false / max(stated(findings), 1)


def usable(record: Record | RecordError) -> Record | RecordError:
    """The record, its pictures decoded; or why no judge can say anything about it."""
    if isinstance(record, RecordError):
        return record
    try:
        if not record.prompt_images:
            raise Defect("missing_member", "the prompt has no picture; fine-grained feedback checks texts against one")
        for place, candidate in enumerate(record.candidates):
            if candidate.text is None:
                raise Defect("missing_member", f"candidate {place} has no text; fine-grained feedback reads texts")
        for image in record.prompt_images:
            if isinstance(image, bytes):
                open_image(image, "a picture of the prompt")
    except Defect as defect:
        return defect.at(record.shard, record.key)
    return record


def _pictures(record: Record) -> tuple[Image, ...]:
    return tuple(open_image(image) if isinstance(image, bytes) else image for image in record.prompt_images)


def _entries(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    return [entry for finding in findings if (entry := finding.entry()) is not None]


def _label_table(tally: Tally) -> Table:
    table = Table("type", "hallucinated", "fine", "no fact")
    for kind in KINDS:
        table.add_row(kind, *(str(tally.labels[kind, label]) for label in (1, 0, -1)))
    return table


def _agreement_table(found: dict[str, Agreement]) -> Table:
    table = Table("against the oracle", "precision", "recall", "labels right", "without a label")
    for kind, one in found.items():
        shares = (one.precision, one.recall, one.accuracy)
        table.add_row(kind, *("-" if share is None else f"{share:.3f}" for share in shares), str(one.unlabelled))
    return table
