"""The captions of the world: a grammar that both writes and reads them.

    one       a large red circle in the top left
    count     two red circles
    two       a red circle and a blue square
    relation  a red circle left of a blue square
    three     a red circle, a blue square and a green cross

Size and place are stated only sometimes; what a caption leaves open, a picture may fill in freely.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from mmalign.world.scene import COLOURS, PLACES, SHAPES, SIZES, Object, Scene

COUNTS = ("a", "two", "three")
# relation -> does it hold for (row, column) of the first and of the second object?
RELATIONS = {
    "left of": lambda first, second: first[1] < second[1],
    "right of": lambda first, second: first[1] > second[1],
    "above": lambda first, second: first[0] < second[0],
    "below": lambda first, second: first[0] > second[0],
}
KINDS = ("one", "count", "two", "relation", "three")
PROBABILITY_OF_SIZE = 0.25
PROBABILITY_OF_PLACE = 0.25


@dataclass(frozen=True)
class Mention:
    """What a caption says of one kind of object. `count` of them are alike; None means not stated."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None
    count: int = 1

    def __str__(self) -> str:
        plural = {"cross": "crosses"}.get(self.shape, f"{self.shape}s")
        words = [COUNTS[self.count - 1], self.size, self.colour, plural if self.count > 1 else self.shape]
        place = f"in the {self.place}" if self.place else None
        return " ".join(word for word in [*words, place] if word)


@dataclass(frozen=True)
class Caption:
    """The meaning of a caption; `str(caption)` is its text."""

    mentions: tuple[Mention, ...]
    relation: str | None = None

    @property
    def kind(self) -> str:
        if self.relation:
            return "relation"
        if len(self.mentions) == 1:
            return "count" if self.mentions[0].count > 1 else "one"
        return "two" if len(self.mentions) == 2 else "three"

    @property
    def object_count(self) -> int:
        return sum(mention.count for mention in self.mentions)

    def __str__(self) -> str:
        words = [str(mention) for mention in self.mentions]
        if self.relation:
            return f"{words[0]} {self.relation} {words[1]}"
        return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


_MENTION = re.compile(
    rf"(?P<count>{'|'.join(COUNTS)}) (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) "
    rf"(?P<shape>{'|'.join(SHAPES)})(?:es|s)?(?: in the (?P<place>{'|'.join(PLACES)}))?"
)
_LINK = re.compile(rf" (?P<relation>{'|'.join(RELATIONS)}) |, | and ")


def parse_caption(text: str) -> Caption:
    """The meaning of `text`. Raises ValueError, with the place of the first problem, outside the grammar."""
    mentions, relation, position = [], None, 0
    while True:
        match = _MENTION.match(text, position)
        if match is None:
            raise ValueError(f"not a caption of this world, at character {position} of {text!r}; e.g. 'a red circle'")
        parts = match.groupdict()
        count = COUNTS.index(parts.pop("count")) + 1
        mentions.append(Mention(count=count, **parts))
        if match.end() == len(text):
            return Caption(tuple(mentions), relation)
        link = _LINK.match(text, match.end())
        if link is None:
            raise ValueError(f"not a caption of this world, at character {match.end()} of {text!r}")
        relation = link["relation"] or relation
        position = link.end()


def describe(scene: Scene, generator: random.Random) -> Caption:
    """A true caption of all objects of `scene`; what it says of size, place and relation is drawn."""
    things = list(scene.objects)
    generator.shuffle(things)
    alike = {(thing.shape, thing.colour) for thing in things}
    if len(alike) == 1 and len(things) > 1:
        return Caption((Mention(things[0].shape, things[0].colour, count=len(things)),))
    if len(things) == 2 and generator.random() < 0.5:
        first, second = (PLACES[thing.place] for thing in things)
        relation = generator.choice([name for name, holds in RELATIONS.items() if holds(first, second)])
        return Caption(tuple(_mention(thing, generator, with_place=False) for thing in things), relation)
    with_place = len(things) < 3
    return Caption(tuple(_mention(thing, generator, with_place) for thing in things))


def _mention(thing: Object, generator: random.Random, with_place: bool) -> Mention:
    size = thing.size if generator.random() < PROBABILITY_OF_SIZE else None
    place = thing.place if with_place and generator.random() < PROBABILITY_OF_PLACE else None
    return Mention(thing.shape, thing.colour, size, place)


def corrupt(caption: Caption, generator: random.Random, probability: float) -> Caption:
    """Each colour and each shape word replaced, with `probability`, by another one: a web caption."""

    def other(value: str, values) -> str:
        return generator.choice([v for v in values if v != value]) if generator.random() < probability else value

    mentions = tuple(
        replace(mention, colour=other(mention.colour, COLOURS), shape=other(mention.shape, SHAPES))
        for mention in caption.mentions
    )
    return replace(caption, mentions=mentions)
