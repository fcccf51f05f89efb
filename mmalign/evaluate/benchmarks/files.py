"""The files of a benchmark: what a config may name, and reading them with messages that say what is wrong where.

A file is JSON, or JSON Lines, or JSON values one after another; which one is seen from its content, as the published
files do not agree with their endings. Nothing is repaired: a line that is no JSON is an error with its number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmalign.evaluate.benchmarks.scores import some
from mmalign.feedback.endpoint import EndpointSettings

Row = Mapping[str, Any]
# An answer's text stands in the first of these that it has.
TEXT_FIELDS = (
    "answer",
    "response",
    "caption",
    "text",
    "model_answer",
    "model_prediction",
    "prediction",
    "output",
)
REPLY_FIELDS = ("reply", "review", "gpt4_review", "content")


@dataclass(frozen=True, kw_only=True)
class JudgeReplies:
    """The keys of `benchmark.judge:`: what a judge said of the answers, or a judge that is to be asked."""

    # who judged, and when: printed with the score; with an endpoint they are known
    name: str | None = None
    date: str | None = None
    # JSON or JSON Lines: a reply per answer in the same order, as text, as {"reply": ...}, or as a chat completion; for
    # several models {name of a model: file}; null: the answers' file holds the replies
    replies: str | dict[str, str] | None = None
    # asks a judge behind an OpenAI-compatible endpoint; its replies are kept under the output
    endpoint: EndpointSettings | None = None
    # file of the question to that judge; null: the one that ships, which is not the one of published scores
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.endpoint is None and not (self.name and self.date):
            raise ValueError(
                "benchmark.judge: scores of different judges cannot be compared; set benchmark.judge.name and .date, "
                "e.g. gpt-4-1106-preview and 2024-05-01"
            )
        if self.endpoint is not None and self.replies is not None:
            raise ValueError("benchmark.judge: set replies or endpoint, not both")

    @property
    def said(self) -> str:
        return f"{self.name}, {self.date}"


@dataclass(frozen=True, kw_only=True)
class BenchmarkFiles:
    """The keys of `benchmark:`."""

    # pope | chair | amber | mmhal | object_halbench | hallusionbench
    name: Literal["pope", "chair", "amber", "mmhal", "object_halbench", "hallusionbench"]
    # answers to score: a file, [files of one model], or {name of a model: file or files}; null: `models` answer
    answers: str | list[str] | dict[str, str | list[str]] | None = None
    # field of an answer that holds its text; null: the first that it has of answer, response, caption, text,
    # model_answer, model_prediction, prediction, output
    answer_field: str | None = None
    # the official files, or a folder of them: coco_pope_*.json; COCO's instances_*.json and captions_*.json, or
    # {image id: [objects]}; AMBER's data folder; mmhal-bench_answer_template.json; HallusionBench.json
    annotations: str | list[str] = field(default_factory=list)
    # what was or will be asked, where it is not in the annotations: LLaVA's llava_pope_test.jsonl, AMBER's
    # query_*.json, {"image_id": 42, "image": "a.jpg", "question": "..."} a line for captions (without image:
    # COCO_val2014_000000000042.jpg)
    questions: str | list[str] = field(default_factory=list)
    # chair, object_halbench: the list of 80 classes and their words, data/synonyms.txt of
    # github.com/LisaAnne/Hallucination (BSD-2) or eval/data/synonyms_refine.txt of github.com/RLHF-V/RLAIF-V
    synonyms: str | None = None
    # folder of the pictures, for models that answer
    images: str | None = None
    # added to each question, e.g. "\nAnswer the question using a single word or phrase."
    suffix: str = ""
    # the question about a picture where a benchmark has none: captions
    question: str = "Please describe this image in detail."
    # mmhal, hallusionbench, object_halbench: a judge's replies
    judge: JudgeReplies | None = None
    # amber: also take words for the same whose vectors in this spaCy model are closer than 0.8: en_core_web_lg
    similarity: str | None = None
    # score the answers that are there; otherwise one that is missing is an error
    partial: bool = False


@dataclass(frozen=True)
class Question:
    """What a model is asked. `identity` goes into its answer's row, so that the answer finds its annotation."""

    identity: Mapping[str, Any]
    text: str
    # name of the picture's file; None: a question without picture
    image: str | None


@dataclass(frozen=True)
class Answers:
    """The answers of one model, file by file."""

    name: str
    files: Sequence[tuple[Path, Sequence[Row]]]

    @property
    def rows(self) -> list[Row]:
        return [row for _, rows in self.files for row in rows]

    @property
    def where(self) -> str:
        return ", ".join(str(path) for path, _ in self.files)


def paths(given: str | Sequence[str], key: str, pattern: str = "*.json") -> list[Path]:
    """The files that a key names; of a folder, those that `pattern` fits."""
    found: list[Path] = []
    for name in [given] if isinstance(given, str) else given:
        path = Path(name)
        inside = sorted(path.glob(pattern)) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(f"benchmark.{key}: {path} holds no file {pattern}")
        if not inside[0].is_file():
            raise FileNotFoundError(f"benchmark.{key}: no file {path}")
        found += inside
    if not found:
        raise ValueError(f"benchmark.{key} is empty; expected {pattern}, as a file, a list of files or a folder")
    return found


