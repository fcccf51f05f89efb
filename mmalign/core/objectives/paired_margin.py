"""Objectives on pairs that bend the margin: other functions of z, or of its two sides, in the place of -log sigma(z).

Symbols as in `paired`: c, r the log-ratios of chosen and rejected, D = c - r, z = beta D.
Refused: parameters out of range.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mmalign.core.objectives.common import (
    Result,
    capped_exp,
    check,
    check_beta,
    log_ratios,
    mean_log_ratios,
    preference_metrics,
)
from mmalign.core.types import Pair


def hinge(policy: Pair, reference: Pair, *, beta: float = 0.1) -> Result:
    """Hinge loss on the margin.

        L = max(0, 1 - z)

    1 where policy and reference agree.

    Zhao et al. 2023, SLiC-HF, Eq. 1 (arXiv 2305.10425), with the log-ratio of RSO, Liu et al. 2023 (arXiv 2309.06657)
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy, reference)
    loss = relu(1 - beta * (chosen - rejected))
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def ipo(policy: Pair, reference: Pair, *, beta: float = 0.1, normalize: bool = False) -> Result:
    """Identity preference optimization: the margin is regressed on a constant, so that it cannot grow without bound.

        L = (D - 1/(2 beta))^2
        normalize: true    D = c/|y_w| - r/|y_l|

    The paper sums over tokens. `normalize` divides each log-ratio by the length of its sample, as one widespread
    library does. 1/(4 beta^2) where policy and reference agree.

    Azar et al. 2023, Eq. 17 (arXiv 2310.12036)
    """
    check_beta(beta)
    chosen, rejected = mean_log_ratios(policy, reference) if normalize else log_ratios(policy, reference)
    loss = (chosen - rejected - 1 / (2 * beta)).square()
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def exo(policy: Pair, reference: Pair, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Result:
    """Efficient exact optimization: the reverse KL between the preference of the policy and the smoothed label.

        L = sigma(z) [log sigma(z) - log(1-e)] + sigma(-z) [log sigma(-z) - log e],  e = label_smoothing

    Least where sigma(z) = 1-e, and 0 there. e is never 0: its logarithm is in the loss.
    -ln 2 - ln(e (1-e))/2 where policy and reference agree.

    Ji et al. 2024, Eq. 16 (arXiv 2402.00856)
    """
    check_beta(beta)
    check("label_smoothing", label_smoothing, 0 < label_smoothing < 0.5, "a number in (0, 0.5); 0 has no logarithm")
    chosen, rejected = log_ratios(policy, reference)
    logit = beta * (chosen - rejected)
    right, wrong = logsigmoid(logit), logsigmoid(-logit)
    loss = right.exp() * (right - math.log1p(-label_smoothing)) + wrong.exp() * (wrong - math.log(label_smoothing))
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def discopop(policy: Pair, reference: Pair, *, beta: float = 0.1, tau: float = 0.05) -> Result:
    """A loss that a language model discovered: logistic for pairs on the wrong side, exponential on the right one.

        L = (1-k) (-log sigma(z)) + k exp(-z),  k = sigma(z/tau)

    The gradient flows through k too. Not convex: at z = 0 the slope is (1 - ln 2)/(4 tau) - 3/4, positive for
    tau < 0.102. A pair on which policy and reference agree is then first pushed the wrong way, into a dip (z = -0.12
    for tau 0.05); only beyond a hump (z = 0.07) does it rise. (1 + ln 2)/2 where policy and reference agree.

    Lu et al. 2024, Eq. 5 (arXiv 2406.08414)
    """
    check_beta(beta)
    check("tau", tau, 0 < tau < math.inf, "a number above 0")
    chosen, rejected = log_ratios(policy, reference)
    logit = beta * (chosen - rejected)
    # k exp(-z) as one exponential: far on the wrong side k is 0 where exp(-z) has long overflowed
    exponential = capped_exp(logsigmoid(logit / tau) - logit)
    logistic = -logsigmoid(logit)
    loss = logsigmoid(-logit / tau).exp() * logistic + exponential
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def f_dpo(
    policy: Pair, reference: Pair, *, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float = 0.5
) -> Result:
    """DPO under another divergence from the reference than the reverse KL.

        L = -log sigma(beta (f'(c) - f'(r)))
        reverse_kl: f'(c) = c               forward_kl: f'(c) = -exp(-c)
        js:         f'(c) = log sigma(c)    alpha:      f'(c) = exp((alpha-1) c) / (alpha-1)

    f' as a function of the log-ratio, without constants, which cancel. reverse_kl is dpo; alpha -> 1 is reverse_kl,
    alpha = 0 is forward_kl. The paper's own alpha is 1 - alpha. Exponentials that the dtype cannot hold are capped
    (beyond 66 in fp32, 687 in float64) with the slope at the cap. The rewards of the metrics are beta x log-ratio.
    ln 2 where policy and reference agree.

    Wang et al. 2023 (arXiv 2309.16240)
    """
    check_beta(beta)
    known = ("reverse_kl", "forward_kl", "js", "alpha")
    check("divergence", divergence, divergence in known, f"one of {', '.join(known)}")
    check("alpha", alpha, math.isfinite(alpha) and alpha != 1, "a number other than 1; 1 is divergence: reverse_kl")
    chosen, rejected = log_ratios(policy, reference)
    score = _divergence_score(chosen, divergence, alpha) - _divergence_score(rejected, divergence, alpha)
    loss = -logsigmoid(beta * score)
    return policy.average(loss), preference_metrics(policy, beta * chosen, beta * rejected)


def _divergence_score(log_ratio: Float[Tensor, " pair"], divergence: str, alpha: float) -> Float[Tensor, " pair"]:
    if divergence == "forward_kl":
        return -capped_exp(-log_ratio)
    if divergence == "js":
        return logsigmoid(log_ratio)
    if divergence == "alpha":
        return capped_exp((alpha - 1) * log_ratio) / (alpha - 1)
    return log_ratio
