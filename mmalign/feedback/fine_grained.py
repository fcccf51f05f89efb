"""Fine-grained feedback on texts about pictures: facts per segment, the truth of each, labels (arXiv 2404.05046).

A judge turns each segment, given the whole response, into facts of three types; another one says whether each fact is
right according to the pictures. A segment's label of a type is 1 (hallucinated) if any fact of it is false, 0 if all
are true and -1 if there is none. What a judge leaves open labels nothing: a segment whose facts could not be read, or
for which a label hangs on an undecided fact, is counted and left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmalign.core.types import Prompt
from mmalign.feedback.judges import Answer, Judge, Template, answers, says_yes
from mmalign.feedback.segments import segments

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = ("object", "attribute", "relation")
HALLUCINATED, FINE, NONE = 1, 0, -1
# How many answers that could not be used are kept to be shown.
EXAMPLES = 3

_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_HEADING = re.compile(rf"[*#\s]*({'|'.join(KINDS)})s?[*\s]*:[*\s]*(none\.?|\[\])?\s*", re.IGNORECASE)
_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+(\S.*?)\s*")


class Malformed(ValueError):
    """An answer that is not the list of facts that was asked for."""


@dataclass(frozen=True)
class Fact:
    """One statement about the picture; `kind` is one of KINDS."""

    kind: str
    text: str


@dataclass(frozen=True)
class Response:
    """A text and the pictures that it speaks of."""

    text: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What is known of characters `start` to `end`: its facts (None: they could not be read), and whether each holds
    (None: undecided)."""

    start: int
    end: int
    facts: tuple[Fact, ...] | None
    holds: tuple[bool | None, ...] = ()

    @property
    def labels(self) -> dict[str, int] | None:
        """A label per kind; None where one of them is not known."""
        if self.facts is None:
            return None
        labels = {}
        for kind in KINDS:
            found = [holds for fact, holds in zip(self.facts, self.holds, strict=True) if fact.kind == kind]
            if False not in found and None in found:
                return None
            labels[kind] = NONE if not found else HALLUCINATED if False in found else FINE
        return labels

    def entry(self) -> dict[str, Any] | None:
        """The segment as a record holds it, with the facts; None where a label is not known."""
        if self.labels is None:
            return None
        facts = [
            {"kind": fact.kind, "text": fact.text, "holds": holds}
            for fact, holds in zip(self.facts or (), self.holds, strict=True)
        ]
        return {"start": self.start, "end": self.end, **self.labels, "facts": facts}


@dataclass
class Count:
    """How a judge fared: what it was asked, and what became of the questions that have no usable answer."""

    asked: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def bad_share(self) -> float:
        return self.lost.total() / max(self.asked, 1)

    def lose(self, why: str, answer: Answer) -> None:
        self.lost[why] += 1
        if answer.text and len(self.examples) < EXAMPLES:
            self.examples.append(answer.text)

    def __str__(self) -> str:
        lost = "".join(f", {count} {why}" for why, count in self.lost.most_common())
        shown = f" (e.g. {self.examples[0]!r:.120})" if self.examples else ""
        return f"{self.asked} asked{lost}{shown}"


@dataclass
class Tally:
    """Counts over everything that was labelled. `labels` counts (kind, label)."""

    facts: Count = field(default_factory=Count)
    statements: Count = field(default_factory=Count)
    segments: int = 0
    unlabelled: int = 0
    labels: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, finding: Finding) -> None:
        self.segments += 1
        labels = finding.labels
        self.unlabelled += labels is None
        self.labels.update((labels or {}).items())


@dataclass(frozen=True)
class FineGrained:
    """Who lists the facts, who verifies them, and in which words they are asked."""

    lister: Judge
    verifier: Judge
    facts_prompt: Template
    statement_prompt: Template

    def __call__(self, responses: Sequence[Response], tally: Tally) -> list[list[Finding]]:
        """The findings on each response, segment by segment; what was lost is counted in `tally`."""
        spans = [(place, span) for place, response in enumerate(responses) for span in segments(response.text)]
        facts = self._facts([(responses[place].text, span) for place, span in spans], tally.facts)
        asked = [
            (responses[place].images, fact)
            for (place, _), found in zip(spans, facts, strict=True)
            for fact in found or ()
        ]
        truths = iter(self._truths(asked, tally.statements))
        findings: list[list[Finding]] = [[] for _ in responses]
        for (place, span), found in zip(spans, facts, strict=True):
            finding = Finding(*span, found, tuple(next(truths) for _ in found or ()))
            tally.add(finding)
            findings[place].append(finding)
        return findings

    def _facts(self, parts: Sequence[tuple[str, tuple[int, int]]], count: Count) -> list[tuple[Fact, ...] | None]:
        questions = [
            Prompt(self.facts_prompt.fill(response=text.strip(), segment=text[slice(*span)].strip()))
            for text, span in parts
        ]
        found: list[tuple[Fact, ...] | None] = []
        for answer in answers(self.lister, questions):
            count.asked += 1
            try:
                found.append(None if answer.failure else parse_facts(answer.text))
            except Malformed:
                found.append(None)
            if found[-1] is None:
                count.lose(answer.failure or "malformed", answer)
        return found

    def _truths(self, asked: Sequence[tuple[tuple[Image, ...], Fact]], count: Count) -> list[bool | None]:
        questions = [
            Prompt(self.statement_prompt.fill(fact=fact.text.removesuffix(".")), images) for images, fact in asked
        ]
        found: list[bool | None] = []
        for answer in answers(self.verifier, questions):
            count.asked += 1
            found.append(None if answer.failure else says_yes(answer))
            if found[-1] is None:
                count.lose(answer.failure or "undecided", answer)
        return found


