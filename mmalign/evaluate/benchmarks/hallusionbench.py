"""HallusionBench (arXiv 2310.14566): yes/no questions on figures and edited figures, some without the figure.

Verdicts come from a judge (correct, incorrect, unclear), as in the official script, or from looking for yes and no.
Refused: questions answered in part, unless benchmark.partial says so, verdicts that are none, a question answered
twice.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from mmalign.evaluate.benchmarks.files import (
    Answers,
    BenchmarkFiles,
    Question,
    Row,
    by_id,
    judged,
    paths,
    pick,
    read_rows,
    require,
    text_of,
)
from mmalign.evaluate.benchmarks.scores import Number, Part, Score, share

IDENTITY = ("category", "subcategory", "set_id", "figure_id", "question_id")
WRONG, RIGHT, UNCLEAR = 0, 1, 2
RULE = (
    "Verdicts: {verdicts}. Unclear counts as right only where a figure would merely help and none is shown (category "
    "VS, figure_id 0). aAcc: questions answered right. qAcc: groups of (category, subcategory, set_id, question_id) "
    "with all right. fAcc: figures with all right, VS figure 0 left out. Easy and hard: qAcc of the questions whose "
    "visual_input is not 2 (figure as it was, or none), and is 2 (edited figure)."
)
BY_JUDGE = "by the judge {judge}; a reply with `incorrect` is wrong, else with `correct` right, else unclear"
BY_FIELD = "0 wrong, 1 right, 2 unclear, from the field {field} of the answers; judge: {judge}"
BY_WORDS = (
    "by match: an answer with the word yes or no, and not both, says that; others are unclear (no judge was asked)"
)


def load(files: BenchmarkFiles) -> dict[str, Row]:
    """The questions by their identity."""
    path = paths(files.annotations, "annotations", "HallusionBench.json")[0]
    rows = read_rows(path, "annotations")
    where = f"benchmark.annotations: {path}"
    require(rows, [*IDENTITY, "visual_input", "question", "gt_answer"], where)
    return _by_identity(rows, where)


def _by_identity(rows: Sequence[Row], where: str) -> dict[str, Row]:
    require(rows, IDENTITY, where)
    named = [{**row, "identity": "/".join(str(row[name]) for name in IDENTITY)} for row in rows]
    found = by_id(named, ["identity"], where)
    assert found is not None
    return found


def questions(files: BenchmarkFiles, items: Mapping[str, Row]) -> list[Question]:
    return [
        Question(
            {name: row[name] for name in IDENTITY},
            row["question"],
            None if str(row["visual_input"]) == "0" else str(row["filename"]),
        )
        for row in items.values()
    ]


def score(files: BenchmarkFiles, items: Mapping[str, Row], answers: Answers) -> Score:
    given = _by_identity(answers.rows, answers.where)
    names, notes = pick(list(items), given, files.partial, answers.where)
    verdicts, how = _verdicts(files, items, given, answers)
    right = {name: _is_right(items[name], verdicts[name]) for name in names}
    unclear = sum(verdicts[name] == UNCLEAR for name in names)
    if unclear:
        notes.append(f"{unclear:,} of {len(names):,} answers are unclear")
    parts = [_part("all", items, right)]
    for category in dict.fromkeys(str(items[name]["category"]) for name in names):
        own = {name: good for name, good in right.items() if items[name]["category"] == category}
        parts.append(_part(category, items, own))
    return Score(parts, RULE.format(verdicts=how), notes)


def judge_places(files: BenchmarkFiles, items: Mapping[str, Row], answers: Answers) -> list[dict[str, str] | None]:
    """What fills the question to a judge, answer by answer."""
    given = _by_identity(answers.rows, answers.where)
    pick(list(items), given, files.partial, answers.where)
    return [
        {
            "question": items[name]["question"],
            "truth": items[name]["gt_answer_details"],
            "answer": text_of(row, f"{answers.where}: {name}", files.answer_field),
        }
        for name, row in given.items()
    ]


def says(answer: str) -> int | None:
    """1 for yes, 0 for no, None where it says neither or both."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    return None if ("yes" in words) == ("no" in words) else int("yes" in words)


def read_verdict(reply: str) -> int:
    """What a judge's words mean; `incorrect` holds `correct`, so it is looked for first."""
    text = reply.lower()
    return WRONG if "incorrect" in text else RIGHT if "correct" in text else UNCLEAR


def _verdicts(
    files: BenchmarkFiles, items: Mapping[str, Row], given: Mapping[str, Row], answers: Answers
) -> tuple[dict[str, int], str]:
    """By identity, and how they were found."""
    field = next((name for name in answers.rows[0] if name == "verdict" or name.endswith("gpt_check")), None)
    if files.judge is not None and files.judge.replies is not None:
        replies, judge = judged(files, answers)
        if len(replies) != len(given):
            raise ValueError(f"{answers.where}: {len(replies)} replies of the judge for {len(given)} answers")
        return dict(zip(given, map(read_verdict, replies), strict=True)), BY_JUDGE.format(judge=judge)
    if field is not None:
        require(answers.rows, [field], answers.where)
        strange = {str(row[field]) for row in given.values()} - {"0", "1", "2"}
        if strange:
            raise ValueError(f"{answers.where}: {field} is {sorted(strange)[0]!r}; expected 0, 1 or 2")
        judge = "not said (benchmark.judge)" if files.judge is None else files.judge.said
        return {name: int(row[field]) for name, row in given.items()}, BY_FIELD.format(field=field, judge=judge)
    found = {}
    for name, row in given.items():
        if name in items:
            said = says(text_of(row, f"{answers.where}: {name}", files.answer_field))
            found[name] = UNCLEAR if said is None else int(str(said) == str(items[name]["gt_answer"]))
    return found, BY_WORDS


def _is_right(item: Row, verdict: int) -> bool:
    without_figure = item["category"] == "VS" and str(item["figure_id"]) == "0"
    return verdict == RIGHT or (verdict == UNCLEAR and without_figure)


def _part(part: str, items: Mapping[str, Row], right: Mapping[str, bool]) -> Part:
    rows = [(items[name], good) for name, good in right.items()]
    seen = [(row, good) for row, good in rows if not (row["category"] == "VS" and str(row["figure_id"]) == "0")]
    numbers = {
        "aAcc": share((good, 1, _of(row, "set_id")) for row, good in rows),
        "qAcc": _all_right(rows, "set_id", "question_id"),
        "fAcc": _all_right(seen, "set_id", "figure_id"),
        "easy": _all_right([one for one in rows if str(one[0]["visual_input"]) != "2"], "set_id", "question_id"),
        "hard": _all_right([one for one in rows if str(one[0]["visual_input"]) == "2"], "set_id", "question_id"),
    }
    return Part(part, len(rows), numbers, {"right": sum(right.values())})


def _all_right(rows: Sequence[tuple[Row, bool]], *names: str) -> Number:
    """The share of groups in which all is right; groups of one set are one unit."""
    groups: dict[tuple, list[bool]] = defaultdict(list)
    sets: dict[tuple, tuple] = {}
    for row, good in rows:
        groups[_of(row, *names)].append(good)
        sets[_of(row, *names)] = _of(row, "set_id")
    return share((all(goods), 1, sets[group]) for group, goods in groups.items())


def _of(row: Row, *names: str) -> tuple:
    return tuple(str(row[name]) for name in ("category", "subcategory", *names))
