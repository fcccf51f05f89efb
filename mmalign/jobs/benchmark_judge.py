"""Asks a judge about the answers to a benchmark, and keeps its replies as a file that can be scored again.

Every reply is kept as it came, with the judge, the hash of the question's template and the date; a second call asks
only what has no reply yet. Refused: benchmarks that need no judge, and scoring while a reply is missing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign.core.types import Prompt
from mmalign.evaluate.benchmarks.files import Answers, BenchmarkFiles
from mmalign.evaluate.hallucination import Benchmark
from mmalign.evaluate.page import write_whole
from mmalign.feedback import EndpointJudge, Journal, Journalled, Template
from mmalign.feedback.endpoint import EndpointSettings
from mmalign.jobs.shards import progress_bar

# tokens of the longest reply: a short analysis and a rating, or a list of objects
LONGEST = 1024


def with_replies(
    files: BenchmarkFiles,
    benchmark: Benchmark,
    places: Sequence[Mapping[str, str] | None],
    answers: Answers,
    output: Path,
) -> BenchmarkFiles:
    """The files with the judge's replies to one model's answers; `places` fill the question, None: nothing is asked."""
    assert files.judge is not None
    assert files.judge.endpoint is not None
    template = Template.read(files.judge.prompt, files.name, benchmark.places)
    endpoint = files.judge.endpoint
    folder = output / "judge" / answers.name
    replies = _ask(endpoint, template, places, folder / "journal", f"{answers.name}, replies")
    path = folder / "replies.jsonl"
    rows = [json.dumps({"reply": reply, "judge": endpoint.model}, ensure_ascii=False) for reply in replies]
    write_whole(path, "".join(row + "\n" for row in rows))
    prompt = files.judge.prompt or "of mmalign, so that the score cannot be compared with published ones"
    judge = dataclasses.replace(
        files.judge,
        name=f"{endpoint.model} (question {template.hash}, {prompt})",
        date=_dates(folder / "journal"),
        replies=str(path),
        endpoint=None,
    )
    return dataclasses.replace(files, judge=judge)


def _ask(
    endpoint: EndpointSettings,
    template: Template,
    places: Sequence[Mapping[str, str] | None],
    folder: Path,
    title: str,
) -> list[str]:
    settings = dataclasses.replace(endpoint, log_probs=False, max_tokens=endpoint.max_tokens or LONGEST)
    judge = Journalled(EndpointJudge(settings), Journal(folder), template.hash)
    asked = [place for place, filled in enumerate(places) if filled is not None]
    questions = [Prompt(template.fill(**filled)) for filled in places if filled is not None]
    replies, failures = [""] * len(places), []
    with progress_bar() as progress:
        bar = progress.add_task(title, total=len(questions))
        for place, answer in judge.ask(questions):
            replies[asked[place]] = answer.text
            failures += [answer.failure] if answer.failure else []
            progress.advance(bar)
    if failures:
        raise ValueError(
            f"{len(failures):,} of {len(questions):,} questions to {endpoint.model} have no reply "
            f"({', '.join(sorted(set(failures)))}); the others are kept in {folder}: give the same command again"
        )
    return replies


def _dates(folder: Path) -> str:
    """When the replies came: a day, or the first and the last."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    days = sorted({json.loads(line)["date"][:10] for line in lines if line})
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "nothing asked"