def rejected(findings: Sequence[Finding]) -> int | None:
    """How many facts of a response are false; None where that is not known of every fact (arXiv 2405.17220)."""
    holds = [holds for finding in findings for holds in finding.holds]
    if None in holds or any(finding.facts is None for finding in findings):
        return None
    return holds.count(False)


def stated(findings: Sequence[Finding]) -> int:
    """How many facts a response states, as far as they could be read."""
    return sum(len(finding.holds) for finding in findings)


# -- reading a list of facts -------------------------------------------------------------------------------------------


def parse_facts(answer: str) -> tuple[Fact, ...]:
    """The facts in one of three forms, which must be the whole answer (a code fence around it is allowed):

    * a JSON object with the keys object, attribute and relation, each a list of sentences
    * a JSON list of {"type": "object", "fact": "..."}
    * the three words as headings (`object:`), each with a list of `- ` lines, or none

    Raises Malformed for everything else.
    """
    text = answer.strip()
    fenced = _FENCE.fullmatch(text)
    text = fenced[1].strip() if fenced else text
    if not text.startswith(("{", "[")):
        return _headed(text)
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from None
    if isinstance(found, dict):
        if set(found) != set(KINDS) or not all(isinstance(listed, list) for listed in found.values()):
            raise Malformed(f"expected lists under {', '.join(KINDS)}, got {', '.join(found) or 'no keys'}")
        return tuple(_fact(kind, text) for kind in KINDS for text in found[kind])
    if not all(isinstance(item, dict) and set(item) == {"type", "fact"} for item in found):
        raise Malformed('expected a list of {"type": ..., "fact": ...}')
    return tuple(_fact(item["type"], item["fact"]) for item in found)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Malformed("a key comes twice")
    return found


def _fact(kind: Any, text: Any) -> Fact:
    if kind not in KINDS or not isinstance(text, str) or not text.strip():
        raise Malformed(f"expected a sentence of type {', '.join(KINDS)}, got {kind!r:.40}: {text!r:.80}")
    return Fact(kind, text.strip())


def _headed(text: str) -> tuple[Fact, ...]:
    found: dict[str, list[str]] = {}
    listed: list[str] | None = None
    for line in text.splitlines():
        heading, item = _HEADING.fullmatch(line), _ITEM.fullmatch(line)
        if heading and heading[1].lower() not in found:
            listed = found[heading[1].lower()] = []
            if heading[2]:
                listed = None  # nothing may follow "none"
        elif item and listed is not None:
            listed.append(item[1])
        elif line.strip():
            raise Malformed(f"cannot read the line {line!r:.80}")
    if set(found) != set(KINDS):
        raise Malformed(f"expected headings {', '.join(KINDS)}, got {', '.join(found) or 'none'}")
    lists = {
        kind: [] if [item.lower().rstrip(".") for item in found[kind]] == ["none"] else found[kind] for kind in KINDS
    }
    return tuple(_fact(kind, item) for kind in KINDS for item in lists[kind])


# -- how good a judge is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Labels of one kind against the truth, segment by segment. `table` counts (label, truth); `unlabelled` the
    segments without a label. A hallucination is what is to be found."""

    table: Mapping[tuple[int, int], int]
    unlabelled: int

    @property
    def precision(self) -> float | None:
        """Of the segments called hallucinated, the share that are; None where none is called so."""
        return _share(self.table.get((HALLUCINATED, HALLUCINATED), 0), self._of(label=HALLUCINATED))

    @property
    def recall(self) -> float | None:
        """Of the hallucinated segments that have a label, the share that are called so; None where there are none."""
        return _share(self.table.get((HALLUCINATED, HALLUCINATED), 0), self._of(truth=HALLUCINATED))

    @property
    def accuracy(self) -> float | None:
        """The share of labels, of all three, that are right."""
        return _share(sum(count for (label, truth), count in self.table.items() if label == truth), self._of())

    def _of(self, label: int | None = None, truth: int | None = None) -> int:
        return sum(
            count for (given, right), count in self.table.items() if label in (None, given) and truth in (None, right)
        )


def agreement(
    labels: Sequence[Sequence[Mapping[str, Any]]], truth: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Agreement]:
    """How the segments of each response are labelled, against `truth` for the same responses, by kind.

    Segments are matched by their characters; a segment of `truth` that `labels` lacks is unlabelled. Raises ValueError
    where `labels` has one that `truth` lacks.
    """
    tables: dict[str, Counter[tuple[int, int]]] = {kind: Counter() for kind in KINDS}
    unlabelled = 0
    for place, (given, right) in enumerate(zip(labels, truth, strict=True)):
        by_span = {(segment["start"], segment["end"]): segment for segment in given}
        for segment in right:
            found = by_span.pop((segment["start"], segment["end"]), None)
            unlabelled += found is None
            if found is not None:
                for kind in KINDS:
                    tables[kind][found[kind], segment[kind]] += 1
        if by_span:
            raise ValueError(f"response {place} has labels for characters {min(by_span)} that the truth does not know")
    return {kind: Agreement(table, unlabelled) for kind, table in tables.items()}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
