"""CHAIR (arXiv 1809.02156): which objects of COCO's 80 classes does a caption name that its picture does not show?

The published numbers hang on small things: which words are found, and what counts as shown. The rule here is the one of
the authors' script; it is printed with each score. Variants that tag parts of speech (OPERA, lmms-eval) find more
words, and their numbers cannot be compared with these. Refused: pictures of which nothing is known, lists of other
classes, the same picture captioned twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmalign.evaluate.benchmarks.coco import ground_truth
from mmalign.evaluate.benchmarks.files import (
    Answers,
    BenchmarkFiles,
    Question,
    Row,
    id_of,
    image_number,
    paths,
    read_rows,
    text_of,
)
from mmalign.evaluate.benchmarks.scores import Number, Part, Score, share, some
from mmalign.evaluate.benchmarks.words import ObjectWords, read_synonyms

RULE = (
    "The CHAIR authors' rule: captions are lower-cased and split into words; plurals become singulars (as in the "
    "official script, where `bus`, `ties` and `canoes` are lost); 27 pairs of words count as one, and so do baby or "
    "adult + animal and passenger + jet or train; `seat` does not count beside `toilet`; words of benchmark.synonyms "
    "stand for 80 classes. A picture shows the classes that COCO annotates in it and those that its five reference "
    "captions name. CHAIR_s: captions with a class that is not shown / captions. CHAIR_i: mentions of classes not "
    "shown / all mentions, repeats counted. Recall: classes shown and named / classes shown, over all pictures. Len: "
    "words and marks of a caption, pairs as one; Words: what spaces separate. "
    "Variants that tag parts of speech (OPERA, lmms-eval) give higher numbers."
)

LONGEST_NAME = 256


@dataclass(frozen=True)
class Caption:
    """A caption and its picture's number."""

    picture: int
    text: str


def load(files: BenchmarkFiles) -> ObjectWords:
    paths(files.annotations, "annotations")
    return ObjectWords.official(read_synonyms(files))


def questions(files: BenchmarkFiles, words: ObjectWords) -> list[Question]:
    """A line of benchmark.questions each."""
    return caption_questions(files)


def caption_questions(files: BenchmarkFiles) -> list[Question]:
    """For each row of benchmark.questions its picture, asked with its own question or with benchmark.question."""
    rows = [row for path in paths(files.questions, "questions", "*.jsonl") for row in read_rows(path, "questions")]
    found = []
    for place, row in enumerate(rows):
        where = f"benchmark.questions, row {place + 1}"
        number = image_number(row, where)
        named = [str(row[name]) for name in ("image", "file_name") if row.get(name)]
        # Object HalBench's own file holds the pictures themselves there.
        image = next((name for name in named if len(name) < LONGEST_NAME), f"COCO_val2014_{number:012d}.jpg")
        asked = row.get("question", row.get("query", files.question))
        found.append(Question({"question_id": place, "image_id": number}, str(asked), image))
    return found


def captions_of(files: BenchmarkFiles, answers: Answers) -> list[Caption]:
    """The captions with their pictures. Where an answer does not name its picture, its question does."""
    rows = answers.rows
    if files.questions:
        rows = _with_pictures(files, answers)
    found = [
        Caption(image_number(row, place), text_of(row, place, files.answer_field))
        for row, place in ((row, f"{answers.where}: row {number}") for number, row in enumerate(rows, 1))
    ]
    twice = [number for number, count in Counter(caption.picture for caption in found).items() if count > 1]
    if twice:
        raise ValueError(f"{answers.where}: more than one caption of picture {some(twice)}")
    return found


def _with_pictures(files: BenchmarkFiles, answers: Answers) -> list[Row]:
    """Each answer with the image_id of its question; all questions must be answered unless benchmark.partial."""
    asked = {}
    for question in caption_questions(files):
        asked[str(question.identity["question_id"])] = question.identity["image_id"]
    rows = []
    for number, row in enumerate(answers.rows, 1):
        place = f"{answers.where}: row {number}"
        known = "image_id" in row or "image" in row
        name = id_of(row)
        if not known and name not in asked:
            raise ValueError(f"{place} names no picture, and its question_id {name} is not in benchmark.questions")
        rows.append(row if known else {**row, "image_id": asked[str(name)]})
    pictures = {image_number(row, answers.where) for row in rows}
    missing = sorted(set(asked.values()) - pictures)
    if missing and not files.partial:
        raise ValueError(
            f"{answers.where}: {len(missing):,} of {len(asked):,} pictures of benchmark.questions have no caption: "
            f"{some(missing)}; benchmark.partial=true scores the others alone"
        )
    return rows


def score(files: BenchmarkFiles, words: ObjectWords, answers: Answers) -> Score:
    captions = captions_of(files, answers)
    truth = ground_truth(files, words, {caption.picture for caption in captions})
    named = [[mention.object for mention in words.mentions(caption.text)] for caption in captions]
    wrong = [
        [name for name in names if name not in truth[caption.picture]]
        for caption, names in zip(captions, named, strict=True)
    ]
    lengths = [len(words.merged(caption.text)) for caption in captions]
    numbers = _numbers(captions, named, wrong, [truth[caption.picture] for caption in captions], lengths)
    counts = {
        "captions": len(captions),
        "with hallucination": sum(bool(names) for names in wrong),
        "mentions": sum(map(len, named)),
        "hallucinated": sum(map(len, wrong)),
    }
    return Score([Part("all", len(captions), numbers, counts)], RULE, _notes(named, wrong))


def _numbers(
    captions: Sequence[Caption],
    named: Sequence[Sequence[str]],
    wrong: Sequence[Sequence[str]],
    shown: Sequence[frozenset[str]],
    lengths: Sequence[int],
) -> dict[str, Number]:
    rows = list(zip(captions, named, wrong, shown, strict=True))
    return {
        "CHAIR_s": share((bool(bad), 1, caption.picture) for caption, _, bad, _ in rows),
        "CHAIR_i": share((len(bad), len(names), caption.picture) for caption, names, bad, _ in rows),
        "Recall": share((len(true & set(names)), len(true), caption.picture) for caption, names, _, true in rows),
        "Len": share(((length, 1, caption.picture) for caption, length in zip(captions, lengths, strict=True)), 1.0),
        "Words": share(((len(caption.text.split()), 1, caption.picture) for caption in captions), 1.0),
    }


def _notes(named: Sequence[Sequence[str]], wrong: Sequence[Sequence[str]]) -> list[str]:
    silent = sum(not names for names in named)
    most = Counter(name for names in wrong for name in names).most_common(5)
    notes = [f"{silent:,} of {len(named):,} captions name no object of the 80 classes"] if silent else []
    if most:
        notes.append("most often hallucinated: " + ", ".join(f"{name} ({count:,})" for name, count in most))
    return notes
