"""Descriptions of the world in several sentences: a grammar that writes and reads them, and the truth of every fact.

    There is a [large] [red] circle [in the top left].      object, and attribute for each word that is there
    The circle is red.   The [red] circle is large.   The [red] circle is in the top left.             attribute
    The [red] circle is above the [blue] square.                                                        relation

The truth of a fact depends on its text and on the scene alone:

* object: the scene holds an object of that shape.
* attribute: the colour is right if an object of that shape has it. Size and place are judged on the objects of that
  shape and colour; where there is none, on those of that shape. Without an object of that shape all of them are false.
* relation: it holds between some two objects that fit the two names, colour included; both must be there.

A sentence outside the grammar is malformed: it is counted and states no fact. A fact that a description states a second
time (a relation also when turned round) is marked as repeated: it keeps its truth and its label, yet it counts neither
in the rates nor again in the coverage, so that repetition gains nothing there. A sentence that states repeated facts
only is counted too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mmalign.world.language import RELATIONS
from mmalign.world.scene import COLOURS, PLACES, SHAPES, SIZES, Object, Scene

KINDS = ("object", "attribute", "relation")
ATTRIBUTES = {"colour": tuple(COLOURS), "size": tuple(SIZES), "place": tuple(PLACES)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Reference:
    """An object as a sentence names it; without a colour any object of the shape fits."""

    shape: str
    colour: str | None = None

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}" if self.colour else self.shape

    def fits(self, thing: Object) -> bool:
        return thing.shape == self.shape and self.colour in (None, thing.colour)


@dataclass(frozen=True)
class Claim:
    """One fact. `start` and `end` are the characters of the description that state it."""

    kind: str
    subject: Reference
    attribute: str | None = None  # colour, size or place
    value: str | None = None  # the attribute's value, or the relation
    other: Reference | None = None
    start: int = field(default=0, compare=False)
    end: int = field(default=0, compare=False)

    @property
    def text(self) -> str:
        """The fact as a sentence of its own, without the full stop."""
        if self.kind == "object":
            return f"There is a {self.subject}"
        if self.kind == "relation":
            return f"The {self.subject} is {self.value} the {self.other}"
        return f"The {self.subject} is {'in the ' if self.attribute == 'place' else ''}{self.value}"

    def holds(self, scene: Scene) -> bool:
        alike = [thing for thing in scene.objects if thing.shape == self.subject.shape]
        if self.kind == "object":
            return bool(alike)
        if self.kind == "attribute":
            fitting = [thing for thing in alike if self.subject.fits(thing)] or alike
            return any(getattr(thing, str(self.attribute)) == self.value for thing in fitting)
        return bool(self.pairs(scene))

    def pairs(self, scene: Scene) -> list[tuple[Object, Object]]:
        """The objects between which a relation holds."""
        if self.other is None:
            return []
        return [
            (first, second)
            for first in scene.objects
            for second in scene.objects
            if self.subject.fits(first) and self.other.fits(second) and first != second
            if RELATIONS[str(self.value)](PLACES[first.place], PLACES[second.place])
        ]

    def same(self) -> Claim:
        """The wording that stands for all wordings of the fact: only relations have two."""
        if self.kind == "relation" and self.other and self.value in ("right of", "below"):
            return Claim("relation", self.other, value=OPPOSITE[self.value], other=self.subject)
        return self


@dataclass(frozen=True)
class Exists:
    """There is a large red circle in the top left."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: str | None = None

    def __str__(self) -> str:
        words = [self.size, self.colour, self.shape, f"in the {self.place}" if self.place else None]
        return f"There is a {' '.join(word for word in words if word)}."

    def claims(self) -> list[tuple[str, Claim]]:
        """Each claim with the name of the words that state it."""
        named = Reference(self.shape, self.colour)
        found = [("shape", Claim("object", Reference(self.shape)))]
        if self.colour:
            found.append(("colour", Claim("attribute", Reference(self.shape), "colour", self.colour)))
        for name, value in (("size", self.size), ("place", self.place)):
            if value:
                found.append((name, Claim("attribute", named, name, value)))
        return found


