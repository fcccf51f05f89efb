"""What objectives of every family share: the check of a parameter, log-ratios, metrics of pairs, and exponentials that
stay finite.

Refused: parameters out of range, with the config key to change.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core.types import LogProbs, Pair

Result = tuple[Float[Tensor, ""], dict[str, Tensor]]


def check(name: str, value: object, valid: bool, expected: str) -> None:
    """Refuse a parameter that makes no sense, by the name it has in a config."""
    if not valid:
        raise ValueError(f"objective.{name} is {value!r}; expected {expected}")


def check_beta(beta: float) -> None:
    check("beta", beta, 0 < beta < math.inf, "a number above 0")


def log_ratio(policy: LogProbs, reference: LogProbs) -> Float[Tensor, " sample"]:
    """log pi(y|x) - log pi_ref(y|x), summed over actions. No gradient flows into the reference."""
    return policy.sum() - reference.sum().detach()


def mean_log_ratio(policy: LogProbs, reference: LogProbs) -> Float[Tensor, " sample"]:
    """The log-ratio per action; 0 for a sample without any. No gradient flows into the reference."""
    return policy.mean() - reference.mean().detach()


def log_ratios(policy: Pair, reference: Pair) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """c and r, the log-ratios of the chosen and of the rejected samples."""
    return log_ratio(policy.chosen, reference.chosen), log_ratio(policy.rejected, reference.rejected)


def mean_log_ratios(policy: Pair, reference: Pair) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """c/|y_w| and r/|y_l|."""
    return mean_log_ratio(policy.chosen, reference.chosen), mean_log_ratio(policy.rejected, reference.rejected)


def weighted_nll(rows: LogProbs, weight: Float[Tensor, " sample"] | None) -> Float[Tensor, ""]:
    """`rows.nll()`, a mean over actions, with each row's share multiplied by its weight. The denominator counts every
    action once, so that a weight of 2 is twice the row's loss, as in `Pair.average`."""
    if weight is None:
        return rows.nll()
    return -(rows.sum() * weight).sum() / rows.weight.sum().clamp_min(torch.finfo(rows.weight.dtype).tiny)


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 - exp(x)) for x <= 0, to full precision at both ends.

    Nearer to 0 than the dtype's epsilon the value is that of -epsilon, with slope 0: finite even for a probability of
    exactly 1.
    """
    x = x.clamp_max(-torch.finfo(x.dtype).eps)
    half = math.log(0.5)
    is_near = x > half
    # each branch sees only what it is accurate for: what is not taken must not spoil the gradient either
    near, far = x.masked_fill(~is_near, half), x.masked_fill(is_near, half)
    return torch.where(is_near, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def capped_exp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(x), which never overflows: beyond the cap value and slope stay those at the cap, so that the direction of the
    gradient is kept.

    The cap (66 in fp32, 687 in float64) leaves a factor of 2^32 for beta, lengths and sums over a batch.
    """
    cap = math.log(torch.finfo(x.dtype).max) - 32 * math.log(2)
    return torch.exp(x.detach().clamp_max(cap) + (x - x.detach()))


def preference_metrics(
    policy: Pair, chosen_rewards: Float[Tensor, " pair"], rejected_rewards: Float[Tensor, " pair"]
) -> dict[str, Tensor]:
    """Implicit rewards and log-probs, averaged over the pairs; a tie counts half in the accuracy."""
    margins = (chosen_rewards - rejected_rewards).detach()
    return {
        "rewards/chosen": chosen_rewards.detach().mean(),
        "rewards/rejected": rejected_rewards.detach().mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (0.5 * (1 + torch.sign(margins))).mean(),
        "logps/chosen": policy.chosen.sum().detach().mean(),
        "logps/rejected": policy.rejected.sum().detach().mean(),
    }
