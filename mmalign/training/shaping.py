"""Scores of rollouts to rewards per action, and to advantages. Functions of padded tables; no gradient.

    r_t = score_t - kappa (l_old - l_ref)       one-sided: - kappa max(l_old - l_ref, 0)

Actions that the policy has made likelier than the reference cost reward: a minus, not a plus. With a value model the
advantages come from GAE over these rewards; without one the sum over a sample is compared with those of its group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.core import advantage as core
from mmalign.core.types import LogProbs

Actions = Float[Tensor, "sample action"]
Estimator = Literal["gae", "normalise", "centre", "leave_one_out", "per_prompt"]

# How strongly, and by how much at most, an adaptive coefficient follows the KL (arXiv 1909.08593, Section 2.2).
GAIN, LARGEST_ERROR = 0.1, 0.2


@torch.no_grad()
def penalised(
    scores: Actions, old: LogProbs, reference: LogProbs | None, coefficient: float, *, one_sided: bool = False
) -> Actions:
    """The scores minus the KL penalty of each real action; 0 elsewhere. One-sided, an action that the policy has made
    less likely than the reference is not paid for it (Fact-RLHF, Sun et al. 2023, arXiv 2309.14525)."""
    drift = torch.zeros_like(scores) if reference is None else (old.values - reference.values).to(scores.dtype)
    if one_sided:
        drift = drift.clamp_min(0.0)
    return (scores - coefficient * drift).masked_fill(old.weight == 0, 0.0)


def adapted(coefficient: float, kl: float, target: float) -> float:
    """The coefficient of the next rollout, raised where the KL was above its target and lowered where it was below:

        e = clip((KL - target)/target, -0.2, 0.2),  kappa <- kappa (1 + 0.1 e)

    Ziegler et al. 2019, Section 2.2 (arXiv 1909.08593)
    """
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * (1 + GAIN * error)


@torch.no_grad()
def estimated(
    rewards: Actions, values: Actions, weight: Actions, *, gamma: float, lambda_: float, whiten: bool
) -> tuple[Actions, Actions]:
    """(advantages, returns) by GAE over real actions; the advantages whitened over all of them."""
    advantages, returns = core.gae(rewards, values, weight, gamma=gamma, lambda_=lambda_)
    return (whitened(advantages, weight != 0) if whiten else advantages), returns


@torch.no_grad()
def whitened(advantages: Actions, real: Bool[Tensor, "sample action"]) -> Actions:
    """Mean 0 and deviation 1 over the real actions of all samples."""
    chosen = advantages[real]
    if not chosen.numel():
        return advantages
    centred = (advantages - chosen.mean()) / (chosen.std(correction=0) + 1e-8)
    return centred.masked_fill(~real, 0.0)


def compared(rewards: Actions, group: Int[Tensor, " sample"], estimator: Estimator) -> Float[Tensor, " sample"]:
    """One advantage per sample: its whole reward against those of its group."""
    return COMPARISONS[estimator](rewards.sum(-1), group)


def explained_variance(returns: Float[Tensor, " action"], values: Float[Tensor, " action"]) -> float:
    """1 - var(returns - values)/var(returns): 1 for a perfect value model, 0 for a constant one; 0 where the returns do
    not vary."""
    spread = returns.var(correction=0) if returns.numel() else torch.zeros(())
    return float(1 - (returns - values).var(correction=0) / spread) if spread > 0 else 0.0


COMPARISONS: dict[str, Callable[..., Tensor]] = {
    "normalise": core.normalise,
    "centre": core.centre,
    "leave_one_out": core.leave_one_out,
    "per_prompt": core.per_prompt,
}
