"""Advantages: rewards with a baseline taken off, per group of samples of one prompt, or per action with a value model.

A group is given by one integer per sample; its rows may come in any order. A group of one has nothing to be compared
with: its advantage is 0, and `single_groups` counts them so that it can be said. A group with equal rewards has
advantages of exactly 0. Nothing here has a gradient.
Refused: rewards that are not finite.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.core.types import LogProbs

Actions = Float[Tensor, "sample action"]


@torch.no_grad()
def centre(reward: Float[Tensor, " sample"], group: Int[Tensor, " sample"]) -> Float[Tensor, " sample"]:
    """r - mean of the group: what dr_grpo wants, Liu et al. 2025 (arXiv 2503.20783)."""
    return _deviation(reward, _same(reward, group))


@torch.no_grad()
def normalise(
    reward: Float[Tensor, " sample"], group: Int[Tensor, " sample"], *, eps: float = 1e-4
) -> Float[Tensor, " sample"]:
    """(r - mean)/(std + eps) of the group, std unbiased: what grpo, dapo and gspo want, Shao et al. 2024 (arXiv
    2402.03300)."""
    same = _same(reward, group)
    std = (_squares(reward, same) / (same.sum(-1) - 1).clamp_min(1)).sqrt()
    return _deviation(reward, same) / (std + eps)


@torch.no_grad()
def per_prompt(
    reward: Float[Tensor, " sample"], group: Int[Tensor, " sample"], *, eps: float = 1e-6, min_count: int = 1
) -> Float[Tensor, " sample"]:
    """(r - mean)/(std + eps) of the group, std biased: what ddpo wants, Black et al. 2023 (arXiv 2305.13301).

    A prompt with fewer than `min_count` rows is compared with all rows instead. The released code keeps the last 32
    rewards of each prompt and asks for 16; here the statistics are those of the rows handed in, so a caller that keeps
    earlier rewards hands them in as well and drops their rows from the result.
    """
    same = _same(reward, group)
    population = same | (same.sum(-1, keepdim=True) < min_count)
    std = (_squares(reward, population) / population.sum(-1)).sqrt()
    return _deviation(reward, population) / (std + eps)


@torch.no_grad()
def leave_one_out(reward: Float[Tensor, " sample"], group: Int[Tensor, " sample"]) -> Float[Tensor, " sample"]:
    """r - mean of the others in the group: what rloo wants, Ahmadian et al. 2024 (arXiv 2402.14740)."""
    same = _same(reward, group)
    count = same.sum(-1)
    return _deviation(reward, same) * count / (count - 1).clamp_min(1)


@torch.no_grad()
def with_kl_penalty(
    reward: Float[Tensor, " sample"], old: LogProbs, reference: LogProbs, beta: float
) -> Float[Tensor, " sample"]:
    """r - beta sum(l_old - l_ref): the reward of rloo, before its baseline is taken off."""
    return reward - beta * (old.sum() - reference.sum())


def single_groups(group: Int[Tensor, " sample"]) -> Int[Tensor, ""]:
    """How many groups have one sample only, and so an advantage of 0."""
    return ((group[:, None] == group).sum(-1) == 1).sum()


@torch.no_grad()
def gae(
    rewards: Actions, values: Actions, weight: Actions, *, gamma: float = 1.0, lambda_: float = 1.0
) -> tuple[Actions, Actions]:
    """Generalised advantage estimation over dense rewards: (advantages, returns), Schulman et al. 2015, Eq. 16 (arXiv
    1506.02438).

        delta_t = r_t + gamma v_{t+1} - v_t,  A_t = delta_t + gamma lambda A_{t+1},  R_t = A_t + v_t

    t runs over real actions alone, those whose weight is not 0: what stands between or behind them is skipped as if it
    were not there, never read, and 0 in the result. After the last action the value is 0. A reward for a whole sample
    stands at its last real action.
    """
    for name, number in (("gamma", gamma), ("lambda_", lambda_)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} is {number!r}; expected a number in [0, 1]")
    real = weight != 0
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for action in reversed(range(values.shape[1])):
        delta = rewards[:, action] + gamma * next_value - values[:, action]
        here = real[:, action]
        next_advantage = torch.where(here, delta + gamma * lambda_ * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, action], next_value)
        advantages[:, action] = torch.where(here, next_advantage, 0.0)
    return advantages, advantages + values.masked_fill(~real, 0.0)


def _same(reward: Float[Tensor, " sample"], group: Int[Tensor, " sample"]) -> Bool[Tensor, "sample sample"]:
    """Which samples are of one group. Sums run along the rows of this table: unlike index_add they always add in the
    same order."""
    if not bool(reward.isfinite().all()):
        bad = int((~reward.isfinite()).nonzero()[0])
        raise ValueError(f"the reward of sample {bad} is {float(reward[bad])}; expected a finite number of its scorer")
    return group[:, None] == group


def _mean(reward: Float[Tensor, " sample"], same: Bool[Tensor, "sample sample"]) -> Float[Tensor, " sample"]:
    return torch.where(same, reward, 0.0).sum(-1) / same.sum(-1)


def _squares(reward: Float[Tensor, " sample"], same: Bool[Tensor, "sample sample"]) -> Float[Tensor, " sample"]:
    """The sum of squared deviations in the group of each sample."""
    return torch.where(same, reward - _mean(reward, same)[:, None], 0.0).square().sum(-1)


def _deviation(reward: Float[Tensor, " sample"], same: Bool[Tensor, "sample sample"]) -> Float[Tensor, " sample"]:
    """r - mean; exactly 0 where all are equal, which a rounded mean would miss."""
    varied = (same & (reward != reward[:, None])).any(-1)
    return torch.where(varied, reward - _mean(reward, same), 0.0)
