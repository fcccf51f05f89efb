"""What a benchmark leaves behind: results.json (a row per model and part), table.md and report.html.

All three carry the rule beside the numbers. Nothing is rounded in results.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mmalign.evaluate.benchmarks.scores import Part, Score
from mmalign.evaluate.page import template, write_whole


@dataclass(frozen=True)
class Scored:
    """One model's answers, and what they come to."""

    model: str
    answers: str
    score: Score


@dataclass(frozen=True)
class BenchmarkReport:
    """What is written of a benchmark."""

    title: str
    # as in benchmark.name
    name: str
    scored: Sequence[Scored]
    config: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[Scored, Part]]:
        return ((one, part) for one in self.scored for part in one.score.parts)

    def columns(self) -> list[str]:
        """The names of all numbers, in order of appearance."""
        return list(dict.fromkeys(name for _, part in self.rows() for name in part.numbers))

    def counts(self) -> list[str]:
        return list(dict.fromkeys(name for _, part in self.rows() for name in part.counts))

    def rules(self) -> dict[str, list[str]]:
        """Rule -> the models that were scored by it; more than one where their judges differ."""
        found: dict[str, list[str]] = {}
        for one in self.scored:
            found.setdefault(one.score.rule, []).append(one.model)
        return found

    def cells(self, one: Scored, part: Part) -> list[str]:
        """A line of the table, as text."""
        numbers = [str(part.numbers[name]) if name in part.numbers else "" for name in self.columns()]
        counts = [f"{part.counts[name]:,}" if name in part.counts else "" for name in self.counts()]
        return [one.model, part.name, f"{part.items:,}", *numbers, *counts]

    def header(self) -> list[str]:
        return ["model", "part", "n", *self.columns(), *self.counts()]


def write_benchmark(folder: Path, report: BenchmarkReport) -> Path:
    """Writes the three files; returns the path of the page."""
    page = template("benchmark.html.jinja").render(
        report=report, written=datetime.now().astimezone().strftime("%-d %B %Y, %H:%M")
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(report, one, part) for one, part in report.rows()]
    write_whole(folder / "results.json", json.dumps(rows, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    write_whole(folder / "table.md", _markdown(report))
    return write_whole(folder / "report.html", page)


def _row(report: BenchmarkReport, one: Scored, part: Part) -> dict[str, Any]:
    return {
        "benchmark": report.name,
        "model": one.model,
        "part": part.name,
        "items": part.items,
        "numbers": {name: number.to_dict() for name, number in part.numbers.items()},
        "counts": dict(part.counts),
        "rule": one.score.rule,
        "notes": one.score.notes,
        "answers": one.answers,
    }


def _markdown(report: BenchmarkReport) -> str:
    header = report.header()
    lines = [f"# {report.title}", "", _line(header), _line(["---"] * 2 + ["---:"] * (len(header) - 2))]
    lines += [_line(report.cells(one, part)) for one, part in report.rows()]
    for rule, models in report.rules().items():
        lines += ["", f"Rule{_of(models, report)}: {rule}"]
    lines += [""] * any(one.score.notes for one in report.scored)
    lines += [f"- {one.model}: {note}" for one in report.scored for note in one.score.notes]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _of(models: Sequence[str], report: BenchmarkReport) -> str:
    return "" if len(report.rules()) == 1 else f" ({', '.join(models)})"
