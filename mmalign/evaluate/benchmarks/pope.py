"""POPE (arXiv 2305.10355): is there a ... in the image? Yes or no; objects that are not there are drawn in three ways.

Labels are the official coco_pope_{random,popular,adversarial}.json, of either release: the random part has 2,910 rows
at commit e3e3926 and 3,000 on main. Refused: answers that do not fit the labels one to one, and files of questions
given for answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign.evaluate.benchmarks.files import (
    Answers,
    BenchmarkFiles,
    Question,
    Row,
    by_id,
    id_of,
    paths,
    pick,
    read_rows,
    require,
    text_of,
)
from mmalign.evaluate.benchmarks.scores import Part, Score, mean, share, some

CATEGORIES = ("random", "popular", "adversarial")
RULE = (
    "POPE's own rule: an answer is cut at its first full stop, commas are deleted, it is split at spaces; if No, no or "
    "not is among the words it says no, otherwise yes, whatever it says. Precision, recall and F1 are of yes. Yes "
    "ratio: answers that say yes / answers (half of the labels are yes). The mean is over categories."
)
_NO = {"No", "no", "not"}


@dataclass(frozen=True)
class Label:
    """A question with its truth."""

    category: str
    image: str
    text: str
    yes: bool
    id: str | None


def says_yes(answer: str) -> bool:
    """The official reading of an answer: yes unless it holds No, no or not."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not _NO & set(words)


def load(files: BenchmarkFiles) -> list[Label]:
    """The labels, category by category, in the order of their files."""
    found = []
    for path in paths(files.annotations, "annotations", "*pope*.json"):
        rows = read_rows(path, "annotations")
        require(rows, ["image"], f"benchmark.annotations: {path}")
        found += [_label(row, path, number) for number, row in enumerate(rows, 1)]
    known = {name: rank for rank, name in enumerate(CATEGORIES)}
    return sorted(found, key=lambda label: known.get(label.category, len(known)))


def _label(row: Row, path: Path, number: int) -> Label:
    place = f"benchmark.annotations: {path}, row {number}"
    truth = str(row.get("label", row.get("answer", ""))).strip().lower()
    if truth not in ("yes", "no"):
        raise ValueError(f"{place}: label is {truth!r}; expected yes or no, as in coco_pope_*.json")
    text = row.get("question", row.get("text"))
    if not isinstance(text, str):
        raise ValueError(f"{place} has no question; expected it in text or question")
    return Label(str(row.get("category", category_of(path))), str(row["image"]), text, truth == "yes", id_of(row))


def category_of(path: Path) -> str:
    """coco_pope_random.json is random; other names are their own category."""
    return next((name for name in CATEGORIES if name in path.stem), path.stem)


def questions(files: BenchmarkFiles, labels: Sequence[Label]) -> list[Question]:
    if files.questions:
        return [
            Question({"question_id": row["question_id"]}, row["text"], row["image"]) for row in _asked(files).values()
        ]
    return [
        Question({"question_id": label.id or place, "category": label.category}, label.text, label.image)
        for place, label in enumerate(labels)
    ]


def score(files: BenchmarkFiles, labels: Sequence[Label], answers: Answers) -> Score:
    """Accuracy, precision, recall, F1 and yes ratio, by category and as their mean."""
    joined, notes = _joined(files, labels, answers)
    pairs = [(label, _answer(label, row, f"{answers.where}: question {label.text!r}", files)) for label, row in joined]
    parts = [
        _part(
            name,
            [(label, says_yes(text)) for label, text in pairs if label.category == name],
        )
        for name in dict.fromkeys(label.category for label in labels)
        if any(label.category == name for label, _ in joined)
    ]
    if len(parts) > 1:
        means = {key: mean(part.numbers[key] for part in parts) for key in parts[0].numbers}
        parts.append(Part("mean", sum(part.items for part in parts), means))
    return Score(parts, RULE, notes)


def _answer(label: Label, row: Row, place: str, files: BenchmarkFiles) -> str:
    text = text_of(row, place, files.answer_field)
    if _plain(text) == _plain(label.text):
        raise ValueError(f"{place} is answered by itself; is this a file of questions?")
    return text


def _part(name: str, pairs: Sequence[tuple[Label, bool]]) -> Part:
    cells = [(label.image, label.yes and said, not label.yes and said, label.yes and not said) for label, said in pairs]
    counts = {
        "TP": sum(tp for _, tp, _, _ in cells),
        "FP": sum(fp for _, _, fp, _ in cells),
        "TN": sum(not label.yes and not said for label, said in pairs),
        "FN": sum(fn for _, _, _, fn in cells),
    }
    numbers = {
        "F1": share((2 * tp, 2 * tp + fp + fn, image) for image, tp, fp, fn in cells),
        "accuracy": share((not (fp or fn), 1, image) for image, _, fp, fn in cells),
        "precision": share((tp, tp + fp, image) for image, tp, fp, _ in cells),
        "recall": share((tp, tp + fn, image) for image, tp, _, fn in cells),
        "yes ratio": share((tp + fp, 1, image) for image, tp, fp, _ in cells),
    }
    return Part(name, len(pairs), numbers, counts)


# -- which answer belongs to which label -------------------------------------------------------------------------------

Pairs = list[tuple[Label, Row]]