@dataclass(frozen=True)
class Has:
    """The red circle is large. Where `attribute` is the colour, the subject is named without one."""

    subject: Reference
    attribute: str
    value: str

    def __str__(self) -> str:
        return f"{Claim('attribute', self.subject, self.attribute, self.value).text}."

    def claims(self) -> list[tuple[str, Claim]]:
        return [(self.attribute, Claim("attribute", self.subject, self.attribute, self.value))]


@dataclass(frozen=True)
class Relates:
    """The red circle is above the blue square."""

    subject: Reference
    relation: str
    other: Reference

    def __str__(self) -> str:
        return f"{self.claims()[0][1].text}."

    def claims(self) -> list[tuple[str, Claim]]:
        return [("relation", Claim("relation", self.subject, value=self.relation, other=self.other))]


Sentence = Exists | Has | Relates


@dataclass(frozen=True)
class Statement:
    """One sentence of a text, characters `start` to `end`. `sentence` is None, and claims empty, where malformed."""

    text: str
    start: int
    end: int
    sentence: Sentence | None
    claims: tuple[Claim, ...] = ()

    @property
    def malformed(self) -> bool:
        return self.sentence is None


@dataclass(frozen=True)
class Judgement:
    """A stated fact and its truth; `start` and `end` as in the claim, `statement` the index of its sentence."""

    kind: str
    text: str
    truth: bool
    start: int
    end: int
    statement: int
    repeated: bool
    claim: Claim


# -- reading -----------------------------------------------------------------------------------------------------------

_COLOUR, _SHAPE, _SIZE, _PLACE = ("|".join(words) for words in (COLOURS, SHAPES, SIZES, PLACES))
_FORMS = tuple(
    re.compile(form + r"\.?")
    for form in (
        rf"There is a (?:(?P<size>{_SIZE}) )?(?:(?P<colour>{_COLOUR}) )?(?P<shape>{_SHAPE})"
        rf"(?: in the (?P<place>{_PLACE}))?",
        rf"The (?P<of>{_SHAPE}) is (?P<colour>{_COLOUR})",
        rf"The (?:(?P<of_colour>{_COLOUR}) )?(?P<of>{_SHAPE}) is (?:(?P<size>{_SIZE})|in the (?P<place>{_PLACE}))",
        rf"The (?:(?P<of_colour>{_COLOUR}) )?(?P<of>{_SHAPE}) is (?P<relation>{'|'.join(RELATIONS)}) "
        rf"the (?:(?P<other_colour>{_COLOUR}) )?(?P<other>{_SHAPE})",
    )
)
_SENTENCE = re.compile(r"\s*([^.]*\.|[^.]*\S)")


def parse_description(text: str) -> list[Statement]:
    """The sentences of `text` with their facts. Any text can be read: what is outside the grammar is malformed."""
    return [_read(match[1], match.start(1)) for match in _SENTENCE.finditer(text)]


def _read(text: str, start: int) -> Statement:
    match = next(filter(None, (form.fullmatch(text) for form in _FORMS)), None)
    if match is None:
        return Statement(text, start, start + len(text), None)
    parts = match.groupdict()
    sentence: Sentence
    if "shape" in parts:
        sentence = Exists(**parts)
    elif "relation" in parts:
        other = Reference(parts["other"], parts["other_colour"])
        sentence = Relates(Reference(parts["of"], parts["of_colour"]), parts["relation"], other)
    else:
        attribute = next(name for name in ATTRIBUTES if parts.get(name))
        sentence = Has(Reference(parts["of"], parts.get("of_colour")), attribute, parts[attribute])
    claims = tuple(
        replace(claim, start=start + match.start(words), end=start + match.end(words))
        for words, claim in sentence.claims()
    )
    return Statement(text, start, start + len(text), sentence, claims)


def claim_of(text: str) -> Claim:
    """The one fact that `text` states. Raises ValueError where it states none or several."""
    claims = [claim for statement in parse_description(text) for claim in statement.claims]
    if len(claims) != 1 or len(parse_description(text)) != 1:
        raise ValueError(f"{text!r} is not one fact of this world; expected e.g. 'The red circle is above the square'")
    return claims[0]


