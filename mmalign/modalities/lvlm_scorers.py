"""Rewards for rollouts of a vision-language model, from reward models: per token, or for a response as a whole.

    fine +1, hallucinated -1, none 0; or the expected value of these     at the last token that overlaps the segment
    r = sum over types of weight x reward of the type

Refused: weights for a type that has no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.core.types import Sample
from mmalign.modalities.lvlm import LvlmModality
from mmalign.modalities.lvlm_rewards import (
    SegmentRewardModality,
    SequenceRewardModality,
    Span,
    segment_inputs,
)

# of fine, hallucinated and none
WORTH = (1.0, -1.0, 0.0)


def dense_rewards(
    actions: Sequence[int],
    places: Sequence[Sequence[int | None]],
    chances: Mapping[str, Sequence[Float[Tensor, "_ 3"]]],
    weights: Mapping[str, float],
    *,
    expected: bool = False,
) -> list[Float[Tensor, " _"]]:
    """One reward for each action. `places` says at which action each segment is paid, None: nowhere. `chances` are
    those of fine, hallucinated and none; the likeliest counts, or with `expected` all by their chance."""
    worth = torch.tensor(WORTH)
    rewards = [torch.zeros(count) for count in actions]
    for kind, weight in weights.items():
        for row, own, chance in zip(rewards, places, chances[kind], strict=True):
            values = chance @ worth if expected else worth[chance.argmax(-1)]
            for place, value in zip(own, values, strict=True):
                if place is not None:
                    row[place] += weight * value
    return rewards


def at_the_end(rewards: Sequence[Float[Tensor, " _"]]) -> list[Float[Tensor, " _"]]:
    """The same totals at the last action: a reward for whole sequences, which dense ones are held against."""
    totals = [torch.zeros_like(row) for row in rewards]
    for total, row in zip(totals, rewards, strict=True):
        total[-1:] = row.sum()
    return totals


@final
class SegmentScorer:
    """Typed segment models as a scorer of rollouts. All are built on `base`; `segments(text)` cuts a response.

    `dense` off puts the whole reward of a response on its last token.
    """

    def __init__(
        self,
        base: LvlmModality,
        networks: Mapping[str, nn.Module],
        segments: Callable[[str], Sequence[Span]],
        weights: Mapping[str, float] | None = None,
        *,
        expected: bool = False,
        dense: bool = True,
        batch_size: int = 16,
    ):
        self._weights = dict.fromkeys(networks, 1.0) if weights is None else dict(weights)
        missing = self._weights.keys() - networks.keys()
        if missing:
            raise ValueError(f"there is a weight for {sorted(missing)[0]}, but no reward model of this type")
        self._base, self._segments = base, segments
        self._models = {kind: (SegmentRewardModality(base, kind), network) for kind, network in networks.items()}
        self._expected, self._dense, self._batch_size = expected, dense, batch_size

    def __call__(self, samples: Sequence[Sample]) -> list[Float[Tensor, " _"]]:
        rewards: list[Tensor] = []
        for start in range(0, len(samples), self._batch_size):
            part = [self._cut(sample) for sample in samples[start : start + self._batch_size]]
            inputs = segment_inputs(self._base, part)
            chances = {kind: model.chances(network, inputs) for kind, (model, network) in self._models.items()}
            rewards += dense_rewards(inputs.actions, inputs.places, chances, self._weights, expected=self._expected)
        return rewards if self._dense else at_the_end(rewards)

    def _cut(self, sample: Sample) -> Sample:
        spans = self._segments(sample.text or "")
        return replace(sample, segments=[{"start": start, "end": end} for start, end in spans])


@final
class SequenceScorer:
    """A sequence model as a scorer of rollouts: its number stands at the last action."""

    def __init__(self, modality: SequenceRewardModality, network: nn.Module, batch_size: int = 16):
        self._modality, self._network, self._batch_size = modality, network, batch_size

    def __call__(self, samples: Sequence[Sample]) -> list[Float[Tensor, ""]]:
        parts = [samples[start : start + self._batch_size] for start in range(0, len(samples), self._batch_size)]
        return [score for part in parts for score in self._modality.predict(self._network, part)]
