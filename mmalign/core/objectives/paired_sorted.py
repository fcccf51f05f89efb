"""Objectives on pairs that compare distributions: what is compared are the sorted values of a whole batch.

Symbols as in `paired`: c, r the log-ratios of chosen and rejected, S_w, S_l the sums of the policy's log-probs.
Refused: parameters out of range.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.core.objectives.common import Result, check_beta, log_ratios, preference_metrics
from mmalign.core.types import Pair


def aot(policy: Pair, reference: Pair, *, beta: float = 0.1) -> Result:
    """Alignment via optimal transport: the policy's margins dominate the reference's as a distribution.

        L = -log sigma(beta (sort(S_w - S_l) - sort(S_ref,w - S_ref,l)))

    Not separable: the sort runs over the batch, so the loss is defined on all pairs together. A term belongs to the
    pair whose margin of the policy stands there, and takes its weight; pairs of weight 0 are not sorted in. With a
    single pair this is dpo. ln 2 where policy and reference agree.

    Melnyk et al. 2024 (arXiv 2406.05882)
    """
    check_beta(beta)
    margins = policy.chosen.sum() - policy.rejected.sum()
    anchors = (reference.chosen.sum() - reference.rejected.sum()).detach()
    chosen, rejected = log_ratios(policy, reference)
    loss = _rank_by_rank(policy, margins, anchors, beta)
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def aot_unpaired(policy: Pair, reference: Pair, *, beta: float = 0.1) -> Result:
    """Alignment via optimal transport without pairs: chosen log-ratios dominate rejected ones as a distribution.

        L = -log sigma(beta (sort(c) - sort(r)))

    Not separable: the sort runs over the batch, so the loss is defined on all pairs together. Which rejected sample
    came with which chosen one does not matter. A term belongs to the pair whose c stands there, and takes its weight;
    pairs of weight 0 are not sorted in. With a single pair this is dpo. ln 2 where policy and reference agree.

    Melnyk et al. 2024 (arXiv 2406.05882)
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy, reference)
    loss = _rank_by_rank(policy, chosen, rejected, beta)
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def _rank_by_rank(
    policy: Pair, upper: Float[Tensor, " pair"], lower: Float[Tensor, " pair"], beta: float
) -> Float[Tensor, " pair"]:
    """-log sigma of what separates the k-th of `upper` from the k-th of `lower`, in the row of the k-th of `upper`."""
    counted = torch.ones_like(upper) if policy.weight is None else policy.weight
    rows = counted.nonzero().squeeze(-1)
    ranked, order = upper[rows].sort(stable=True)
    terms = -logsigmoid(beta * (ranked - lower[rows].sort().values))
    return torch.zeros_like(upper).index_copy(0, rows[order], terms)
