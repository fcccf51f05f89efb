"""AMBER (arXiv 2311.07397): descriptions held against the objects annotated in a picture, and yes/no questions about
existence, attributes and relations.

The official script takes the nouns of a description with nltk's tagger and compares words by spaCy vectors. Neither is
a dependency here: a word counts if AMBER's vocabulary holds it, whatever its part of speech, and vectors are compared
only where benchmark.similarity names a model. So the numbers of descriptions come out somewhat different, the yes/no
numbers the same. Refused: a task answered in part, unless benchmark.partial says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.evaluate.benchmarks.files import (
    Answers,
    BenchmarkFiles,
    Question,
    Row,
    by_id,
    paths,
    pick,
    read,
    read_rows,
    require,
    text_of,
)
from mmalign.evaluate.benchmarks.scores import Number, Part, Score, share
from mmalign.evaluate.benchmarks.words import singular_in, tokens

Similar = Callable[[str, str], bool]
GENERATIVE = "generative"
ATTRIBUTES = {"state": "attribute-state", "number": "attribute-number", "action": "attribute-action"}
CLOSER = 0.8
# The tagger's lemma of it is leaf, which the vocabulary does not hold.
_LOST = {"leaves"}
DESCRIPTIONS = (
    "Descriptions: words of AMBER's vocabulary (by match; the official script takes nouns alone, by nltk's tagger)"
    "{how}. A word is fine if it or a word associated with it is annotated as shown, or if it is in safe_words.txt. "
    "CHAIR: words that are not fine / words. Cover: annotated objects named / annotated objects. Hal: descriptions "
    "with a word that is not fine. Cog: named / all of the objects annotated as likely to be hallucinated."
)
YES_OR_NO = (
    "Questions: an answer must be exactly Yes or No; anything else is wrong. Precision and recall are of No. F1 is as "
    "in the official script, from rounded precision and recall, with 0.0001 (existence: 0.001) added to their sum."
)
AMBER_SCORE = "AMBER score: (100 - CHAIR + F1) / 2."


@dataclass(frozen=True)
class Amber:
    """AMBER's annotations by id, its word associations and its safe words."""

    items: Mapping[str, Row]
    associations: Mapping[str, Sequence[str]]
    safe: frozenset[str]
    similar: Similar | None

    def vocabulary(self) -> dict[str, str]:
        """Lower-case form -> word."""
        words = [*self.associations, *(word for others in self.associations.values() for word in others)]
        return {word.lower(): word for word in words}


def load(files: BenchmarkFiles) -> Amber:
    path = paths(files.annotations, "annotations", "annotations.json")[0]
    items = by_id(read_rows(path, "annotations"), ["id"], f"benchmark.annotations: {path}")
    if items is None:
        raise ValueError(f"benchmark.annotations: {path} has rows without id; expected AMBER's annotations.json")
    require(items.values(), ["type", "truth"], f"benchmark.annotations: {path}")
    for name in ("relation.json", "safe_words.txt"):
        if not path.with_name(name).is_file():
            raise FileNotFoundError(f"benchmark.annotations: AMBER's {name} must lie beside {path}")
    associations = read(path.with_name("relation.json"), "annotations")
    safe = path.with_name("safe_words.txt").read_text(encoding="utf-8").split()
    similar = _vectors(files.similarity) if files.similarity else None
    return Amber(items, associations, frozenset(safe), similar)


def _vectors(name: str) -> Similar:
    """The official comparison: vectors of two words closer than 0.8."""
    from functools import cache

    try:
        import spacy  # pyright: ignore[reportMissingImports]

        language = spacy.load(name)
    except (ImportError, OSError) as error:
        raise ValueError(f"benchmark.similarity: cannot load the spaCy model {name!r}: {error}") from None
    read_word = cache(language)
    return cache(lambda one, other: read_word(one).similarity(read_word(other)) > CLOSER)


def questions(files: BenchmarkFiles, amber: Amber) -> list[Question]:
    found = []
    for path in paths(files.questions, "questions", "query_*.json"):
        rows = read_rows(path, "questions")
        require(rows, ["id", "image", "query"], f"benchmark.questions: {path}")
        found += [Question({"id": row["id"]}, row["query"], row["image"]) for row in rows]
    return found


def score(files: BenchmarkFiles, amber: Amber, answers: Answers) -> Score:
    given = by_id(answers.rows, ["id", "question_id"], answers.where)
    if given is None:
        raise ValueError(f"{answers.where}: an answer has no id, which is how it finds its annotation")
    tasks = {name: _task(amber.items[name]) for name in given if name in amber.items}
    wanted = [name for name, item in amber.items.items() if _task(item) in set(tasks.values())]
    names, notes = pick(wanted, given, files.partial, answers.where)
    texts = {name: text_of(given[name], f"{answers.where}: id {name}", files.answer_field) for name in names}
    descriptions = {name: text for name, text in texts.items() if tasks[name] == GENERATIVE}
    verdicts = {name: text for name, text in texts.items() if tasks[name] != GENERATIVE}
    parts, rules = [], []
    if descriptions:
        parts.append(_described(amber, descriptions))
        how = "" if amber.similar is None else f", and words closer than {CLOSER} by the vectors of {files.similarity}"
        rules.append(DESCRIPTIONS.format(how=how))
    if verdicts:
        parts += _judged(amber, verdicts)
        rules.append(YES_OR_NO)
        notes += _unreadable(verdicts)
    if {"existence", "attribute", "relation", GENERATIVE} <= set(tasks.values()):
        parts.append(_overall(parts))
        rules.append(AMBER_SCORE)
    return Score(parts, " ".join(rules), notes)


