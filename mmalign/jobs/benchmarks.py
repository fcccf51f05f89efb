"""A hallucination benchmark from questions to report: models answer, answers are scored, the rule is printed with them.

Called by `mmalign evaluate` where its config has a section `benchmark`. Answers are greedy and are written line by
line to `answers/<model>.jsonl`; a run that was killed goes on after the last one. Everything that can be read is read
before a model is loaded. Refused: answers in that file that another model or another question made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmalign.core.types import Prompt
from mmalign.data import open_image
from mmalign.data.errors import Defect
from mmalign.evaluate.benchmark_report import BenchmarkReport, Scored, write_benchmark
from mmalign.evaluate.benchmarks.files import BenchmarkFiles, Question
from mmalign.evaluate.benchmarks.scores import some
from mmalign.evaluate.hallucination import BENCHMARKS, answer_files, read_answers
from mmalign.evaluate.report import installed_versions
from mmalign.jobs import models
from mmalign.jobs.benchmark_judge import with_replies
from mmalign.jobs.models import ModelSettings, SamplingSettings
from mmalign.jobs.shards import progress_bar
from mmalign.jobs.sources import device_of
from mmalign.modalities.lvlm import LvlmModality, LvlmSampling, LvlmSettings

# Wide enough for every benchmark's table where there is no terminal to ask.
WIDTH = 200


@dataclass(frozen=True, kw_only=True)
class Answering:
    """The models that answer, and how."""

    output: Path
    # name -> its model
    models: Mapping[str, ModelSettings]
    sampling: SamplingSettings
    device: str


def run(files: BenchmarkFiles, answering: Answering, config: str) -> list[Scored]:
    """Answers what is not answered yet, scores all, writes the report and prints the table."""
    benchmark, found = BENCHMARKS[files.name], answer_files(files)
    twice = set(found) & set(answering.models)
    if twice:
        raise ValueError(f"{some(sorted(twice))} is in models and in benchmark.answers; give one of them another name")
    if not found and not answering.models:
        raise ValueError("nothing to score: set benchmark.answers, or models (with model.kind=lvlm) that are to answer")
    if files.judge is not None and benchmark.judge_places is None:
        raise ValueError(f"{files.name} needs no judge; unset benchmark.judge")
    content = benchmark.load(files)
    if answering.models:
        questions = _checked(files, benchmark.questions(files, content))
        for name, model in answering.models.items():
            found[name] = [_answered(name, model, questions, answering)]
    scored = []
    for name, paths in found.items():
        answers = read_answers(name, paths)
        judged = files
        if files.judge is not None and files.judge.endpoint is not None:
            assert benchmark.judge_places is not None
            places = benchmark.judge_places(files, content, answers)
            judged = with_replies(files, benchmark, places, answers, answering.output)
        scored.append(Scored(name, answers.where, benchmark.score(judged, content, answers)))
    report = BenchmarkReport(benchmark.title, files.name, scored, config, "mmalign evaluate", installed_versions())
    _print(report, write_benchmark(answering.output, report))
    return scored


def _print(report: BenchmarkReport, page: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table(title=f"{report.title}; report: {page}")
    for place, name in enumerate(report.header()):
        table.add_column(name, justify="left" if place < 2 else "right", overflow="fold")
    for one, part in report.rows():
        table.add_row(*report.cells(one, part))
    console.print(table)
    for rule, names in report.rules().items():
        of = "" if len(report.rules()) == 1 else f" of {', '.join(names)}"
        console.print(f"Rule{of}. {rule}", markup=False, highlight=False)
    for one in report.scored:
        for note in one.score.notes:
            console.print(f"{one.model}: {note}", markup=False, highlight=False)


# -- answering ---------------------------------------------------------------------------------------------------------


def _checked(files: BenchmarkFiles, questions: Sequence[Question]) -> list[tuple[Question, Path | None]]:
    """The questions as they will be asked, each with its picture; all pictures must be there."""
    if not questions:
        raise ValueError(f"no questions for {files.name}: set benchmark.questions")
    if files.images is None and any(question.image for question in questions):
        raise ValueError("benchmark.images is not set; expected the folder of the pictures that are asked about")
    folder = Path(files.images or ".")
    asked = [
        (
            dataclasses.replace(question, text=question.text + files.suffix),
            folder / question.image if question.image else None,
        )
        for question in questions
    ]
    missing = sorted({str(path) for _, path in asked if path and not path.is_file()})
    if missing:
        raise FileNotFoundError(f"benchmark.images: {len(missing):,} pictures are not there: {some(missing, 3)}")
    return asked


def _answered(
    name: str, settings: ModelSettings, questions: Sequence[tuple[Question, Path | None]], answering: Answering
) -> Path:
    """The file of a model's answers, with those that were missing."""
    if not isinstance(settings, LvlmSettings) or not isinstance(answering.sampling, LvlmSampling):
        raise ValueError("model.kind is diffusion; a model that answers questions needs model.kind=lvlm")
    path = answering.output / "answers" / f"{name}.jsonl"
    model = settings.path if settings.adapter is None else f"{settings.path} + {settings.adapter}"
    about = {"model": model, "max_new_tokens": answering.sampling.max_new_tokens}
    done = _done(path, about, [question for question, _ in questions])
    todo = [one for place, one in enumerate(questions) if place not in done]
    if todo:
        sampling = dataclasses.replace(answering.sampling, temperature=0.0)
        device = device_of(answering.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        modality, network = models.load(settings, device, dtype, frozen_copy=False)
        assert isinstance(modality, LvlmModality)
        path.parent.mkdir(parents=True, exist_ok=True)
        _ask(path, todo, about, lambda prompts: _texts(modality, network, prompts, sampling), sampling.batch_size)
    return path


def _texts(modality: LvlmModality, network: Any, prompts: Sequence[Prompt], sampling: LvlmSampling) -> list[str]:
    answers = modality.generate(network, prompts, [0] * len(prompts), sampling)
    return [answer.text or "" for answer in answers]


def _ask(
    path: Path,
    todo: Sequence[tuple[Question, Path | None]],
    about: Mapping[str, Any],
    texts_of: Callable[[Sequence[Prompt]], list[str]],
    batch: int,
) -> None:
    with progress_bar() as progress, path.open("a", encoding="utf-8") as file:
        bar = progress.add_task(f"{path.stem}, answers", total=len(todo))
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            for (question, _), text in zip(part, texts_of([_prompt(*one) for one in part]), strict=True):
                row = {**question.identity, "image": question.image, "prompt": question.text, "text": text, **about}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress.advance(bar, len(part))


def _prompt(question: Question, picture: Path | None) -> Prompt:
    if picture is None:
        return Prompt(question.text)
    try:
        return Prompt(question.text, (open_image(picture.read_bytes(), str(picture)),))
    except Defect as error:
        raise ValueError(f"benchmark.images: {error.message}") from None


def _done(path: Path, about: Mapping[str, Any], questions: Sequence[Question]) -> set[int]:
    """The places of the questions that `path` answers already. A line that a crash cut short is taken out."""
    if not path.is_file():
        return set()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    places = {_key(question.identity, question.text): place for place, question in enumerate(questions)}
    done = set()
    for number, line in enumerate(whole, 1):
        row = json.loads(line)
        identity = {name: row.get(name) for name in questions[0].identity}
        place = places.get(_key(identity, row.get("prompt")))
        if place is None or {name: row.get(name) for name in about} != dict(about):
            raise ValueError(
                f"{path}, line {number} answers another question than this config asks, or is of another model; "
                "choose another output, or remove the file"
            )
        done.add(place)
    return done


def _key(identity: Mapping[str, Any], text: Any) -> str:
    return json.dumps([identity, text], sort_keys=True)
