"""From answers to facts, from facts to labels, and how good a judge is against the world's exact truth."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence

import pytest

from mmalign.core.types import Prompt
from mmalign.feedback import (
    KINDS,
    Answer,
    Fact,
    Finding,
    FineGrained,
    Journal,
    Journalled,
    Malformed,
    Response,
    Tally,
    Template,
    agreement,
    answers,
    parse_facts,
    rejected,
    says_yes,
    stated,
)
from mmalign.jobs.fine_grained import score_of
from mmalign.jobs.judges import FactsOracle, TruthOracle
from mmalign.world import Object, Scene, render
from mmalign.world.description import segment_labels
from mmalign.world.questions import statement_question
from mmalign.world.writing import described_scenes, text_of

FACTS = Template.read(None, "facts", ("response", "segment"))
STATEMENT = Template.read(None, "statement", ("fact",))
SCENE = Scene((Object("circle", "red", "small", "top left"), Object("square", "blue", "large", "bottom right")))
DOG = Fact("object", "There is a dog")
BROWN = Fact("attribute", "The dog is brown")
LEFT = Fact("relation", "The dog is left of the chair")


class Script:
    """Says what is written for a question, by its words; where that is an answer with a failure, it fails."""

    name, identity = "script", {"script": 1}

    def __init__(self, lines: dict[str, str | Answer], otherwise: str = ""):
        self.lines, self.otherwise = lines, otherwise
        self.questions: list[Prompt] = []

    def cautions(self) -> list[str]:
        return []

    def ask(self, questions: Sequence[Prompt]):
        self.questions += questions
        # the last question is answered first: places, not order, say what belongs together
        for place in reversed(range(len(questions))):
            said = next((said for words, said in self.lines.items() if words in questions[place].text), self.otherwise)
            yield place, said if isinstance(said, Answer) else Answer(said)


def oracle() -> FineGrained:
    return FineGrained(FactsOracle(FACTS), TruthOracle(STATEMENT), FACTS, STATEMENT)


# -- reading answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        '{"object": ["There is a dog"], "attribute": ["The dog is brown"], "relation": []}',
        ' ```json\n{"relation": [], "object": ["There is a dog "], "attribute": ["The dog is brown"]}\n``` ',
        '[{"type": "object", "fact": "There is a dog"}, {"fact": "The dog is brown", "type": "attribute"}]',
        "object:\n- There is a dog\nattribute:\n- The dog is brown\nrelation:\n- none",
        "**Objects:**\n1. There is a dog\n\n**Attributes:**\n* The dog is brown\n\nRelations: none",
    ],
)
def test_three_forms_of_a_list_of_facts(answer):
    assert parse_facts(answer) == (DOG, BROWN)


@pytest.mark.parametrize(
    "answer", ['{"object": [], "attribute": [], "relation": []}', "[]", "object: none\nattribute: none\nrelation: []"]
)
def test_no_facts_is_an_answer(answer):
    assert parse_facts(answer) == ()


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "There is a dog.",
        'Sure! {"object": [], "attribute": [], "relation": []}',
        '{"object": [], "attribute": [], "relation": []} I hope this helps.',
        '{"object": [], "attribute": []}',
        '{"object": [], "attribute": [], "relation": [], "count": []}',
        '{"object": "There is a dog", "attribute": [], "relation": []}',
        '{"object": ["There is a dog", 3], "attribute": [], "relation": []}',
        '{"object": [""], "attribute": [], "relation": []}',
        '{"object": ["There is a dog"], "object": [], "attribute": [], "relation": []}',
        '{"object": ["There is a dog", "attribute": [], "relation": []}',
        '[{"type": "animal", "fact": "There is a dog"}]',
        '[{"type": "object"}]',
        '["There is a dog"]',
        "object:\n- There is a dog\nattribute:\n- The dog is brown",
        "object:\n- There is a dog\nobject:\n- There is a cat\nattribute: none\nrelation: none",
        "object: none\n- There is a dog\nattribute: none\nrelation: none",
        "- There is a dog\nobject: none\nattribute: none\nrelation: none",
        "object:\nThere is a dog\nattribute: none\nrelation: none",
        "[" * 100_000,
    ],
)
def test_everything_else_is_malformed(answer):
    with pytest.raises(Malformed):
        parse_facts(answer)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("yes", True),
        ("Yes, the dog is brown.", True),
        ("**No**.", False),
        (" no\n", False),
        ("Not really", None),
        ("Yesterday", None),
        ("The answer is yes", None),
        ("", None),
    ],
)
def test_without_probabilities_the_first_word_decides(text, verdict):
    assert says_yes(Answer(text)) is verdict


def test_probabilities_decide_where_there_are_any():
    log = math.log
    # 0.2 + 0.15 for yes against 0.3 for no, in all their writings; the text would say no
    options = {"No": log(0.3), "Yes": log(0.2), "▁yes": log(0.15), "Yesterday": log(0.3)}
    assert says_yes(Answer("No", options)) is True
    # yes is not among the likeliest words, no is
    assert says_yes(Answer("The answer is yes", {"The": log(0.9), " no": log(0.01)})) is False
    # neither is: the first word
    assert says_yes(Answer("yes", {"Sure": log(0.9)})) is True
    assert says_yes(Answer("Sure", {"Sure": log(0.9)})) is None
    # nobody can say
    assert says_yes(Answer("yes", {"yes": log(0.5), "no": log(0.5)})) is None


def test_the_shipped_prompts_ask_as_published_and_fill_all_places_at_once(tmp_path):
    assert STATEMENT.fill(fact="The dog is brown") == statement_question("The dog is brown.")
    asked = FACTS.fill(response="A {segment} of {response}.", segment="of {response}.")
    assert asked.endswith("The whole description:\nA {segment} of {response}.\n\nThe segment:\nof {response}.")
    (tmp_path / "own.txt").write_text("Is it so? {facts}")
    with pytest.raises(ValueError, match=r"own.txt does not hold \{fact\}"):
        Template.read(str(tmp_path / "own.txt"), "statement", ("fact",))
    assert Template("a {fact}").hash != Template("b {fact}").hash


# -- labels ------------------------------------------------------------------------------------------------------------


def labels(*found: tuple[Fact, bool | None]) -> dict[str, int] | None:
    return Finding(0, 9, tuple(fact for fact, _ in found), tuple(holds for _, holds in found)).labels


def test_labels_of_a_segment():
    assert labels() == {"object": -1, "attribute": -1, "relation": -1}
    assert labels((DOG, True), (BROWN, False)) == {"object": 0, "attribute": 1, "relation": -1}
    assert labels((DOG, True), (DOG, False), (LEFT, True)) == {"object": 1, "attribute": -1, "relation": 0}


def test_what_is_undecided_labels_nothing():
    # one false fact is enough, whatever the undecided one is
    assert labels((DOG, False), (DOG, None)) == {"object": 1, "attribute": -1, "relation": -1}
    # all the others are true: the label hangs on the undecided one
    assert labels((DOG, True), (DOG, None)) is None
    assert labels((DOG, True), (BROWN, None)) is None
    assert Finding(0, 9, None).labels is None
    assert Finding(0, 9, (DOG,), (None,)).entry() is None


def test_the_score_counts_false_facts_and_is_silent_where_one_is_unknown():
    first, second = Finding(0, 5, (DOG, BROWN), (False, True)), Finding(5, 9, (LEFT,), (False,))
    assert rejected([first, second]) == 2
    assert stated([first, second]) == 3
    assert score_of([first, second], "rejected") == -2
    assert score_of([first, second], "share") == pytest.approx(-2 / 3)
    assert score_of([Finding(0, 9, ())], "share") == 0
    for unknown in (Finding(9, 12, None), Finding(9, 12, (DOG,), (None,))):
        assert rejected([first, unknown]) is None
        assert score_of([first, unknown], "rejected") is None
    # an empty answer has no false fact, and is not the best one for that
    assert score_of([], "rejected") is None


def test_answers_find_their_segments_and_losses_are_counted():
    listed = {
        "segment:\nA dog.": '["There is a dog"]',
        "segment:\nIt is brown.": json.dumps(
            {"object": ["There is a dog"], "attribute": ["It is brown."], "relation": []}
        ),
        "segment:\nA chair.": Answer("", failure="timeout"),
        "segment:\nHello.": "[]",
    }
    lister = Script(listed)
    verifier = Script({"There is a dog": "yes", "It is brown. Is": "Well, it depends"})
    tally = Tally()
    picture = render(SCENE)
    found = FineGrained(lister, verifier, FACTS, STATEMENT)(
        [Response("A dog. It is brown.", (picture,)), Response(""), Response("A chair. Hello.", (picture,))], tally
    )
    assert [[finding.labels for finding in findings] for findings in found] == [
        [None, None],
        [],
        [None, {"object": -1, "attribute": -1, "relation": -1}],
    ]
    # the prompt's full stop is not doubled
    assert [question.text.split(". Is")[0] for question in verifier.questions] == [
        "Statement: There is a dog",
        "Statement: It is brown",
    ]
    assert all(question.images == (picture,) for question in verifier.questions)
    assert not any(question.images for question in lister.questions)
    assert (tally.facts.asked, dict(tally.facts.lost)) == (4, {"malformed": 1, "timeout": 1})
    assert (tally.statements.asked, dict(tally.statements.lost)) == (2, {"undecided": 1})
    assert tally.facts.bad_share == 0.5
    assert (tally.segments, tally.unlabelled) == (4, 3)
    assert str(tally.facts) == "4 asked, 1 malformed, 1 timeout (e.g. '[\"There is a dog\"]')"


# -- the world ---------------------------------------------------------------------------------------------------------


def test_the_oracle_labels_a_description_by_hand():
    text = "There is a large red circle. The circle is above the blue square. There is a green cross. Nice!"
    findings = oracle()([Response(text, (render(SCENE),))], Tally())[0]
    assert [finding.labels for finding in findings] == [
        {"object": 0, "attribute": 1, "relation": -1},  # the circle is small
        {"object": -1, "attribute": -1, "relation": 0},
        {"object": 1, "attribute": 1, "relation": -1},  # there is no cross, so it is not green either
        {"object": -1, "attribute": -1, "relation": -1},  # no sentence of the world: no fact
    ]
    assert rejected(findings) == 3
    entry = findings[2].entry()
    assert entry is not None
    assert text[entry["start"] : entry["end"]] == " There is a green cross."
    assert entry["facts"][1] == {"kind": "attribute", "text": "The cross is green", "holds": False}


def descriptions(count: int) -> tuple[list[Response], list[Scene]]:
    """Pictures with descriptions, every second one of another picture."""
    drawn = list(itertools.islice(described_scenes(3, "train"), count))
    texts = [text_of(drawn[(place + place % 2) % count][1]) for place in range(count)]
    return [Response(text, (render(scene),)) for text, (scene, _) in zip(texts, drawn, strict=True)], [
        scene for scene, _ in drawn
    ]


def test_the_oracle_through_the_prompts_is_the_worlds_own_truth():
    responses, scenes = descriptions(24)
    found = [[finding.entry() for finding in findings] for findings in oracle()(responses, Tally())]
    for entries, response, scene in zip(found, responses, scenes, strict=True):
        own = segment_labels(response.text, scene)
        assert [{kind: entry[kind] for kind in KINDS} for entry in entries if entry] == [
            {kind: segment[kind] for kind in KINDS} for segment in own
        ]
    assert any(entry["relation"] == 1 for entries in found for entry in entries if entry)


class Credulous:
    """The oracle, but of the false facts it believes each with a probability, and doubts some true ones."""

    name, identity = "credulous", {"credulous": 1}

    def __init__(self, believes: float, doubts: float):
        self._oracle, self._generator = TruthOracle(STATEMENT), random.Random(0)
        self._believes, self._doubts = believes, doubts

    def cautions(self) -> list[str]:
        return []

    def ask(self, questions: Sequence[Prompt]):
        for place, answer in self._oracle.ask(questions):
            odds = self._believes if answer.text == "no" else self._doubts
            turned = self._generator.random() < odds
            yield place, Answer({"yes": "no", "no": "yes"}[answer.text]) if turned else answer


def test_precision_and_recall_of_a_judge_against_the_oracle():
    responses, _ = descriptions(40)
    truth = [[finding.entry() for finding in findings] for findings in oracle()(responses, Tally())]
    assert {one.precision for one in agreement(truth, truth).values()} == {1.0}  # pyright: ignore

    def measured(believes: float, doubts: float):
        judge = FineGrained(FactsOracle(FACTS), Credulous(believes, doubts), FACTS, STATEMENT)
        found = [[finding.entry() for finding in findings] for findings in judge(responses, Tally())]
        return agreement(found, truth)  # pyright: ignore

    # who never doubts the truth raises no false alarm, and misses what he believes; who believes nothing misses nothing
    by_believer, by_doubter = measured(0.5, 0.0), measured(0.0, 0.5)
    for kind in KINDS:
        believing, doubting = by_believer[kind], by_doubter[kind]
        assert believing.precision == 1
        assert believing.recall is not None
        assert 0.2 < believing.recall < 0.9
        assert doubting.recall == 1
        assert doubting.precision is not None
        assert doubting.precision < 0.9


def test_agreement_by_hand():
    def segment(start: int, label: int) -> dict[str, int]:
        return {"start": start, "end": start + 5, "object": label, "attribute": -1, "relation": 0}

    truth = [[segment(0, 1), segment(5, 1), segment(10, 0)], [segment(0, -1), segment(5, 1)]]
    given = [[segment(0, 1), segment(5, 0), segment(10, 1)], [segment(0, 1)]]
    found = agreement(given, truth)["object"]
    # called hallucinated: three, of which one is; hallucinated and labelled: two, of which one is called so
    assert found.precision == pytest.approx(1 / 3)
    assert found.recall == pytest.approx(1 / 2)
    assert found.accuracy == pytest.approx(1 / 4)
    assert found.unlabelled == 1
    other = agreement(given, truth)["attribute"]
    assert (other.precision, other.recall, other.accuracy) == (None, None, 1.0)
    with pytest.raises(ValueError, match="response 0 has labels for characters"):
        agreement([[segment(3, 0)]], [[segment(0, 0)]])


# -- the journal -------------------------------------------------------------------------------------------------------


def test_a_journal_answers_what_it_knows_and_keeps_what_is_new(tmp_path):
    picture, other = render(SCENE), render(Scene(SCENE.objects[:1]))
    script = Script({"one": "yes", "two": Answer("no", {"no": -0.5}), "three": Answer("", failure="timeout")})
    questions = [Prompt("one", (picture,)), Prompt("two"), Prompt("three"), Prompt("one", (picture.copy(),))]
    judge = Journalled(script, Journal(tmp_path / "journal"), "0a1b")
    assert [answer.text for answer in answers(judge, questions)] == ["yes", "no", "", "yes"]
    # the same question twice was asked once
    assert len(script.questions) == 3
    (path,) = (tmp_path / "journal").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["question"] for line in lines} == {"one", "two"}
    assert all((line["judge"], line["prompt_hash"]) == ("script", "0a1b") for line in lines)
    assert all(line["date"][:2] == "20" and len(line["images"]) == (line["question"] == "one") for line in lines)

    # Another run: the failure is asked again, and so is the same question about another picture. A line that was cut
    # short neither breaks the reading nor swallows the next line.
    path.write_bytes(path.read_bytes() + b'{"key": "ab')
    again = Journalled(script, Journal(tmp_path / "journal"), "0a1b")
    found = answers(again, [*questions, Prompt("one", (other,))])
    assert [answer.text for answer in found] == ["yes", "no", "", "yes", "yes"]
    assert found[1].options == {"no": -0.5}
    assert [question.text for question in script.questions[3:]] == ["three", "one"]
    assert len(Journal(tmp_path / "journal")) == 3
    lines = path.read_text().splitlines()
    assert [line[:8] for line in lines] == ['{"key": '] * 4
    answers(Journalled(script, Journal(tmp_path / "journal"), ""), [Prompt("one, new")])
    assert path.read_text().splitlines()[:4] == lines
    assert len(path.read_text().splitlines()) == 5
    # Another writer reads all files and appends to its own.
    assert len(Journal(tmp_path / "journal", writer=1)) == 4


def test_a_journal_tells_judges_apart(tmp_path):
    judge = Journalled(Script({}, "yes"), Journal(tmp_path), "")
    other = Script({}, "no")
    other.identity = {"script": 2}
    assert answers(judge, [Prompt("one")])[0].text == "yes"
    assert answers(Journalled(other, Journal(tmp_path), ""), [Prompt("one")])[0].text == "no"