def verify_description(text: str, scene: Scene) -> list[Judgement]:
    """Every fact that `text` states, in order, with its truth in `scene`."""
    judged, seen = [], set()
    for index, statement in enumerate(parse_description(text)):
        for claim in statement.claims:
            repeated = claim.same() in seen
            seen.add(claim.same())
            truth = claim.holds(scene)
            judged.append(Judgement(claim.kind, claim.text, truth, claim.start, claim.end, index, repeated, claim))
    return judged


def segment_labels(text: str, scene: Scene) -> list[dict[str, int]]:
    """Per sentence its characters and a label per kind: 1 if a fact of it is false, 0 if all are true, -1 if none."""
    segments = []
    for statement in parse_description(text):
        truths = {kind: [claim.holds(scene) for claim in statement.claims if claim.kind == kind] for kind in KINDS}
        labels = {kind: int(not all(found)) if found else -1 for kind, found in truths.items()}
        segments.append({"start": statement.start, "end": statement.end, **labels})
    return segments


# -- measuring ---------------------------------------------------------------------------------------------------------


def true_facts(scene: Scene) -> set[object]:
    """What a full description says: each shape, each shape's colours, and that each two objects are related."""
    named = {(thing.shape, thing.colour) for thing in scene.objects}
    pairs = {frozenset((first, second)) for first in named for second in named if first != second}
    return {*(shape for shape, _ in named), *named, *pairs}


def coverage(text: str, scene: Scene) -> float:
    """The share of `true_facts(scene)` that `text` states truthfully; a relation counts in either wording.

    A relation covers the two objects only where its names fit no third one.
    """
    wanted = true_facts(scene)
    if not wanted:
        raise ValueError("a scene without objects has no facts to cover")
    stated: set[object] = set()
    for judgement in verify_description(text, scene):
        claim = judgement.claim
        if not judgement.truth:
            continue
        if claim.kind == "object":
            stated.add(claim.subject.shape)
        elif claim.attribute == "colour":
            stated.add((claim.subject.shape, claim.value))
        elif claim.other is not None:
            names = [_kinds(reference, scene) for reference in (claim.subject, claim.other)]
            stated |= {frozenset(name for kinds in names for name in kinds)} if max(map(len, names)) == 1 else set()
    return len(stated & wanted) / len(wanted)


def _kinds(reference: Reference, scene: Scene) -> set[tuple[str, str]]:
    return {(thing.shape, thing.colour) for thing in scene.objects if reference.fits(thing)}


@dataclass(frozen=True)
class Tally:
    """What a set of descriptions states: distinct facts per kind, how many are false, and what else there is to know.

    `coverage` is the mean over descriptions; `repeated` counts the sentences that say nothing new.
    """

    descriptions: int
    sentences: int
    malformed: int
    repeated: int
    stated: dict[str, int]
    false: dict[str, int]
    coverage: float

    def rate(self, kind: str) -> float:
        """The share of stated facts of `kind` that are false; 0 where none is stated."""
        return self.false[kind] / max(self.stated[kind], 1)

    @property
    def malformed_rate(self) -> float:
        return self.malformed / max(self.sentences, 1)


def tally(descriptions: Iterable[tuple[str, Scene]]) -> Tally:
    """The counts over (text, scene) pairs."""
    rows = list(descriptions)
    judged = [verify_description(text, scene) for text, scene in rows]
    distinct = [fact for facts in judged for fact in facts if not fact.repeated]
    statements = [statement for text, _ in rows for statement in parse_description(text)]
    malformed = sum(statement.malformed for statement in statements)
    # A sentence that is neither malformed nor says anything new says what was said before.
    new = sum(len({fact.statement for fact in facts if not fact.repeated}) for facts in judged)
    return Tally(
        descriptions=len(rows),
        sentences=len(statements),
        malformed=malformed,
        repeated=len(statements) - malformed - new,
        stated={kind: sum(fact.kind == kind for fact in distinct) for kind in KINDS},
        false={kind: sum(fact.kind == kind and not fact.truth for fact in distinct) for kind in KINDS},
        coverage=sum(coverage(text, scene) for text, scene in rows) / max(len(rows), 1),
    )
