"""Object HalBench (as in RLHF-V, arXiv 2312.00849): do descriptions of COCO pictures name objects that are not there?

The official script asks a judge (gpt-3.5-turbo-0613, since retired) for the objects of each answer; here its replies
come in a file. Without a judge the words of the answer are taken, which is said in the rule. Refused: pictures of which
nothing is known, another number of replies than of answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from mmalign.evaluate.benchmarks.chair import caption_questions
from mmalign.evaluate.benchmarks.coco import ground_truth
from mmalign.evaluate.benchmarks.files import Answers, BenchmarkFiles, Question, image_number, judged, paths, text_of
from mmalign.evaluate.benchmarks.scores import Part, Score, share
from mmalign.evaluate.benchmarks.words import Mention, ObjectWords, read_synonyms

# Answers of so few words are not asked about and name nothing.
SHORT = 3
_BETWEEN = re.compile(r"\b(?:of|with|in|on|at|and|or|from|for|to|by|a|an|the)\b")
RULE = (
    "Objects: {objects}; each different word of an answer counts once, and words of benchmark.synonyms stand for "
    "COCO's 80 classes. A picture shows the classes that COCO annotates in it and those that its reference captions "
    "name. Response hallucination: answers with a class that is not shown / answers that name a class. Object "
    "hallucination: classes named that are not shown / classes named. Recall: classes shown and named / classes shown. "
    f"An answer of at most {SHORT} words names nothing."
)
BY_WORDS = "by match of words, as no judge was asked (the official script has a judge list them)"
BY_JUDGE = (
    "listed by the judge {judge}; of a phrase its pairs of words count, else its last word (the official script tags "
    "parts of speech)"
)


def load(files: BenchmarkFiles) -> ObjectWords:
    paths(files.annotations, "annotations")
    return ObjectWords.cleaned(read_synonyms(files))


def questions(files: BenchmarkFiles, words: ObjectWords) -> list[Question]:
    return caption_questions(files)


def parse_list(reply: str) -> list[str] | None:
    """The JSON list of strings that a reply is, or that its last line is; None for anything else."""
    for text in (reply, reply.strip().rpartition("\n")[2]):
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            return found
    return None


def score(files: BenchmarkFiles, words: ObjectWords, answers: Answers) -> Score:
    texts = [text_of(row, answers.where, files.answer_field) for row in answers.rows]
    pictures = [image_number(row, f"{answers.where}: row {place}") for place, row in enumerate(answers.rows, 1)]
    truth = ground_truth(files, words, set(pictures))
    named, objects, notes = _named(files, words, answers, texts)
    rows = [
        (number, [mention for mention in found if mention.object not in truth[number]], found, text)
        for number, found, text in zip(pictures, named, texts, strict=True)
        if found is not None
    ]
    numbers = {
        "response hallucination": share((bool(bad), 1, number) for number, bad, found, _ in rows if found),
        "object hallucination": share((len(bad), len(found), number) for number, bad, found, _ in rows),
        "Recall": share(
            (len(truth[number] & {one.object for one in found}), len(truth[number]), number)
            for number, _, found, _ in rows
        ),
        "Words": share(((len(text.split()), 1, number) for number, _, _, text in rows), 1.0),
    }
    counts = {
        "with objects": sum(bool(found) for _, _, found, _ in rows),
        "with hallucination": sum(bool(bad) for _, bad, _, _ in rows),
        "objects": sum(len(found) for _, _, found, _ in rows),
        "hallucinated": sum(len(bad) for _, bad, _, _ in rows),
    }
    return Score([Part("all", len(rows), numbers, counts)], RULE.format(objects=objects), notes)


def judge_places(files: BenchmarkFiles, words: ObjectWords, answers: Answers) -> list[dict[str, str] | None]:
    """What fills the question to a judge, answer by answer; None for answers that are too short to be asked about."""
    texts = [text_of(row, answers.where, files.answer_field) for row in answers.rows]
    asked = [str(row.get("question", row.get("prompt", files.question))) for row in answers.rows]
    return [
        None if _is_short(text) else {"question": question, "answer": text}
        for question, text in zip(asked, texts, strict=True)
    ]


def _named(
    files: BenchmarkFiles, words: ObjectWords, answers: Answers, texts: Sequence[str]
) -> tuple[list[list[Mention] | None], str, list[str]]:
    """The mentions of each answer (None: the judge's reply is no list), how they were found, and notes."""
    if files.judge is None:
        return [[] if _is_short(text) else _unique(words.mentions(text)) for text in texts], BY_WORDS, []
    replies, judge = judged(files, answers)
    if len(replies) != len(texts):
        raise ValueError(f"{answers.where}: {len(replies)} replies of the judge for {len(texts)} answers")
    found: list[list[Mention] | None] = []
    for text, reply in zip(texts, replies, strict=True):
        listed = [] if _is_short(text) else parse_list(reply)
        found.append(None if listed is None else _unique(_of_phrases(words, listed)))
    broken = sum(one is None for one in found)
    notes = (
        [f"{broken} of {len(texts)} replies are no JSON list of names; these answers are left out"] if broken else []
    )
    return found, BY_JUDGE.format(judge=judge), notes


def _is_short(text: str) -> bool:
    return len(text.split()) <= SHORT


def _unique(mentions: Sequence[Mention]) -> list[Mention]:
    return list({mention.word: mention for mention in mentions}.values())


def _of_phrases(words: ObjectWords, phrases: Sequence[str]) -> list[Mention]:
    found = []
    for phrase in phrases:
        pairs = words.pairs(phrase)
        parts = [part.split() for part in _BETWEEN.split(phrase.lower()) if part.strip()]
        heads = pairs or [part[-1] for part in parts]
        found += [mention for head in heads for mention in words.mentions(head)]
    return found
