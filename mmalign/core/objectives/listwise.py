"""Objectives on groups of scored samples: several answers to one prompt, better ones with a higher score.

Symbols of the papers and their names here:

    psi_i      score of a sample            s_i = beta (log pi(y_i|x) - log pi_ref(y_i|x))     its reward
    `group`    one integer per sample: samples with the same one answer the same prompt

Groups may differ in size, and their rows may come in any order. A loss is the mean over groups of two samples or more;
a group of one says nothing, is left out and counted in the metric `single_groups`. A sample whose score is NaN counts
as absent. In the metrics, chosen is the best-scored sample of a group, rejected the worst.
Refused: parameters out of range.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.core.objectives.common import Result, check_beta, log_ratio
from mmalign.core.types import LogProbs


def lipo_lambda(
    policy: LogProbs,
    reference: LogProbs,
    score: Float[Tensor, " sample"],
    group: Int[Tensor, " sample"],
    *,
    beta: float = 0.1,
) -> Result:
    """Listwise preference optimization: all pairs of a list, those most that spoil its ranking the most.

        L = -sum over psi_i > psi_j of d_ij log sigma(s_i - s_j)
        d_ij = |2^psi_i - 2^psi_j| |1/log(1 + tau_i) - 1/log(1 + tau_j)|, without gradient

    tau is the rank by s in the group, 1 for the highest; among equal s the higher score ranks first, so that the order
    of rows does not matter. The loss scales with 2^psi: scores belong into a range of about 0 to 5, the paper's are in
    [0, 1]. Beyond 96 in fp32 (992 in float64) a score counts as that number, so that the weights stay finite. 0 where
    all scores are equal. No published code: natural logarithms, a sum over the pairs and a mean over lists are the
    reading of this project.

    Liu et al. 2024 (arXiv 2402.01878)
    """
    check_beta(beta)
    rewards = _rewards(policy, reference, score, beta)
    score = score.to(rewards.dtype)
    same = _same(score, group)
    gain = torch.exp2(score.clamp_max(math.log2(torch.finfo(rewards.dtype).max) - 32))
    ahead = _ahead(rewards.detach(), score) & same
    discount = 1 / torch.log1p(1.0 + ahead.sum(-1).to(rewards.dtype))
    importance = (gain[:, None] - gain).abs() * (discount[:, None] - discount).abs()
    importance = torch.where(same & (score[:, None] > score), importance, 0.0)
    loss = -(importance * logsigmoid(rewards[:, None] - rewards)).sum()
    return loss / _groups(same).clamp_min(1), _metrics(policy, rewards, score, group)


def plackett_luce(
    policy: LogProbs,
    reference: LogProbs,
    score: Float[Tensor, " sample"],
    group: Int[Tensor, " sample"],
    *,
    beta: float = 0.1,
) -> Result:
    """The likelihood of a whole ranking: the best is drawn first, then the best of what remains.

        L = -sum_i log [exp(s_i) / (exp(s_i) + sum over psi_j < psi_i of exp(s_j))]

    Without ties this is the Plackett-Luce model, and for two samples it is dpo. Samples with equal scores are never
    compared with one another: each meets the samples with lower scores only. 0 where all scores are equal. The sum of
    log (number of samples that remain) where policy and reference agree.

    Rafailov et al. 2023, Appendix A.3 (arXiv 2305.18290)
    """
    check_beta(beta)
    rewards = _rewards(policy, reference, score, beta)
    same = _same(score, group)
    itself = torch.eye(len(score), dtype=torch.bool, device=score.device)
    rivals = (same & (score[:, None] > score)) | itself
    remaining = rewards.expand(len(rewards), -1).masked_fill(~rivals, -math.inf).logsumexp(-1)
    loss = (remaining - rewards).sum()
    return loss / _groups(same).clamp_min(1), _metrics(policy, rewards, score, group)


def best_of_n(
    policy: LogProbs,
    reference: LogProbs | None,
    score: Float[Tensor, " sample"],
    group: Int[Tensor, " sample"],
) -> Result:
    """Fine-tuning on the best-scored sample of each group (RAFT, best of n).

        L = -sum m l / sum m over the best samples (a mean over actions, not a mean of means)

    Of equal scores the first row is taken. The reference is ignored and may be None. The rewards of the metrics are the
    log-probs.

    Dong et al. 2023 (arXiv 2304.06767)
    """
    same = _same(score, group)
    best = _first_best(score, same) & (same.sum(-1) > 1)
    # rows of weight 0 are never touched, whatever they hold
    loss = LogProbs(policy.values, policy.weight * best[:, None].to(policy.weight.dtype)).nll()
    return loss, _metrics(policy, policy.sum(), score, group)


def _rewards(
    policy: LogProbs, reference: LogProbs, score: Float[Tensor, " sample"], beta: float
) -> Float[Tensor, " sample"]:
    """s; 0 for samples without a score, so that nothing of theirs gets into the gradient of the others."""
    return beta * log_ratio(policy, reference).masked_fill(score.isnan(), 0.0)


def _same(score: Float[Tensor, " sample"], group: Int[Tensor, " sample"]) -> Bool[Tensor, "sample sample"]:
    """Which samples are in one group, both with a score."""
    known = ~score.isnan()
    return (group[:, None] == group) & known[:, None] & known


def _ahead(rewards: Float[Tensor, " sample"], score: Float[Tensor, " sample"]) -> Bool[Tensor, "sample sample"]:
    """Which samples (columns) rank above which (rows): by reward, then by score, then by row."""
    row = torch.arange(len(score), device=score.device)
    found = row < row[:, None]
    for key in (score, rewards):
        found = (key > key[:, None]) | ((key == key[:, None]) & found)
    return found


def _first_best(score: Float[Tensor, " sample"], same: Bool[Tensor, "sample sample"]) -> Bool[Tensor, " sample"]:
    """The first row of the highest score of each group."""
    return same.diagonal() & ~(_ahead(score, score) & same).any(-1)


def _groups(same: Bool[Tensor, "sample sample"]) -> Int[Tensor, ""]:
    """How many groups have two samples or more: each is counted at its first row."""
    return ((same.sum(-1) > 1) & ~same.tril(-1).any(-1)).sum()


def _metrics(
    policy: LogProbs,
    rewards: Float[Tensor, " sample"],
    score: Float[Tensor, " sample"],
    group: Int[Tensor, " sample"],
) -> dict[str, Tensor]:
    same = _same(score, group)
    listed = same.sum(-1) > 1
    best, worst = (_first_best(key, same) & listed for key in (score, -score))
    rewards, log_probs = rewards.detach(), policy.sum().detach()

    def average(rows: Bool[Tensor, " sample"], values: Float[Tensor, " sample"]) -> Float[Tensor, ""]:
        return torch.where(rows, values, 0.0).sum() / _groups(same).clamp_min(1)

    # each best sample looks up the worst one of its group
    margin = rewards - torch.where(same & worst, rewards, 0.0).sum(-1)
    return {
        "rewards/chosen": average(best, rewards),
        "rewards/rejected": average(worst, rewards),
        "rewards/margins": average(best, margin),
        "rewards/accuracies": average(best, 0.5 * (1 + torch.sign(margin))),
        "logps/chosen": average(best, log_probs),
        "logps/rejected": average(worst, log_probs),
        "single_groups": (same.sum(-1) == 1).sum().to(rewards.dtype),
    }


LISTWISE: dict[str, Callable[..., Result]] = {
    "lipo_lambda": lipo_lambda,
    "plackett_luce": plackett_luce,
    "best_of_n": best_of_n,
}
LISTWISE_REFERENCE_FREE = frozenset({"best_of_n"})