def read(path: Path, key: str) -> Any:
    """The JSON value in a file; of several, their list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"benchmark.{key}: {path} is not text in UTF-8") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return _values(text, path, key)


def _values(text: str, path: Path, key: str) -> list[Any]:
    decoder, found, place = json.JSONDecoder(), [], 0
    while match := re.compile(r"\S").search(text, place):
        try:
            value, place = decoder.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            line = text.count("\n", 0, match.start()) + 1
            shown = text[match.start() : match.start() + 60].partition("\n")[0]
            raise ValueError(
                f"benchmark.{key}: {path}, line {line}: expected JSON, got {shown!r} ({error.msg})"
            ) from None
        found.append(value)
    if not found:
        raise ValueError(f"benchmark.{key}: {path} is empty")
    return found


def read_rows(path: Path, key: str) -> Sequence[Row]:
    """The objects of a file: a list of them, or one for each line."""
    value = read(path, key)
    # the official CHAIR scripts' form: {"imgToEval": {id: row}}
    if isinstance(value, dict) and isinstance(value.get("imgToEval"), dict):
        value = list(value["imgToEval"].values())
    rows = [value] if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        kind = type(rows).__name__ if not isinstance(rows, list) else "list of other things"
        raise ValueError(f"benchmark.{key}: {path} holds a {kind}; expected objects, in a list or one a line")
    if not rows:
        raise ValueError(f"benchmark.{key}: {path} holds no row")
    return rows


def require(rows: Iterable[Row], fields: Sequence[str], where: str) -> None:
    """Raises ValueError naming the first row that lacks one of `fields`."""
    for number, row in enumerate(rows, 1):
        missing = [name for name in fields if name not in row]
        if missing:
            raise ValueError(f"{where}: row {number} has no {missing[0]!r}; it has {', '.join(map(repr, row))}")


def text_of(row: Row, place: str, name: str | None = None) -> str:
    """The text of an answer."""
    field_name = name or next((one for one in TEXT_FIELDS if one in row), None)
    if field_name is None or field_name not in row:
        expected = name or ", ".join(TEXT_FIELDS)
        raise ValueError(
            f"{place} has none of the fields {expected}; it has {', '.join(row)}; set benchmark.answer_field"
        )
    value = row[field_name]
    if not isinstance(value, str):
        raise ValueError(f"{place}: {field_name} is a {type(value).__name__}; expected the text of the answer")
    return value


def id_of(row: Row, names: Sequence[str] = ("question_id", "id")) -> str | None:
    """What a row is called, as text; None where it has no name."""
    return next((str(row[name]) for name in names if row.get(name) is not None), None)


def image_number(row: Row, place: str) -> int:
    """COCO's number of the picture, from image_id or from the file's name (COCO_val2014_000000310196.jpg)."""
    value = next((row[name] for name in ("image_id", "image", "file_name") if row.get(name) is not None), None)
    digits = re.findall(r"\d+", Path(str(value)).stem)
    if value is None or not digits:
        raise ValueError(f"{place} does not say of which picture it is; expected image_id or image, got {value!r}")
    return int(digits[-1])


def judged(files: BenchmarkFiles, answers: Answers) -> tuple[list[str], str]:
    """The judge's words, one for each answer, and the judge's name with the date."""
    judge = files.judge
    if judge is None:
        raise ValueError(
            f"benchmark.judge is not set; {files.name} scores what a judge said: set benchmark.judge.name, .date and, "
            "unless the answers' file holds the replies, .replies; or benchmark.judge.endpoint.model"
        )
    if judge.replies is None:
        rows: Sequence[Any] = answers.rows
        where = answers.where
    else:
        name = judge.replies if isinstance(judge.replies, str) else judge.replies.get(answers.name)
        if name is None:
            raise ValueError(f"benchmark.judge.replies has no file for {answers.name}")
        value = read(paths(name, "judge.replies")[0], "judge.replies")
        rows, where = value if isinstance(value, list) else [value], f"benchmark.judge.replies: {name}"
    return [_reply(row, f"{where}, row {place}") for place, row in enumerate(rows, 1)], judge.said


def _reply(row: Any, place: str) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("choices"), list) and row["choices"]:
            return str(row["choices"][0]["message"]["content"])
        found = next((row[name] for name in REPLY_FIELDS if isinstance(row.get(name), str)), None)
        if found is not None:
            return found
    raise ValueError(f"{place} is no reply; expected text, or an object with one of {', '.join(REPLY_FIELDS)}")


def pick(
    wanted: Sequence[str], given: Mapping[str, Row], partial: bool, where: str, hint: str = ""
) -> tuple[list[str], list[str]]:
    """The wanted names that were answered, and notes. Missing and surplus answers are errors that name them."""
    missing = [name for name in wanted if name not in given]
    known = set(wanted)
    surplus = [name for name in given if name not in known]
    if surplus:
        raise ValueError(f"{where}: {len(surplus):,} answers fit no question: {some(surplus)}{hint}")
    if missing and not partial:
        raise ValueError(
            f"{where}: {len(missing):,} of {len(wanted):,} questions have no answer: {some(missing)}{hint}; "
            "benchmark.partial=true scores the others alone"
        )
    notes = [f"{len(missing):,} of {len(wanted):,} questions have no answer and are left out"] if missing else []
    return [name for name in wanted if name in given], notes


def by_id(rows: Sequence[Row], names: Sequence[str], where: str) -> dict[str, Row] | None:
    """The rows by what they are called; None where they have no names. Two of one name are an error."""
    called = [id_of(row, names) for row in rows]
    if None in called:
        return None
    found: dict[str, Row] = {}
    for name, row in zip(called, rows, strict=True):
        if name in found:
            raise ValueError(f"{where}: {names[0]} {name} is answered twice")
        found[str(name)] = row
    return found
