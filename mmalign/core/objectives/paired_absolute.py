"""Objectives on pairs that look at each side by itself, so that the chosen sample cannot sink with the rejected one.

Symbols as in `paired`: c, r the log-ratios of chosen and rejected, D = c - r, z = beta D.
Refused: parameters out of range.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.core.objectives.common import Result, check_beta, log_ratios, preference_metrics
from mmalign.core.types import Pair


def nca(policy: Pair, reference: Pair, *, beta: float = 0.1) -> Result:
    """Noise-contrastive alignment: the absolute likelihood of the chosen sample is kept from falling.

        L = -log sigma(beta c) - 1/2 log sigma(-beta c) - 1/2 log sigma(-beta r)

    For two samples with the rewards 1 and 0. 2 ln 2 where policy and reference agree.

    Chen et al. 2024 (arXiv 2402.05369)
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy, reference)
    chosen, rejected = beta * chosen, beta * rejected
    loss = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return policy.average(loss), preference_metrics(policy, chosen, rejected)


def bco_pair(policy: Pair, reference: Pair, shift: float | Float[Tensor, ""] = 0.0, *, beta: float = 0.1) -> Result:
    """Binary classifier optimization on pairs: chosen above, rejected below a running mean of rewards.

        L = -log sigma(beta c - delta) - log sigma(-(beta r - delta))

    delta (`shift`) is the mean of the rewards beta c and beta r seen so far, without gradient; 0 switches it off.
    2 ln 2 where policy and reference agree and delta is 0.

    Jung et al. 2024 (arXiv 2404.04656)
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy, reference)
    chosen, rejected = beta * chosen, beta * rejected
    delta = torch.as_tensor(shift, dtype=chosen.dtype, device=chosen.device).detach()
    loss = -logsigmoid(chosen - delta) - logsigmoid(delta - rejected)
    return policy.average(loss), preference_metrics(policy, chosen, rejected)


def sppo(policy: Pair, reference: Pair, *, beta: float = 0.1) -> Result:
    """Self-play preference optimization: each log-ratio is regressed on its own target.

        L = (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2

    With hard labels: the chosen sample wins with probability 1, the rejected one with 0. 1/(2 beta) is the paper's
    eta/2. 1/(2 beta^2) where policy and reference agree.

    Wu et al. 2024 (arXiv 2405.00675)
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy, reference)
    target = 1 / (2 * beta)
    loss = (chosen - target).square() + (rejected + target).square()
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def apo_zero(policy: Pair, reference: Pair, *, beta: float = 0.1) -> Result:
    """Anchored preference optimization for chosen samples that are better than what the model writes: up, and down.

        L = 1 - sigma(beta c) + sigma(beta r)

    1 where policy and reference agree.

    D'Oosterlinck et al. 2024, Eq. 7 (arXiv 2408.06266)
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy, reference)
    chosen, rejected = beta * chosen, beta * rejected
    loss = torch.sigmoid(-chosen) + torch.sigmoid(rejected)
    return policy.average(loss), preference_metrics(policy, chosen, rejected)


def apo_down(policy: Pair, reference: Pair, *, beta: float = 0.1) -> Result:
    """Anchored preference optimization for chosen samples that are worse than what the model writes: both go down.

        L = sigma(beta c) + 1 - sigma(z)

    The chosen sample goes down on purpose, the rejected one faster. 1 where policy and reference agree.

    D'Oosterlinck et al. 2024, Eq. 8 (arXiv 2408.06266)
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy, reference)
    chosen, rejected = beta * chosen, beta * rejected
    loss = torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
    return policy.average(loss), preference_metrics(policy, chosen, rejected)
