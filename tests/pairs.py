"""Pairs of log-probs for the tests of objectives, and every paired objective in each of its forms."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmalign.core.objectives.paired import PAIRED
from mmalign.core.types import LogProbs, Pair

# (name, data beside the log-probs, parameters): every objective with its defaults, and in each of its other forms
CASES = [(name, {}, {}) for name in PAIRED] + [
    ("dpo", {}, {"beta": 0.7, "label_smoothing": 0.2}),
    ("robust", {}, {"beta": 0.3, "label_smoothing": 0.4}),
    ("ipo", {}, {"beta": 0.4, "normalize": True}),
    ("exo", {}, {"label_smoothing": 0.3}),
    ("bco_pair", {"shift": 0.4}, {"beta": 0.6}),
    ("discopop", {}, {"beta": 0.02, "tau": 0.9}),
    ("ld_dpo", {}, {"alpha": 0.0}),
    ("ld_dpo", {}, {"alpha": 0.9, "beta": 0.5}),
    ("f_dpo", {}, {"divergence": "forward_kl"}),
    ("f_dpo", {}, {"divergence": "js", "beta": 2.0}),
    ("f_dpo", {}, {"divergence": "alpha", "alpha": 0.3}),
    ("f_dpo", {}, {"divergence": "alpha", "alpha": 1.4}),
    ("rpo", {}, {"eta": 0.4, "sft_reduction": "mean"}),
    ("cream", {"consistency": [0.9, 0.25, 0.5, 0.0]}, {"beta": 0.4}),
    ("mm_dpo", {"reward_margin": [0.0, 2.5, 0.3, -1.0]}, {"scaling": 0.8, "sensitivity": 1.5}),
    ("seppo", {}, {"anchor": "indicator", "beta": 0.6}),
    ("simpo", {}, {"beta": 1.5, "gamma_beta_ratio": 0.2}),
]
CHOSEN, REJECTED = (3, 1, 15, 2), (7, 6, 1, 2)  # lengths


def rows(values: Sequence[Sequence[float]]) -> LogProbs:
    tensor = torch.tensor(values, dtype=torch.float64)
    return LogProbs(tensor, torch.ones_like(tensor))


def random_rows(seed: int, lengths: Sequence[int]) -> LogProbs:
    """Log-probs below 0 of samples of very unequal lengths, with token weights of 1, 1/2 and, in the middle, 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 2)
    values, collision = (-torch.rand(shape, dtype=torch.float64, generator=generator) - 0.01 for _ in range(2))
    weight = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).double()
    weight[:, 1] *= 0.5
    weight[:, 4] = 0
    return LogProbs(values, weight, collision)


def random_pairs(seed: int) -> tuple[Pair, Pair]:
    seeds = range(10 * seed, 10 * seed + 4)
    chosen, rejected, anchor, other = map(random_rows, seeds, (CHOSEN, REJECTED, CHOSEN, REJECTED))
    return Pair(chosen, rejected), Pair(anchor, other)


def loss_of(name: str, policy: Pair, reference: Pair | None, extra=None, parameters=None) -> Tensor:
    extra = {
        key: torch.tensor(item, dtype=torch.float64) if isinstance(item, list) else item
        for key, item in (extra or {}).items()
    }
    return PAIRED[name](policy, reference, **extra, **(parameters or {}))[0]


def values_of(pair: Pair) -> tuple[Tensor, Tensor]:
    return pair.chosen.values, pair.rejected.values


def with_values(pair: Pair, chosen: Tensor, rejected: Tensor) -> Pair:
    return Pair(replace(pair.chosen, values=chosen), replace(pair.rejected, values=rejected), pair.weight)


def leaves(pair: Pair) -> Pair:
    return with_values(pair, *(side.detach().clone().requires_grad_() for side in values_of(pair)))


def swapped(pair: Pair) -> Pair:
    return Pair(pair.rejected, pair.chosen, pair.weight)


def pick(pair: Pair, index: list[int], rejected: list[int] | None = None) -> Pair:
    """Some of the pairs; `rejected` takes the other side from other rows."""
    chosen, other = torch.tensor(index), torch.tensor(index if rejected is None else rejected)
    return Pair(
        pair.chosen.pick(chosen), pair.rejected.pick(other), None if pair.weight is None else pair.weight[chosen]
    )


def gradients(loss: Tensor, pair: Pair) -> list[Tensor]:
    found = torch.autograd.grad(loss, values_of(pair), allow_unused=True)
    return [torch.zeros_like(side) if part is None else part for part, side in zip(found, values_of(pair), strict=True)]
