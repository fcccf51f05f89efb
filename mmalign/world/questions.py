"""Yes/no questions about a scene with exact answers: for a model's judgement of statements, and as POPE asks them.

    Statement: The circle is red. Is this statement right according to the image? Please answer yes or no.
    Is there a red circle in the image?

`answer` reads any of them; the truth of a statement is that of `world.description`.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from mmalign.world.description import ATTRIBUTES, OPPOSITE, Claim, Reference, claim_of
from mmalign.world.language import RELATIONS
from mmalign.world.scene import COLOURS, SHAPES, Object, Scene
from mmalign.world.writing import named, relations

STATEMENT_QUESTION = "Statement: {fact}. Is this statement right according to the image? Please answer yes or no."
# The odds of each kind of question in `ask`; "existence" is the wording of POPE.
QUESTION_KINDS = {"object": 0.15, "attribute": 0.3, "relation": 0.4, "existence": 0.15}
_EXISTENCE = re.compile(
    rf"Is there a (?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)}) in the image\?"
)
_STATEMENT = re.compile(re.escape(STATEMENT_QUESTION).replace(r"\{fact\}", "(?P<fact>.*)"))


@dataclass(frozen=True)
class Question:
    """A question and its answer; `kind` is one of QUESTION_KINDS."""

    text: str
    truth: bool
    kind: str

    @property
    def answer(self) -> str:
        return "yes" if self.truth else "no"


def statement_question(fact: str) -> str:
    """The question whether `fact`, a sentence with or without its full stop, is right."""
    return STATEMENT_QUESTION.format(fact=fact.strip().removesuffix("."))


def existence_question(shape: str, colour: str | None = None) -> str:
    return f"Is there a {Reference(shape, colour)} in the image?"


def answer(question: str, scene: Scene) -> bool:
    """The truth. Raises ValueError for a question of another wording, and for a statement that is not one fact."""
    asked = _EXISTENCE.fullmatch(question)
    if asked:
        reference = Reference(asked["shape"], asked["colour"])
        return any(reference.fits(thing) for thing in scene.objects)
    asked = _STATEMENT.fullmatch(question)
    if asked is None:
        raise ValueError(f"not a question of this world: {question!r}; expected e.g. {existence_question('circle')!r}")
    return claim_of(asked["fact"]).holds(scene)


def ask(scene: Scene, generator: random.Random, kind: str | None = None) -> Question:
    """A question about `scene`, yes and no equally likely; `kind` is drawn by QUESTION_KINDS where it is None."""
    kind = kind or generator.choices(list(QUESTION_KINDS), list(QUESTION_KINDS.values()))[0]
    wanted = generator.random() < 0.5
    while True:
        text = _QUESTIONS[kind](scene, generator, wanted)
        if answer(text, scene) == wanted:
            return Question(text, wanted, kind)


def _about_object(scene: Scene, generator: random.Random, wanted: bool) -> str:
    return statement_question(Claim("object", Reference(generator.choice(SHAPES))).text)


def _about_attribute(scene: Scene, generator: random.Random, wanted: bool) -> str:
    thing = generator.choice(scene.objects)
    attribute = generator.choice(list(ATTRIBUTES))
    value = getattr(thing, attribute) if wanted else generator.choice(ATTRIBUTES[attribute])
    subject = _misnamed(thing, generator, 0.1)
    if attribute == "colour":
        subject = Reference(subject.shape)
    return statement_question(Claim("attribute", subject, attribute, value).text)


def _about_relation(scene: Scene, generator: random.Random, wanted: bool) -> str:
    first, second = generator.sample(scene.objects, 2)
    relation = generator.choice(relations(first, second))
    subject, other = named(first), named(second)
    if not wanted and generator.random() < 0.3:
        subject, other = _misnamed(first, generator, 0.5), _misnamed(second, generator, 0.5)
    elif not wanted:
        relation = generator.choice([OPPOSITE[relation], *RELATIONS])
    return statement_question(Claim("relation", subject, value=relation, other=other).text)


def _misnamed(thing: Object, generator: random.Random, probability: float) -> Reference:
    """The object's name with, at `probability`, another shape or another colour."""
    if generator.random() >= probability:
        return named(thing)
    if generator.random() < 0.5:
        return Reference(generator.choice(SHAPES), thing.colour)
    return Reference(thing.shape, generator.choice(list(COLOURS)))


def _about_existence(scene: Scene, generator: random.Random, wanted: bool) -> str:
    """A third ask for a shape alone; a "no" is often near: right but for the shape, or for the colour."""
    thing = generator.choice(scene.objects)
    reference = named(thing) if wanted else _misnamed(thing, generator, 0.7)
    if not wanted and reference == named(thing):
        reference = Reference(generator.choice(SHAPES), generator.choice(list(COLOURS)))
    return existence_question(reference.shape, reference.colour if generator.random() < 2 / 3 else None)


_QUESTIONS = {
    "object": _about_object,
    "attribute": _about_attribute,
    "relation": _about_relation,
    "existence": _about_existence,
}
