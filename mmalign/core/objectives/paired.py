"""Objectives on pairs: a chosen and a rejected sample of one prompt.

Symbols of the papers and their names here:

    c = log pi(y_w|x) - log pi_ref(y_w|x)   chosen_log_ratio       S   sum of log-probs of a sample
    r = the same for y_l                    rejected_log_ratio     |y| length: the sum of the weights
    D = c - r                               margin                 z = beta D

Log-probs are summed over actions, losses are averaged over pairs. On a diffusion model, where a log-prob is
-1/2 w(t) x mean squared error, `dpo` is exactly the released Diffusion-DPO loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mmalign.core.types import Pair

Result = tuple[Float[Tensor, ""], dict[str, Tensor]]


def dpo(policy: Pair, reference: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Direct preference optimization.

    L = -(1-e) log sigma(z) - e log sigma(-z),  z = beta (c - r),  e = label_smoothing

    Rafailov et al. 2023, Eq. 7 (arXiv 2305.18290); Wallace et al. 2023, Eq. 14 (arXiv 2311.12908) with the mean over
    latent dimensions and the 1/2 of the released code; label smoothing ("cDPO"): Mitchell 2023. ln 2 where policy and
    reference agree.
    """
    _check("beta", beta, beta > 0, "a number above 0")
    _check("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "a number in [0, 0.5)")
    chosen, rejected = log_ratios(policy, reference)
    logit = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)
    return loss.mean(), preference_metrics(policy, beta * chosen, beta * rejected)


def hinge(policy: Pair, reference: Pair, *, beta: float = 0.1) -> Result:
    """Hinge loss on the margin.

    L = max(0, 1 - z)

    SLiC-HF, Zhao et al. 2023, Eq. 1 (arXiv 2305.10425), with the log-ratio of RSO, Liu et al. 2023 (arXiv 2309.06657).
    """
    _check("beta", beta, beta > 0, "a number above 0")
    chosen, rejected = log_ratios(policy, reference)
    loss = relu(1 - beta * (chosen - rejected))
    return loss.mean(), preference_metrics(policy, beta * chosen, beta * rejected)


def ipo(policy: Pair, reference: Pair, *, beta: float = 0.1, normalize: bool = False) -> Result:
    """Identity preference optimization: the margin is regressed on a constant, so that it cannot grow without bound.

    L = (D - 1/(2 beta))^2

    Azar et al. 2023, Eq. 17 (arXiv 2310.12036), which sums over tokens. `normalize` divides each log-ratio by the
    length of its sample, as one widespread library does.
    """
    _check("beta", beta, beta > 0, "a number above 0")
    chosen, rejected = log_ratios(policy, reference)
    if normalize:
        chosen, rejected = chosen / policy.chosen.length(), rejected / policy.rejected.length()
    loss = (chosen - rejected - 1 / (2 * beta)).square()
    return loss.mean(), preference_metrics(policy, beta * chosen, beta * rejected)


def ln_dpo(policy: Pair, reference: Pair, *, beta: float = 2.0) -> Result:
    """Length-normalised DPO.

    L = -log sigma(beta (c/|y_w| - r/|y_l|))

    Tulu 3, Lambert et al. 2024, Eq. 6 (arXiv 2411.15124). Beta must be much larger than in `dpo`.
    """
    _check("beta", beta, beta > 0, "a number above 0")
    chosen, rejected = log_ratios(policy, reference)
    chosen, rejected = chosen / policy.chosen.length(), rejected / policy.rejected.length()
    loss = -logsigmoid(beta * (chosen - rejected))
    return loss.mean(), preference_metrics(policy, beta * chosen, beta * rejected)


def sft(policy: Pair, reference: Pair | None = None) -> Result:
    """Plain fine-tuning on the chosen samples: the baseline that every objective must beat.

    L = -sum m l / sum m over the micro-batch (a mean over actions, not a mean of means)

    On a diffusion model this is half the weighted denoising error. Needs neither a reference nor rejected samples.
    """
    return policy.chosen.nll(), {"logps/chosen": policy.chosen.sum().detach().mean()}


def log_ratios(policy: Pair, reference: Pair) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """c and r. No gradient flows into the reference."""
    return (
        policy.chosen.sum() - reference.chosen.sum().detach(),
        policy.rejected.sum() - reference.rejected.sum().detach(),
    )


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


def _check(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"objective.{name} is {value}; expected {expected}")


PAIRED: dict[str, Callable[..., Result]] = {
    "dpo": dpo,
    "hinge": hinge,
    "ipo": ipo,
    "ln_dpo": ln_dpo,
    "sft": sft,
}
REFERENCE_FREE = frozenset({"sft"})
# These read only the chosen samples: liked-only records are enough, and rejected samples are never computed.
CHOSEN_ONLY = frozenset({"sft"})
