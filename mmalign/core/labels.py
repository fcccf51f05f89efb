"""What is known of the samples of a batch, as tensors: the feedback that objectives read beside the log-probs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.core.types import Sample


@final
@dataclass(frozen=True)
class Labels:
    """One entry per sample. `score` is NaN where a sample has none; `weight` and `consistency` are 1 where the record
    says nothing."""

    desirable: Bool[Tensor, " sample"]
    score: Float[Tensor, " sample"]
    group: Int[Tensor, " sample"]
    weight: Float[Tensor, " sample"]
    consistency: Float[Tensor, " sample"]

    @staticmethod
    def of(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Labels:
        """Samples that nobody marked as undesirable count as desirable."""

        def numbers(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return Labels(
            desirable=torch.tensor(
                [sample.desirable is not False for sample in samples], dtype=torch.bool, device=device
            ),
            score=numbers([math.nan if sample.score is None else sample.score for sample in samples]),
            group=torch.tensor([sample.group for sample in samples], dtype=torch.int64, device=device),
            weight=numbers([sample.numbers.get("weight", 1.0) for sample in samples]),
            consistency=numbers([sample.numbers.get("consistency", 1.0) for sample in samples]),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {item.name: getattr(self, item.name) for item in fields(self)}