def _task(item: Row) -> str:
    kind = str(item["type"]).removeprefix("discriminative-")
    if kind == GENERATIVE:
        return GENERATIVE
    return {"hallucination": "existence"}.get(kind, "attribute" if kind.startswith("attribute") else "relation")


# -- descriptions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """What one description comes to, in counts."""

    words: int
    wrong: int
    named: int
    shown: int
    foreseen: int
    likely: int


def describe(amber: Amber, item: Row, nouns: Iterable[str]) -> Described:
    """`nouns`: the words of the description that the vocabulary holds."""
    shown, likely = _owners(item["truth"], amber), _owners(item["hallu"], amber)
    named: set[int] = set()
    foreseen: set[int] = set()
    wrong = count = 0
    for noun in nouns:
        count += 1
        if noun in amber.safe:
            continue
        owner = next((place for word, place in shown if word == noun), None)
        if owner is not None:
            named.add(owner)
            continue
        foreseen |= set(_first(noun, likely, None)) | set(_first(noun, likely, amber.similar))
        near = _first(noun, shown, amber.similar) if amber.similar else []
        named |= set(near)
        wrong += not near
    return Described(count, wrong, len(named), len(item["truth"]), len(foreseen), len(item["hallu"]))


def _owners(objects: Sequence[str], amber: Amber) -> list[tuple[str, int]]:
    """Each word that stands for an object, with the object's place. As in the official script, associated words come
    first, and a word counts for the first object that it stands for."""
    related = [(word, place) for place, name in enumerate(objects) for word in amber.associations.get(name, ())]
    return related + [(name, place) for place, name in enumerate(objects)]


def _first(noun: str, owners: Sequence[tuple[str, int]], similar: Similar | None) -> list[int]:
    fits = similar or str.__eq__
    return [place for word, place in owners if fits(noun, word)][:1]


def _described(amber: Amber, texts: Mapping[str, str]) -> Part:
    vocabulary = amber.vocabulary()
    singular = singular_in(vocabulary)
    rows = []
    for name, text in texts.items():
        words = [singular(token) for token in tokens(text) if token not in _LOST]
        nouns = [vocabulary[word] for word in words if word in vocabulary]
        rows.append((name, describe(amber, amber.items[name], nouns)))
    numbers = {
        "CHAIR": share((one.wrong, one.words, name) for name, one in rows),
        "Cover": share((one.named, one.shown, name) for name, one in rows),
        "Hal": share((bool(one.wrong), 1, name) for name, one in rows),
        "Cog": share((one.foreseen, one.likely, name) for name, one in rows),
    }
    counts = {"words": sum(one.words for _, one in rows), "hallucinated": sum(one.wrong for _, one in rows)}
    return Part(GENERATIVE, len(rows), numbers, counts)


# -- yes or no ---------------------------------------------------------------------------------------------------------


def _judged(amber: Amber, texts: Mapping[str, str]) -> list[Part]:
    kinds = {name: str(amber.items[name]["type"]) for name in texts}
    task = {name: _task(amber.items[name]) for name in texts}
    groups: dict[str, list[str]] = {}
    if {"existence", "attribute", "relation"} <= set(task.values()):
        groups["discriminative"] = list(texts)
    for name in ("existence", "attribute", "relation"):
        groups[name] = [one for one in texts if task[one] == name]
        if name == "attribute":
            groups |= {short: [one for one in texts if kinds[one].endswith(kind)] for short, kind in ATTRIBUTES.items()}
    return [
        _yes_or_no(group, [(amber.items[one]["truth"], texts[one], one) for one in names])
        for group, names in groups.items()
        if names
    ]


def _yes_or_no(group: str, rows: Sequence[tuple[str, str, Any]]) -> Part:
    right = [(truth == "yes" and text == "Yes") or (truth == "no" and text == "No") for truth, text, _ in rows]
    both = list(zip(rows, right, strict=True))
    precision = share((good, text == "No", name) for (_, text, name), good in both if text == "No")
    recall = share((good, truth == "no", name) for (truth, _, name), good in both if truth == "no")
    exact = share(
        (2 * (good and text == "No"), (text == "No") + (truth == "no"), name) for (truth, text, name), good in both
    )
    numbers = {
        "accuracy": share((good, 1, name) for (_, _, name), good in both),
        "precision": precision,
        "recall": recall,
        "F1": Number(
            official_f1(precision.value, recall.value, 0.001 if group == "existence" else 0.0001), exact.interval
        ),
    }
    counts = {"right": sum(right), "said No": sum(text == "No" for _, text, _ in rows)}
    return Part(group, len(rows), numbers, counts)


def official_f1(precision: float | None, recall: float | None, added: float) -> float:
    """In percent; never to have said No counts as a precision of 0."""
    first, second = round(precision or 0.0, 1) / 100, round(recall or 0.0, 1) / 100
    return 100 * 2 * first * second / (first + second + added)


def _unreadable(texts: Mapping[str, str]) -> list[str]:
    strange = [text for text in texts.values() if text not in ("Yes", "No")]
    if not strange:
        return []
    shown = json.dumps(strange[0][:60], ensure_ascii=False)
    return [
        f"{len(strange):,} of {len(texts):,} answers are neither exactly Yes nor No, e.g. {shown}; they count as wrong"
    ]


def _overall(parts: Sequence[Part]) -> Part:
    numbers = {part.name: part.numbers for part in parts}
    chair, f1 = numbers[GENERATIVE]["CHAIR"].value, numbers["discriminative"]["F1"].value
    found = None if chair is None or f1 is None else (100 - chair + f1) / 2
    return Part(
        "all",
        sum(part.items for part in parts if part.name in (GENERATIVE, "discriminative")),
        {"AMBER score": Number(found)},
    )
