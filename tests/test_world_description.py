"""Descriptions: what is written is read back and true, a wrong word makes exactly its facts false, spans are exact."""

import itertools
import random

import pytest

from mmalign.world.datasets import split_of
from mmalign.world.description import (
    KINDS,
    Claim,
    Exists,
    Has,
    Reference,
    Relates,
    claim_of,
    coverage,
    parse_description,
    segment_labels,
    tally,
    true_facts,
    verify_description,
)
from mmalign.world.language import parse_caption
from mmalign.world.questions import QUESTION_KINDS, answer, ask, existence_question, statement_question
from mmalign.world.scene import Object, Scene
from mmalign.world.writing import ErrorRates, corrupt_description, described_scenes, split_of_scene, text_of

# A large red circle above a small blue square, which is left of a small red square.
SCENE = Scene(
    (
        Object("circle", "red", "large", "top left"),
        Object("square", "blue", "small", "bottom left"),
        Object("square", "red", "small", "bottom right"),
    )
)
FULL = (
    "There is a large red circle in the top left. There is a blue square. There is a red square. "
    "The red circle is above the blue square. The red square is right of the blue square. "
    "The red square is below the red circle."
)


def truths(text: str, scene: Scene = SCENE) -> list[tuple[str, bool]]:
    return [(fact.text, fact.truth) for fact in verify_description(text, scene)]


def some(count: int, seed: int = 0):
    return itertools.islice(described_scenes(seed), count)


def test_what_is_written_is_read_back_and_wholly_true():
    for scene, sentences in some(500):
        text = text_of(sentences)
        assert [statement.sentence for statement in parse_description(text)] == sentences
        assert all(fact.truth for fact in verify_description(text, scene)), text
        assert {label for segment in segment_labels(text, scene) for label in list(segment.values())[2:]} <= {0, -1}


def test_each_fact_says_what_it_means_on_its_own():
    for scene, sentences in some(200):
        for statement in parse_description(text_of(sentences)):
            for claim in statement.claims:
                assert claim_of(claim.text) == claim == claim_of(claim.text + ".")
                assert claim_of(claim.text).holds(scene)


@pytest.mark.parametrize("text", ["", "There is a red circle.", "A circle", "The circle is red. The circle is red."])
def test_what_is_not_one_fact_is_refused(text):
    with pytest.raises(ValueError, match="not one fact"):
        claim_of(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is a triangle.", [("There is a triangle", False)]),
        ("There is a square.", [("There is a square", True)]),
        # colour: of any object of the shape; size and place: of the blue square, which is there
        (
            "There is a large blue square in the bottom right.",
            [
                ("There is a square", True),
                ("The square is blue", True),
                ("The blue square is large", False),
                ("The blue square is in the bottom right", False),
            ],
        ),
        # no green square: its size and place are judged on both squares
        (
            "There is a small green square in the top left.",
            [
                ("There is a square", True),
                ("The square is green", False),
                ("The green square is small", True),
                ("The green square is in the top left", False),
            ],
        ),
        # no cross: nothing about it is true
        (
            "There is a small red cross in the top left.",
            [
                ("There is a cross", False),
                ("The cross is red", False),
                ("The red cross is small", False),
                ("The red cross is in the top left", False),
            ],
        ),
        ("The red circle is left of the red square.", [("The red circle is left of the red square", True)]),
        ("The red circle is right of the red square.", [("The red circle is right of the red square", False)]),
        # in one column neither is left of the other
        ("The red circle is left of the blue square.", [("The red circle is left of the blue square", False)]),
        # named by the wrong colour, the circle is not there
        ("The green circle is above the blue square.", [("The green circle is above the blue square", False)]),
        # without colours: some two objects
        ("The square is left of the square.", [("The square is left of the square", True)]),
        ("The circle is above the circle.", [("The circle is above the circle", False)]),
        ("The circle is red.", [("The circle is red", True)]),
        ("The circle is blue.", [("The circle is blue", False)]),
        ("The circle is large.", [("The circle is large", True)]),
    ],
)
def test_the_truth_of_each_fact(text, expected):
    assert truths(text) == expected


@pytest.mark.parametrize(
    ("word", "wrong", "flipped"),
    [
        ("large", "small", {"The red circle is small"}),
        ("in the top left", "in the top right", {"The red circle is in the top right"}),
        ("blue square. There", "cyan square. There", {"The square is cyan"}),
        ("above the", "below the", {"The red circle is below the blue square"}),
        ("right of", "left of", {"The red square is left of the blue square"}),
        (
            "large red circle",
            "large red cross",
            {"There is a cross", "The cross is red", "The red cross is large", "The red cross is in the top left"},
        ),
    ],
)
def test_a_wrong_word_makes_exactly_its_own_facts_false(word, wrong, flipped):
    assert FULL.count(word) == 1
    spoilt = FULL.replace(word, wrong)
    assert {text for text, truth in truths(spoilt) if not truth} == flipped


