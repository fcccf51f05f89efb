"""Prompts of other rows: negatives for CCA, mismatched samples for KTO.

The prompts of a whole batch, in the order of its slots, are rolled by one row, so that neither micro-batches nor
processes change who gets which. A single row keeps its own prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmalign.core.types import Sample
from mmalign.training.distributed import Processes

Rows = Sequence[tuple[Sample, ...]]


@dataclass(frozen=True)
class Prompt:
    """Everything of a sample that belongs to its prompt; tensors of prompts are named `<member>.<tensor>`."""

    prompt: Any
    images: tuple[Any, ...]
    tensors: dict[str, Any]

    @staticmethod
    def of(sample: Sample) -> Prompt:
        tensors = {name: value for name, value in sample.tensors.items() if "." in name}
        return Prompt(sample.prompt, sample.prompt_images, tensors)

    def give(self, sample: Sample, **changes: Any) -> Sample:
        own = {name: value for name, value in sample.tensors.items() if "." not in name}
        return replace(
            sample, prompt=self.prompt, prompt_images=self.images, tensors={**own, **self.tensors}, **changes
        )

    def same(self, other: Prompt) -> bool:
        return self.prompt == other.prompt and len(self.images) == len(other.images) == 0


def rolled_prompts(micro_batches: Sequence[Rows], processes: Processes) -> list[list[Prompt]]:
    """For each row of each micro-batch, the prompt of the row before it in the whole batch."""
    own = [[Prompt.of(row[0]) for row in rows] for rows in micro_batches]
    everyone = processes.gather_objects(own)
    places = [
        (index, rank, place)
        for index in range(len(own))
        for rank, batches in enumerate(everyone)
        for place in range(len(batches[index]))
    ]
    before = dict(zip(places, [places[-1], *places[:-1]], strict=True)) if places else {}

    def prompt(index: int, place: int) -> Prompt:
        other, rank, row = before[index, processes.rank, place]
        return everyone[rank][other][row]

    return [[prompt(index, place) for place in range(len(rows))] for index, rows in enumerate(own)]


def with_negatives(
    micro_batches: Sequence[Rows], processes: Processes, dropout: float, empty_prompt: Any
) -> list[list[tuple[Sample, ...]]]:
    """Each liked sample beside itself under the rolled prompt (CCA, arXiv 2410.09347).

    Where the rolled prompt is its own, or where one draw took the prompt from both, nothing is mismatched: the second
    sample counts as desirable too.
    """
    rolled = rolled_prompts(micro_batches, processes)

    def row(sample: Sample, other: Prompt) -> tuple[Sample, ...]:
        if random.Random(sample.draw).random() < dropout:
            bare = replace(sample, prompt=empty_prompt, desirable=True)
            return bare, bare
        matches = other.same(Prompt.of(sample))
        return replace(sample, desirable=True), other.give(sample, desirable=matches)

    return [
        [row(samples[0], other) for samples, other in zip(rows, prompts, strict=True)]
        for rows, prompts in zip(micro_batches, rolled, strict=True)
    ]


def mismatched(micro_batches: Sequence[Rows], processes: Processes) -> list[list[Sample]]:
    """Every sample under the rolled prompt, by micro-batch: what KTO's reference point is estimated from."""
    rolled = rolled_prompts(micro_batches, processes)
    return [
        [other.give(sample) for samples, other in zip(rows, prompts, strict=True) for sample in samples]
        for rows, prompts in zip(micro_batches, rolled, strict=True)
    ]
