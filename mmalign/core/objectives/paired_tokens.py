"""Objectives on pairs that count tokens in their own way: per token, beyond a length, or by how sure the policy is.

Symbols as in `paired`: c, r the log-ratios of chosen and rejected, z = beta (c - r), S the sum of the policy's
log-probs, |y| the length, l_t one log-prob. A per-token weight that comes with the data is the `weight` of `LogProbs`,
and every objective reads it.
Refused: parameters out of range.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.core.objectives.common import (
    Result,
    capped_exp,
    check,
    check_beta,
    log_ratios,
    mean_log_ratios,
    preference_metrics,
)
from mmalign.core.types import LogProbs, Pair


def ln_dpo(policy: Pair, reference: Pair, *, beta: float = 2.0) -> Result:
    """Length-normalised DPO: the log-ratio per token, so that long answers do not weigh more.

        L = -log sigma(beta (c/|y_w| - r/|y_l|))

    beta must be much larger than in dpo. ln 2 where policy and reference agree.

    Lambert et al. 2024, Tulu 3, Eq. 6 (arXiv 2411.15124)
    """
    check_beta(beta)
    chosen, rejected = mean_log_ratios(policy, reference)
    loss = -logsigmoid(beta * (chosen - rejected))
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def ld_dpo(policy: Pair, reference: Pair, *, beta: float = 0.1, alpha: float = 0.5) -> Result:
    """Length-desensitised DPO: tokens that the longer answer has more than the shorter one count less.

        L = -log sigma(z),  with c = sum_t a_t (l_t - l_ref,t), r alike
        a_t = 1 for the first min(|y_w|, |y_l|) tokens of each answer, alpha beyond

    Counted are the tokens whose weight is not 0, in their order; policy and reference alike. alpha = 1 is dpo. With one
    action per sample, as on a diffusion model, it is dpo for every alpha. ln 2 where policy and reference agree.

    Liu et al. 2024 (arXiv 2409.06411)
    """
    check_beta(beta)
    check("alpha", alpha, 0 <= alpha <= 1, "a number in [0, 1]")
    shared = torch.minimum(_count(policy.chosen)[:, -1:], _count(policy.rejected)[:, -1:])
    discounted = [
        Pair(_discount(sides.chosen, shared, alpha), _discount(sides.rejected, shared, alpha))
        for sides in (policy, reference)
    ]
    chosen, rejected = log_ratios(*discounted)
    loss = -logsigmoid(beta * (chosen - rejected))
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def wpo(policy: Pair, reference: Pair, *, beta: float = 0.1) -> Result:
    """DPO in which a pair counts as much as it looks like the policy's own samples.

        L = -w(y_w) w(y_l) log sigma(z),  w(y) = exp(mean_t (l_t - log sum_v pi(v)^2))

    The weights carry no gradient. Where the log-probs come without `log_collision`, the sum over the vocabulary is
    taken as 1, and w is the geometric mean of the token probabilities. The product is not clamped.

    Zhou et al. 2024, Eq. 2 (arXiv 2406.11827)
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy, reference)
    weight = capped_exp(_log_likeness(policy.chosen) + _log_likeness(policy.rejected))
    loss = -weight * logsigmoid(beta * (chosen - rejected))
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def rpo(policy: Pair, reference: Pair, *, beta: float = 0.1, eta: float = 0.005, sft_reduction: str = "sum") -> Result:
    """DPO that also imitates the chosen sample, against over-optimization.

        L = -log sigma(z) - eta beta S(y_w)
        sft_reduction: mean    S(y_w)/|y_w| in the place of S(y_w)

    The default eta belongs to sums; with token means it must be larger. eta = 0 is dpo.

    Liu et al. 2024 (arXiv 2405.16436)
    """
    check_beta(beta)
    check("eta", eta, 0 <= eta < math.inf, "a number, 0 or above")
    check("sft_reduction", sft_reduction, sft_reduction in ("sum", "mean"), "sum or mean")
    chosen, rejected = log_ratios(policy, reference)
    imitated = policy.chosen.sum() if sft_reduction == "sum" else policy.chosen.mean()
    loss = -logsigmoid(beta * (chosen - rejected)) - eta * beta * imitated
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def _count(rows: LogProbs) -> Float[Tensor, "sample action"]:
    """How many actions count up to and with each one."""
    return (rows.weight != 0).to(rows.weight.dtype).cumsum(-1)


def _discount(rows: LogProbs, shared: Float[Tensor, "sample 1"], alpha: float) -> LogProbs:
    return LogProbs(rows.values, torch.where(_count(rows) > shared, alpha * rows.weight, rows.weight))


def _log_likeness(rows: LogProbs) -> Float[Tensor, " sample"]:
    """mean_t (l_t - log sum_v pi(v)^2), without gradient."""
    rows = rows.detach()
    if rows.log_collision is None:
        return rows.mean()
    return LogProbs(rows.values - rows.log_collision.to(rows.values.dtype), rows.weight).mean()
