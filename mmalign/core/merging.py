"""Arithmetic on trained weights: averages (model soups), task arithmetic and low-rank updates.

    average            sum_i w_i model_i, sum_i w_i = 1                     (arXiv 2203.05482)
    task arithmetic    base + sum_i w_i (model_i - base)                    (arXiv 2212.04089)
    LoRA               base + sum_i w_i (alpha_i / r_i) up_i down_i         (arXiv 2106.09685)

Weights are mappings from names to tensors; what network they belong to is no business of this file. Sums are taken in
float64 and rounded once. Refused: models whose tensors differ in name or shape; the first one that does is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

Weights = Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class LowRank:
    """The update factor x up @ down of one weight. A convolution has its kernel in `down`; `up` is then 1 x 1."""

    down: Float[Tensor, "rank inner *kernel"]
    up: Float[Tensor, "outer rank *one"]
    factor: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def whole(self) -> Float[Tensor, "outer inner *kernel"]:
        """The update itself, in float64."""
        product = self.up.flatten(1).double() @ self.down.flatten(1).double()
        return self.factor * product.reshape(len(self.up), *self.down.shape[1:])


LowRankUpdates = Mapping[str, LowRank]


@final
class WeightSum:
    """A sum of models and updates, one at a time, so that only one of them need be in memory.

    `name` is what messages call a model. What is not a floating-point number (counters) stays as in the first model.
    """

    def __init__(self) -> None:
        self._total: dict[str, Tensor] = {}
        self._like: dict[str, torch.dtype] = {}
        self._first = ""

    def add(self, name: str, model: Weights, factor: float) -> None:
        """Adds `factor` times a whole model. Raises ValueError where it does not fit the first one."""
        if not self._total:
            self._first = name
            self._like = {key: tensor.dtype for key, tensor in model.items()}
            self._total = {key: _wide(tensor, factor) for key, tensor in model.items()}
            return
        self._check(name, model)
        for key, tensor in model.items():
            if tensor.is_floating_point():
                self._total[key].add_(tensor.double(), alpha=factor)

    def add_updates(self, name: str, updates: LowRankUpdates, factor: float) -> None:
        """Adds `factor` times the updates of an adapter to the weights they belong to."""
        for key, update in updates.items():
            if key not in self._total:
                raise ValueError(f"{name} does not fit {self._first}: it changes {key}, which is not there")
            change = update.whole()
            if change.shape != self._total[key].shape:
                raise ValueError(_misfit(name, self._first, key, change, self._total[key]))
            self._total[key].add_(change, alpha=factor)

    def result(self) -> dict[str, Tensor]:
        """The sum, in the precision of the first model."""
        return {key: tensor.to(self._like[key]) for key, tensor in self._total.items()}

    def _check(self, name: str, model: Weights) -> None:
        for key in (*self._total, *model):
            if key not in model or key not in self._total:
                has, lacks = (name, self._first) if key in model else (self._first, name)
                raise ValueError(f"{name} does not fit {self._first}: {has} has {key}, {lacks} does not")
            if model[key].shape != self._total[key].shape:
                raise ValueError(_misfit(name, self._first, key, model[key], self._total[key]))


def average(models: Sequence[Weights], shares: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of models; equal shares where none are given. Shares need not sum to one."""
    total = WeightSum()
    for index, (model, share) in enumerate(zip(models, normalised(shares or [1.0] * len(models)), strict=True)):
        total.add(f"model {index}", model, share)
    return total.result()


def normalised(shares: Sequence[float]) -> list[float]:
    """Shares of a whole. Raises ValueError for a negative one, and where all are 0."""
    if any(share < 0 for share in shares) or not sum(shares) > 0:
        raise ValueError(f"weights {list(shares)} cannot be shares of an average; expected numbers of at least 0")
    return [share / sum(shares) for share in shares]


def concatenated(adapters: Sequence[tuple[str, LowRankUpdates, float]]) -> dict[str, LowRank]:
    """One adapter that does what the sum of `factor` x adapter does, exactly: its ranks are those of all, side by side.

    Each entry is (name, updates, factor). Every update gets the same rank, filled up with zeros where an adapter leaves
    a weight alone, for loaders that know one rank only; its factor is 1.
    """
    names = list(dict.fromkeys(key for _, updates, _ in adapters for key in updates))
    parts = {key: [(name, updates[key], by) for name, updates, by in adapters if key in updates] for key in names}
    rank = max((sum(update.rank for _, update, _ in found) for found in parts.values()), default=0)
    return {key: _side_by_side(key, found, rank) for key, found in parts.items()}


def _side_by_side(key: str, parts: Sequence[tuple[str, LowRank, float]], rank: int) -> LowRank:
    first, model, _ = parts[0]
    for name, update, _ in parts[1:]:
        for one, other in ((update.down[0], model.down[0]), (update.up[:, 0], model.up[:, 0])):
            if one.shape != other.shape:
                raise ValueError(_misfit(name, first, key, one, other))
    spare = rank - sum(update.rank for _, update, _ in parts)
    down = [update.down for _, update, _ in parts]
    up = [(update.up.double() * (update.factor * by)).to(update.up.dtype) for _, update, by in parts]
    down.append(model.down.new_zeros(spare, *model.down.shape[1:]))
    up.append(model.up.new_zeros(len(model.up), spare, *model.up.shape[2:]))
    return LowRank(torch.cat(down), torch.cat(up, dim=1), 1.0)


def _wide(tensor: Tensor, factor: float) -> Tensor:
    return tensor.double() * factor if tensor.is_floating_point() else tensor.clone()


def _misfit(name: str, first: str, key: str, one: Tensor, other: Tensor) -> str:
    return f"{name} does not fit {first}: {key} is {tuple(one.shape)} in the one, {tuple(other.shape)} in the other"
