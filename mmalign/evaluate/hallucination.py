"""Hallucination benchmarks of vision-language models, by name: what they ask, and what a model's answers come to.

Each lives in a file of `benchmarks/` and offers three functions: `load` reads the annotations, `questions` says what to
ask a model, `score` holds answers against annotations. Scores carry their rule in words, because the same name stands
for different numbers in different papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.evaluate.benchmarks import amber, chair, hallusionbench, mmhal, object_halbench, pope
from mmalign.evaluate.benchmarks.files import Answers, BenchmarkFiles, Question, read_rows
from mmalign.evaluate.benchmarks.scores import Score


@dataclass(frozen=True)
class Benchmark:
    """`load` gives what the other two take beside the files."""

    title: str
    load: Callable[[BenchmarkFiles], Any]
    questions: Callable[[BenchmarkFiles, Any], list[Question]]
    score: Callable[[BenchmarkFiles, Any, Answers], Score]
    # what fills a judge's question, answer by answer (None: not asked), and the places in it; None: no judge
    judge_places: Callable[[BenchmarkFiles, Any, Answers], list[dict[str, str] | None]] | None = None
    places: tuple[str, ...] = ()


def answer_files(files: BenchmarkFiles) -> dict[str, list[Path]]:
    """Name of a model -> its files of answers."""
    given = files.answers
    if given is None and files.name == "mmhal" and files.judge is not None and files.judge.replies is not None:
        # ratings alone are enough there
        named = files.judge.replies
        return {name: [] for name in ([Path(named).stem] if isinstance(named, str) else named)}
    if given is None:
        return {}
    if isinstance(given, str):
        given = {Path(given).stem: given}
    if isinstance(given, list):
        given = {Path(given[0]).stem: given} if given else {}
    return {
        name: [Path(one) for one in ([several] if isinstance(several, str) else several)]
        for name, several in given.items()
    }


def read_answers(name: str, found: Sequence[Path]) -> Answers:
    for path in found:
        if not path.is_file():
            raise FileNotFoundError(f"benchmark.answers: no file {path}")
    return Answers(name, [(path, read_rows(path, "answers")) for path in found])


BENCHMARKS: Mapping[str, Benchmark] = {
    "pope": Benchmark("POPE", pope.load, pope.questions, pope.score),
    "chair": Benchmark("CHAIR", chair.load, chair.questions, chair.score),
    "amber": Benchmark("AMBER", amber.load, amber.questions, amber.score),
    "mmhal": Benchmark(
        "MMHal-Bench",
        mmhal.load,
        mmhal.questions,
        mmhal.score,
        mmhal.judge_places,
        ("contents", "question", "truth", "answer"),
    ),
    "object_halbench": Benchmark(
        "Object HalBench",
        object_halbench.load,
        object_halbench.questions,
        object_halbench.score,
        object_halbench.judge_places,
        ("question", "answer"),
    ),
    "hallusionbench": Benchmark(
        "HallusionBench",
        hallusionbench.load,
        hallusionbench.questions,
        hallusionbench.score,
        hallusionbench.judge_places,
        ("question", "truth", "answer"),
    ),
}