@pytest.mark.parametrize("kind", ["shape", "attribute", "relation", "name"])
def test_corruption_changes_only_the_words_it_names(kind):
    generator = random.Random(0)
    rates = ErrorRates(**{kind: 1.0})
    for scene, sentences in some(200, seed=1):
        spoilt = corrupt_description(sentences, generator, rates)
        wrong = [fact for fact in verify_description(text_of(spoilt), scene) if not fact.truth]
        kinds = {fact.kind for fact in wrong}
        if kind == "attribute":
            # every colour is now another one, though perhaps that of a second object of the shape
            assert kinds <= {"attribute"}
            assert all(
                before.colour != after.colour and before.shape == after.shape
                for before, after in zip(sentences, spoilt, strict=True)
                if isinstance(before, Exists) and isinstance(after, Exists) and before.colour
            )
        elif kind == "shape":
            # each is replaced by a shape that the scene does not hold (four shapes, at most three objects)
            there = [sentence for sentence in spoilt if isinstance(sentence, Exists)]
            assert sum(fact.kind == "object" for fact in wrong) == len(there)
            assert "relation" not in kinds
        elif kind == "relation":
            # the opposite never holds where the relation does
            assert kinds <= {"relation"}
            assert len(wrong) == sum(isinstance(sentence, Relates) for sentence in spoilt)
        else:
            assert "object" not in kinds
            assert all(a == b for a, b in zip(sentences, spoilt, strict=True) if isinstance(a, Exists))
    assert corrupt_description(sentences, generator, ErrorRates()) == sentences


def test_spans_are_the_characters_that_state_it():
    statements = parse_description("  " + FULL)
    assert [("  " + FULL)[one.start : one.end] for one in statements] == [one.text for one in statements]
    assert [one.text for one in statements][1] == "There is a blue square."
    words = [FULL[fact.start : fact.end] for fact in verify_description(FULL, SCENE)]
    # circle, its colour, size and place; two squares with their colours; the relations
    assert words[:4] == ["circle", "red", "large", "top left"]
    assert words[4:] == ["square", "blue", "square", "red", "above", "right of", "below"]


def test_segment_labels_per_sentence():
    text = "There is a red cross. The circle is red. Hello there. The red circle is below the blue square."
    found = segment_labels(text, SCENE)
    assert [text[one["start"] : one["end"]] for one in found][2] == "Hello there."
    assert [tuple(one[kind] for kind in KINDS) for one in found] == [(1, 1, -1), (-1, 0, -1), (-1, -1, -1), (-1, -1, 1)]


@pytest.mark.parametrize(
    ("text", "malformed"),
    [
        ("", []),
        ("  ", []),
        (".", [True]),
        ("There is a dog.", [True]),
        ("There is a red circle", [False]),
        ("There is a red circle in the.", [True]),
        ("There is a red circle. There is a", [False, True]),
        ("The red circle is blue.", [True]),
        ("there is a circle.", [True]),
        ("There is a circle..", [False, True]),
        ("There is a circle.There is a square.", [False, False]),
        ("There is a circle, there is a square.", [True]),
    ],
)
def test_malformed_sentences_are_counted_and_state_nothing(text, malformed):
    statements = parse_description(text)
    assert [statement.malformed for statement in statements] == malformed
    assert all(statement.malformed == (statement.claims == ()) for statement in statements)


def test_coverage():
    # circle, square; red circle, blue square, red square; three pairs: 8 facts
    assert len(true_facts(SCENE)) == 8
    assert coverage(FULL, SCENE) == 1.0
    assert coverage("", SCENE) == 0.0
    assert coverage("There is a circle.", SCENE) == 1 / 8
    assert coverage("There is a red circle.", SCENE) == coverage("There is a red circle. " * 9, SCENE) == 2 / 8
    # a relation in both wordings is one; a false one is none; one that names no single object covers no pair
    assert coverage("The red circle is above the blue square.", SCENE) == 1 / 8
    turned = "The red circle is above the blue square. The blue square is below the red circle."
    assert coverage(turned, SCENE) == 1 / 8
    assert coverage("The red circle is below the blue square.", SCENE) == 0.0
    assert coverage("The circle is above the square.", SCENE) == 0.0
    # size and place are no part of it, and neither is what is false
    assert coverage("The red circle is large. There is a green cross.", SCENE) == 0.0
    for scene, sentences in some(200, seed=2):
        assert 0 < coverage(text_of(sentences), scene) <= 1
    with pytest.raises(ValueError, match="without objects"):
        coverage(FULL, Scene(()))


