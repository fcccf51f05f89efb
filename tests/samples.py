"""Log-probs of single samples for the tests of objectives, with garbage where nothing may look, and plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmalign.core.types import LogProbs
from tests.pairs import random_rows

LENGTHS = (3, 1, 23, 2, 7, 5)  # very unequal; the fifth action of every sample counts for nothing
SHORT = (3, 1, 6, 2, 5, 4)  # for difference quotients, which move one number at a time
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)


def softplus(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def log_sigma(x: float) -> float:
    return -softplus(-x)


def sigma(x: float) -> float:
    return math.exp(log_sigma(x))


def column(*values: float, dtype: torch.dtype = torch.float64) -> LogProbs:
    """One action per sample."""
    tensor = torch.tensor(values, dtype=dtype)[:, None]
    return LogProbs(tensor, torch.ones_like(tensor))


def dirty(rows: LogProbs) -> LogProbs:
    """The same log-probs, with garbage where the weight is 0."""
    garbage = torch.tensor(GARBAGE, dtype=rows.values.dtype).repeat(rows.values.numel())[: rows.values.numel()]
    return replace(rows, values=torch.where(rows.weight == 0, garbage.view_as(rows.values), rows.values))


def random_samples(seed: int, lengths: Sequence[int] = LENGTHS) -> tuple[LogProbs, LogProbs]:
    """(policy, reference) of samples of these lengths."""
    return dirty(random_rows(seed, lengths)), dirty(random_rows(seed + 1000, lengths))


def leaf(rows: LogProbs) -> LogProbs:
    return replace(rows, values=rows.values.detach().clone().requires_grad_())


def gradient(loss: Tensor, rows: LogProbs) -> Tensor:
    return torch.autograd.grad(loss, rows.values)[0]


def tokens(rows: LogProbs) -> list[list[tuple[float, float]]]:
    """(value, weight) of every action that counts, sample by sample."""
    pairs = (zip(*both, strict=True) for both in zip(rows.values.tolist(), rows.weight.tolist(), strict=True))
    return [[(value, weight) for value, weight in row if weight != 0] for row in pairs]


def sums(rows: LogProbs) -> list[float]:
    return [sum(value * weight for value, weight in row) for row in tokens(rows)]


def ratios(policy: LogProbs, reference: LogProbs) -> list[float]:
    return [a - b for a, b in zip(sums(policy), sums(reference), strict=True)]
