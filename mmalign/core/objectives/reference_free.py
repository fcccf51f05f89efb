"""Objectives on pairs that need no reference, and plain fine-tuning on the chosen samples.

Symbols as in `paired`: S_w, S_l the sums of the policy's log-probs, |y| the length. NLL_w is the mean over all actions
of all chosen samples handed in, not a mean of means: with samples of different lengths it depends a little on which
rows come together. Each sample's share of it is multiplied by the weight of its pair. A reference is ignored.
Refused: parameters out of range.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.core.objectives.common import Result, check, check_beta, log1mexp, preference_metrics, weighted_nll
from mmalign.core.types import LogProbs, Pair


def cpo(policy: Pair, reference: Pair | None = None, *, beta: float = 0.1, alpha: float = 1.0) -> Result:
    """Contrastive preference optimization: DPO with a uniform reference, and fine-tuning on the chosen sample.

        L = -log sigma(beta (S_w - S_l)) + alpha NLL_w

    The reference is ignored and may be None. The rewards of the metrics are beta S.

    Xu et al. 2024 (arXiv 2401.08417)
    """
    check_beta(beta)
    _check_share("alpha", alpha)
    chosen, rejected = beta * policy.chosen.sum(), beta * policy.rejected.sum()
    loss = policy.average(-logsigmoid(chosen - rejected)) + alpha * weighted_nll(policy.chosen, policy.weight)
    return loss, preference_metrics(policy, chosen, rejected)


def simpo(policy: Pair, reference: Pair | None = None, *, beta: float = 2.5, gamma_beta_ratio: float = 0.55) -> Result:
    """Simple preference optimization: log-probs per token, with a margin that the chosen sample must win by.

        L = -log sigma(beta (S_w/|y_w| - S_l/|y_l|) - gamma),  gamma = gamma_beta_ratio x beta

    The reference is ignored and may be None. The rewards of the metrics are beta S/|y|.

    Meng et al. 2024, Eq. 6 (arXiv 2405.14734)
    """
    check_beta(beta)
    _check_share("gamma_beta_ratio", gamma_beta_ratio)
    chosen, rejected = beta * policy.chosen.mean(), beta * policy.rejected.mean()
    loss = -logsigmoid(chosen - rejected - gamma_beta_ratio * beta)
    return policy.average(loss), preference_metrics(policy, chosen, rejected)


def orpo(policy: Pair, reference: Pair | None = None, *, penalty: float = 0.1) -> Result:
    """Odds-ratio preference optimization: fine-tuning on the chosen sample with a penalty on the odds of the rejected.

        L = NLL_w - penalty log sigma(logit p_w - logit p_l)
        p = exp(S/|y|),  logit p = log p - log(1 - p)

    penalty is the paper's lambda. NLL over the answer only, never over the prompt. Needs log-probs <= 0; p = 1 is held
    an epsilon below 1. The reference is ignored and may be None. The rewards of the metrics are the log-odds.

    Hong et al. 2024, Eq. 6 (arXiv 2403.07691)
    """
    _check_share("penalty", penalty)
    chosen, rejected = _log_odds(policy.chosen), _log_odds(policy.rejected)
    loss = weighted_nll(policy.chosen, policy.weight) + penalty * policy.average(-logsigmoid(chosen - rejected))
    return loss, preference_metrics(policy, chosen, rejected)


def tpo(
    policy: Pair,
    reference: Pair | None = None,
    gold: LogProbs | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> Result:
    """Triple preference optimization: a preference, and fine-tuning on a third, gold answer.

        L = -log sigma(beta (S_w - S_l)) + alpha NLL(y_gold)

    `gold` holds the log-probs of the gold answer of each pair; without it the chosen samples stand in, which is cpo.
    The reference is ignored and may be None. The rewards of the metrics are beta S.

    Saeidi et al. 2024 (arXiv 2405.16681)
    """
    check_beta(beta)
    _check_share("alpha", alpha)
    chosen, rejected = beta * policy.chosen.sum(), beta * policy.rejected.sum()
    imitated = weighted_nll(policy.chosen if gold is None else gold, policy.weight)
    loss = policy.average(-logsigmoid(chosen - rejected)) + alpha * imitated
    return loss, preference_metrics(policy, chosen, rejected)


def asft(policy: Pair, reference: Pair | None = None, *, penalty: float = 0.1) -> Result:
    """Aligned supervised fine-tuning: the absolute likelihood of both samples instead of their difference.

        L = NLL_w + penalty [-log p_w - log(1 - p_l)],  p = exp(S/|y|)

    penalty is the paper's lambda. Since sigma(logit p) = p, the bracket is a logistic loss on the odds of each side. p
    from the mean log-prob is the reading of this project. Needs log-probs <= 0; p = 1 is held an epsilon below 1. The
    reference is ignored and may be None. The rewards of the metrics are the log-odds.

    Wang et al. 2024 (arXiv 2409.10571)
    """
    _check_share("penalty", penalty)
    aligned = -policy.chosen.mean() - log1mexp(policy.rejected.mean())
    loss = weighted_nll(policy.chosen, policy.weight) + penalty * policy.average(aligned)
    return loss, preference_metrics(policy, _log_odds(policy.chosen), _log_odds(policy.rejected))


def sft(policy: Pair, reference: Pair | None = None) -> Result:
    """Plain fine-tuning on the chosen samples: the baseline that every objective must beat.

        L = -sum m l / sum m over the micro-batch (a mean over actions, not a mean of means)

    m is the weight of an action. On a diffusion model this is half the weighted denoising error. Needs no rejected
    samples: liked-only records are enough. The reference is ignored and may be None.

    Maximum likelihood; as the third term of MPO: Wang et al. 2024 (arXiv 2411.10442)
    """
    return weighted_nll(policy.chosen, policy.weight), {"logps/chosen": policy.chosen.sum().detach().mean()}


def _log_odds(rows: LogProbs) -> Float[Tensor, " sample"]:
    mean = rows.mean()
    return mean - log1mexp(mean)


def _check_share(name: str, value: float) -> None:
    check(name, value, 0 <= value < math.inf, "a number, 0 or above")