def _joined(files: BenchmarkFiles, labels: Sequence[Label], answers: Answers) -> tuple[Pairs, list[str]]:
    if files.questions:
        return _through_questions(files, labels, answers)
    groups = _groups(labels, answers)
    joined = [_pair(own, rows, where, files.partial) for own, rows, where in groups]
    return [pair for pairs, _ in joined for pair in pairs], [note for _, notes in joined for note in notes]


def _asked(files: BenchmarkFiles) -> dict[str, Row]:
    """The rows of the merged question file, by question_id."""
    rows = [row for path in paths(files.questions, "questions", "*.jsonl") for row in read_rows(path, "questions")]
    where = f"benchmark.questions: {files.questions}"
    require(rows, ["question_id", "text", "category", "image"], where)
    found = by_id(rows, ["question_id"], where)
    assert found is not None
    return found


def _through_questions(files: BenchmarkFiles, labels: Sequence[Label], answers: Answers) -> tuple[Pairs, list[str]]:
    """LLaVA's way: question_id gives the category; within it the questions pair with the labels by order."""
    asked = _asked(files)
    given = by_id(answers.rows, ["question_id"], answers.where)
    if given is None:
        raise ValueError(f"{answers.where}: an answer has no question_id, which is how it finds its question")
    label_of: dict[str, Label] = {}
    for category in dict.fromkeys(label.category for label in labels):
        own = [label for label in labels if label.category == category]
        names = [name for name, row in asked.items() if row["category"] == category]
        if len(own) != len(names):
            raise ValueError(
                f"category {category}: {len(names):,} questions in benchmark.questions, {len(own):,} labels in "
                "benchmark.annotations; they are of different releases of POPE (its random part has 2,910 rows at "
                "commit e3e3926, which LLaVA's question file goes with, and 3,000 on main)"
            )
        for name, label in zip(names, own, strict=True):
            _check(label, asked[name], own, f"benchmark.questions: question_id {name}")
            label_of[name] = label
    left_out = {row["category"] for name, row in asked.items() if name not in label_of}
    scored = {name: row for name, row in given.items() if name not in asked or name in label_of}
    names, notes = pick(list(label_of), scored, files.partial, answers.where)
    if left_out:
        notes.append(f"benchmark.annotations has no labels for {', '.join(sorted(left_out))}, which is left out")
    return [(label_of[name], given[name]) for name in names], notes


def _groups(labels: Sequence[Label], answers: Answers) -> list[tuple[list[Label], list[Row], str]]:
    """Labels and answers that belong together: by the answers' category, or a file each, or all at once."""
    categories = list(dict.fromkeys(label.category for label in labels))
    own = {name: [label for label in labels if label.category == name] for name in categories}
    if all("category" in row for row in answers.rows):
        strange = {str(row["category"]) for row in answers.rows} - set(categories)
        if strange:
            raise ValueError(f"{answers.where}: answers are of category {some(strange)}, labels of {some(categories)}")
        return [
            (own[name], [row for row in answers.rows if row["category"] == name], f"{answers.where} ({name})")
            for name in categories
        ]
    if len(categories) > 1 and len(answers.files) == len(categories):
        named = {category_of(path): (path, rows) for path, rows in answers.files}
        files = [named.get(name) for name in categories]
        in_order = answers.files if None in files else [file for file in files if file]
        return [(own[name], list(rows), str(path)) for name, (path, rows) in zip(categories, in_order, strict=True)]
    return [(list(labels), answers.rows, answers.where)]


def _pair(labels: Sequence[Label], rows: Sequence[Row], where: str, partial: bool) -> tuple[Pairs, list[str]]:
    """By question_id where it names each question once, else by order."""
    ids = [label.id for label in labels]
    called = [id_of(row) for row in rows]
    if None not in ids + called and len(set(ids)) == len(ids):
        given = by_id(rows, ("question_id", "id"), where)
        assert given is not None
        names, notes = pick([str(name) for name in ids], given, partial, where, " (of question_id)")
        own = dict(zip(ids, labels, strict=True))
        pairs = [(own[name], given[name]) for name in names]
    elif len(labels) == len(rows):
        pairs, notes = list(zip(labels, rows, strict=True)), []
    else:
        raise ValueError(
            f"{where}: {len(rows):,} answers without question_id for {len(labels):,} labels; they pair by order, so "
            "there must be as many"
        )
    for number, (label, row) in enumerate(pairs, 1):
        _check(label, row, labels, f"{where}: row {number}")
    return pairs, notes


def _check(label: Label, row: Row, labels: Sequence[Label], place: str) -> None:
    """Raises where a row says that it is about another picture or question than its label."""
    orders = (
        "the files are in different orders; where the answers are to LLaVA's merged questions, name that file in "
        "benchmark.questions"
    )
    image = row.get("image")
    if isinstance(image, str) and _picture(image) != _picture(label.image):
        raise ValueError(f"{place} is about {image}, its label about {label.image}; {orders}")
    asked = row.get("question", row.get("prompt", row.get("text")))
    if not isinstance(asked, str):
        return
    asked, wanted = _plain(asked), _plain(label.text)
    if asked != wanted and asked in {_plain(other.text) for other in labels}:
        raise ValueError(f"{place} is about {asked!r}, its label about {wanted!r}; {orders}")


def _picture(name: str) -> str:
    """The number at the end of a file's name (COCO_val2014_000000310196.jpg), or else the name."""
    stem = Path(name).stem
    number = re.search(r"\d+$", stem)
    return str(int(number[0])) if number else stem


def _plain(question: str) -> str:
    """The first line; one release writes imange."""
    return question.partition("\n")[0].strip().replace("imange", "image")
