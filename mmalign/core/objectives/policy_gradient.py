"""Objectives on the policy's own rollouts: rows of arguments of one clipped surrogate, and what is not one.

Symbols as in `surrogate`: rho the ratio of policy and old policy, A the advantage, x = l_ref - l, |y| the length.
`old` holds the log-probs that were kept when the rollout was sampled; on the first pass over it the ratio is exactly 1.
`mmalign.core.advantage` has what each row wants as advantage. A reference is needed for a KL term only.
Refused: parameters out of range, shapes that do not fit, D3PO on an odd number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.core.objectives.common import Result, check, check_beta
from mmalign.core.objectives.surrogate import action_log_ratio, action_mean, ratio_metrics, spread, surrogate
from mmalign.core.types import LogProbs

Advantage = Float[Tensor, " sample"] | Float[Tensor, "sample action"]


def ppo(
    policy: LogProbs,
    old: LogProbs,
    advantage: Advantage,
    reference: LogProbs | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_beta: float = 0.0,
    kl_estimator: str = "k3",
) -> Result:
    """Proximal policy optimization: steps that take the ratio out of a band around 1 are not rewarded.

        L = mean over all actions of -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_beta KL

    A comes from generalised advantage estimation with a value model, which learns by `clipped_value_loss`. In RLHF the
    KL penalty is part of the dense reward, hence kl_beta 0. Means run over real actions only.

    Schulman et al. 2017, Eq. 7 (arXiv 1707.06347)
    """
    return surrogate(
        policy,
        old,
        advantage,
        reference,
        clip_low=clip_low,
        clip_high=clip_high,
        aggregate="token_mean",
        kl_beta=kl_beta,
        kl_estimator=kl_estimator,
    )


def grpo(
    policy: LogProbs,
    old: LogProbs,
    advantage: Advantage,
    reference: LogProbs | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_beta: float = 0.04,
    kl_estimator: str = "k3",
) -> Result:
    """Group-relative policy optimization: answers to one prompt are compared with one another, without a value model.

        L = mean over sequences of (1/|y|) sum_t [-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_beta KL]
        KL = exp(x) - x - 1

    A = (r - mean_group)/(std_group + 1e-4), `normalise`. Without a reference there is no KL term. Flow-GRPO on the
    transitions of a sampler is this too.

    Shao et al. 2024, Eq. 3 and 4 (arXiv 2402.03300)
    """
    return surrogate(
        policy,
        old,
        advantage,
        reference,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_beta=kl_beta,
        kl_estimator=kl_estimator,
    )


def dr_grpo(
    policy: LogProbs,
    old: LogProbs,
    advantage: Advantage,
    reference: LogProbs | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_length: float = 1.0,
    kl_beta: float = 0.0,
    kl_estimator: str = "k3",
) -> Result:
    """GRPO done right: no division by the length of an answer, none by the spread of the rewards.

        L = mean over sequences of (1/max_length) sum_t [-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
                                                         + kl_beta KL]

    A = r - mean_group, `centre`. The paper's equation is a sum, max_length 1; its code divides by the longest answer
    that may be generated, which only changes the learning rate.

    Liu et al. 2025 (arXiv 2503.20783)
    """
    return surrogate(
        policy,
        old,
        advantage,
        reference,
        clip_low=clip_low,
        clip_high=clip_high,
        aggregate="constant",
        max_length=max_length,
        kl_beta=kl_beta,
        kl_estimator=kl_estimator,
    )


def dapo(
    policy: LogProbs,
    old: LogProbs,
    advantage: Advantage,
    reference: LogProbs | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl_beta: float = 0.0,
    kl_estimator: str = "k3",
) -> Result:
    """GRPO with a higher upper clip and every token of the batch alike, so that long answers count by their length.

        L = sum_i sum_t -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) / sum_i |y_i|  (+ kl_beta KL)

    A as in grpo. Its other parts are not in a loss: leave out groups whose rewards are all equal, and lower the reward
    of answers that are too long.

    Yu et al. 2025, Eq. 8 (arXiv 2503.14476)
    """
    return surrogate(
        policy,
        old,
        advantage,
        reference,
        clip_low=clip_low,
        clip_high=clip_high,
        aggregate="token_mean",
        kl_beta=kl_beta,
        kl_estimator=kl_estimator,
    )


def gspo(
    policy: LogProbs,
    old: LogProbs,
    advantage: Advantage,
    reference: LogProbs | None = None,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    kl_beta: float = 0.0,
    kl_estimator: str = "k3",
) -> Result:
    """GRPO with one ratio per answer, the geometric mean of those of its tokens, and a much narrower clip.

        L = mean over sequences of -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)  (+ kl_beta KL)
        rho = (pi(y)/pi_old(y))^(1/|y|)

    A as in grpo. With one advantage per action, all actions of a sequence share rho.

    Zheng et al. 2025, Eq. 5 and 7 (arXiv 2507.18071)
    """
    return surrogate(
        policy,
        old,
        advantage,
        reference,
        clip_low=clip_low,
        clip_high=clip_high,
        ratio="sequence",
        kl_beta=kl_beta,
        kl_estimator=kl_estimator,
    )


def rloo(
    policy: LogProbs,
    old: LogProbs,
    advantage: Float[Tensor, " sample"],
    reference: LogProbs | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Result:
    """REINFORCE with the mean reward of the other answers as baseline; a whole answer is one action.

        L = mean over sequences of -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),  rho = pi(y)/pi_old(y)

    A is `leave_one_out` of the reward minus beta sum(l_old - l_ref), `with_kl_penalty`: the KL is in the reward, and
    the reference here is for the metrics alone. On the first pass the gradient is that of REINFORCE; the paper does not
    clip, published code does, for later passes. One advantage per sample.

    Ahmadian et al. 2024 (arXiv 2402.14740)
    """
    _check_per_sample(advantage, "rloo")
    policy, old = _as_one_action(policy), _as_one_action(old)
    reference = None if reference is None else _as_one_action(reference)
    return surrogate(policy, old, advantage, reference, clip_low=clip_low, clip_high=clip_high)


def ddpo(
    policy: LogProbs,
    old: LogProbs,
    advantage: Advantage,
    reference: LogProbs | None = None,
    *,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    advantage_clip: float = 5.0,
    kl_beta: float = 0.0,
    kl_estimator: str = "k3",
) -> Result:
    """PPO on the denoising transitions of a diffusion model, with a very narrow clip.

        L = mean over all transitions of max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))  (+ kl_beta KL)
        A is held between -advantage_clip and advantage_clip

    A is the z-score of the reward per prompt, `per_prompt`. The log-prob of a transition is a mean over latent
    dimensions, for a sum would overflow the ratio; keep it and the latents in fp32.

    Black et al. 2023, Eq. 6 (arXiv 2305.13301)
    """
    check("advantage_clip", advantage_clip, 0 < advantage_clip < math.inf, "a number above 0")
    return surrogate(
        policy,
        old,
        advantage.clamp(-advantage_clip, advantage_clip),
        reference,
        clip_low=clip_low,
        clip_high=clip_high,
        aggregate="token_mean",
        kl_beta=kl_beta,
        kl_estimator=kl_estimator,
    )


def d3po(
    policy: LogProbs,
    old: LogProbs,
    advantage: Float[Tensor, " sample"],
    reference: LogProbs | None = None,
    *,
    beta: float = 0.1,
    clip: float = 0.1,
) -> Result:
    """DPO on each denoising transition of two trajectories that start from the same noise.

        L = mean over pairs and transitions of -log sigma(beta (s_0 log R_0 + s_1 log R_1))
        R = clip(pi(a)/pi_ref(a), 1 - clip, 1 + clip)

    Rows 2i and 2i + 1 are a pair that shares its prompt and x_T. s is the sign of the advantage: +1 for the preferred
    one, -1 for the other; 0 for both is a tie, which teaches nothing. Without a reference the old policy stands in for
    it. A transition counts if it is real in both rows, with the smaller of the two weights. ln 2 where policy and
    reference agree.

    Yang et al. 2023 (arXiv 2311.13231)
    """
    check_beta(beta)
    check("clip", clip, 0 < clip < 1, "a number above 0 and below 1")
    _check_per_sample(advantage, "d3po")
    if len(policy.values) % 2:
        raise ValueError(f"d3po got {len(policy.values)} rows; expected pairs, rows 2i and 2i + 1 sharing their noise")
    log_ratio = action_log_ratio(policy, old if reference is None else reference, "reference")
    held = log_ratio.clamp(math.log1p(-clip), math.log1p(clip))
    signed = spread(advantage.sign(), policy) * held
    loss = -logsigmoid(beta * (signed[0::2] + signed[1::2]))
    both = LogProbs(loss, torch.minimum(policy.weight[0::2], policy.weight[1::2]))
    metrics = ratio_metrics(policy, action_log_ratio(policy, old, "old"))
    metrics["clip_fraction"] = action_mean((held != log_ratio).to(held.dtype), policy)
    return -both.nll(), metrics


def nash_md(
    policy: LogProbs,
    old: LogProbs,
    advantage: Float[Tensor, " sample"],
    reference: LogProbs | None = None,
    *,
    tau: float = 0.01,
) -> Result:
    """Nash learning: the policy learns to be preferred over a mixture of itself and the reference.

        L = -mean over samples of [A - tau (S - S_ref)] S,  A = P(y > y') - 1/2,  the bracket without gradient

    Data: `policy`, `old` and `reference` are log-probs of y, which the policy sampled, summed to S; y' is sampled, one
    token at a time, from softmax(m log pi_ref + (1 - m) log pi), m 1/2, and is needed for the advantage alone: the
    judge's probability that y is preferred to y', minus 1/2. tau holds the policy near the reference; without a
    reference that term is gone. On-policy: one update per rollout, `old` serves the metrics that show it.

    Munos et al. 2023, Section 7 (arXiv 2312.00886)
    """
    check("tau", tau, 0 <= tau < math.inf, "a number, 0 or above")
    _check_per_sample(advantage, "nash_md")
    log_prob = policy.sum()
    gain = advantage.detach().to(log_prob.dtype)
    metrics = ratio_metrics(policy, action_log_ratio(policy, old, "old"))
    if reference is not None:
        drift = log_prob.detach() - reference.sum().detach()
        gain, metrics["kl"] = gain - tau * drift, drift.mean()
    return -(gain * log_prob).mean(), metrics


def clipped_value_loss(
    values: Float[Tensor, "sample action"],
    old_values: Float[Tensor, "sample action"],
    returns: Float[Tensor, "sample action"],
    weight: Float[Tensor, "sample action"],
    *,
    clip: float = 0.2,
) -> Result:
    """What the value model of PPO learns by: squared errors, of which a step beyond the clip is not rewarded.

        L = mean over real actions of 1/2 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)

    Added to the loss of ppo with a coefficient of 0.1. The 1/2 is in here.

    Schulman et al. 2017 (arXiv 1707.06347); the clip is that of its released code
    """
    check("clip", clip, 0 < clip < math.inf, "a number above 0")
    values, old_values, returns = (one.masked_fill(weight == 0, 0.0) for one in (values, old_values, returns))
    old_values, returns = old_values.detach(), returns.detach()
    held = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    error, held_error = (values - returns).square(), (held - returns).square()
    terms = LogProbs(0.5 * torch.maximum(error, held_error), weight)
    clipped = LogProbs((held_error > error).to(weight.dtype), weight)
    return -terms.nll(), {"value_clip_fraction": -clipped.nll()}


def _as_one_action(rows: LogProbs) -> LogProbs:
    """A whole sequence as one action; one without any action does not count."""
    return LogProbs(rows.sum()[:, None], (rows.length() != 0).to(rows.weight.dtype)[:, None])


def _check_per_sample(advantage: Tensor, name: str) -> None:
    if advantage.ndim != 1:
        raise ValueError(f"{name} takes one advantage per sample; got the shape {tuple(advantage.shape)}")


POLICY_GRADIENT: dict[str, Callable[..., Result]] = {
    "surrogate": surrogate,
    "ppo": ppo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "rloo": rloo,
    "ddpo": ddpo,
    "d3po": d3po,
    "nash_md": nash_md,
}