def test_repetition_gains_nothing():
    text = "There is a red circle. There is a red circle. There is a green cross. There is a green cross."
    once, twice = tally([("There is a red circle. There is a green cross.", SCENE)]), tally([(text, SCENE)])
    assert (once.stated, once.false, once.coverage) == (twice.stated, twice.false, twice.coverage)
    assert (once.repeated, twice.repeated) == (0, 2)
    assert once.rate("object") == once.rate("attribute") == 0.5
    assert once.rate("relation") == 0.0
    assert [fact.repeated for fact in verify_description(text, SCENE)] == [False, False, True, True] * 2
    turned = verify_description(
        "The red circle is above the blue square. The blue square is below the red circle.", SCENE
    )
    assert [fact.repeated for fact in turned] == [False, True]
    # the second square is new, though "there is a square" is not
    assert tally([("There is a blue square. There is a red square.", SCENE)]).repeated == 0


def test_a_tally_counts_over_descriptions():
    found = tally([(FULL, SCENE), ("There is a dog. There is a cross.", SCENE)])
    # FULL: circle, square (said twice, counted once); red circle, large, top left, blue and red square; three relations
    assert found.stated == {"object": 2 + 1, "attribute": 5, "relation": 3}
    assert found.false == {"object": 1, "attribute": 0, "relation": 0}
    assert (found.descriptions, found.sentences, found.malformed, found.malformed_rate) == (2, 8, 1, 1 / 8)
    assert found.coverage == 0.5


def test_splits_are_those_of_captions_and_disjoint():
    assert split_of_scene(SCENE) == split_of(parse_caption("a red circle, a blue square and a red square"))
    sets = {
        split: {
            frozenset((thing.shape, thing.colour) for thing in scene.objects)
            for scene, _ in itertools.islice(described_scenes(0, split), 300)
        }
        for split in ("train", "tune", "test")
    }
    assert not sets["train"] & sets["test"]
    assert not sets["train"] & sets["tune"]
    assert not sets["tune"] & sets["test"]
    assert all(2 <= len(one) <= 3 for split in sets.values() for one in split)
    with pytest.raises(ValueError, match="expected one of train, tune, test"):
        next(described_scenes(0, "dev"))


@pytest.mark.parametrize(
    ("question", "truth"),
    [
        (existence_question("circle"), True),
        (existence_question("circle", "red"), True),
        (existence_question("circle", "blue"), False),
        (existence_question("cross"), False),
        (statement_question("The red circle is above the blue square"), True),
        (statement_question("The red circle is above the blue square."), True),
        (statement_question("The circle is green"), False),
    ],
)
def test_questions_have_exact_answers(question, truth):
    assert answer(question, SCENE) is truth


def test_the_wording_of_questions():
    expected = "Statement: The circle is red. Is this statement right according to the image? Please answer yes or no."
    assert statement_question("The circle is red") == statement_question("The circle is red.") == expected
    assert existence_question("circle", "red") == "Is there a red circle in the image?"
    with pytest.raises(ValueError, match="not a question"):
        answer("Is it nice?", SCENE)


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_asked_questions_are_right_and_balanced(kind):
    generator = random.Random(0)
    asked = [(scene, ask(scene, generator, kind)) for scene, _ in some(400, seed=3)]
    assert all(answer(question.text, scene) is question.truth for scene, question in asked)
    assert all(
        question.answer == ("yes" if question.truth else "no") and question.kind == kind for _, question in asked
    )
    # a fair coin: 400 throws, 5 standard deviations of 0.025
    assert abs(sum(question.truth for _, question in asked) / 400 - 0.5) < 0.125


def test_sentences_and_claims_have_one_meaning():
    assert str(Has(Reference("circle", "red"), "place", "top left")) == "The red circle is in the top left."
    assert str(Relates(Reference("circle"), "left of", Reference("cross", "blue"))) == (
        "The circle is left of the blue cross."
    )
    left = Claim("relation", Reference("circle"), value="left of", other=Reference("cross"))
    right = Claim("relation", Reference("cross"), value="right of", other=Reference("circle"))
    assert left != right
    assert left.same() == right.same() == left
