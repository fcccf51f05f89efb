"""The paired objectives once more, in plain numbers: no tensors, one pair at a time, straight from the formulas."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmalign.core.types import LogProbs, Pair

Token = tuple[float, float, float, float]  # log-prob, that of the reference, weight, log-collision
WITH_NLL = {"cpo", "orpo", "tpo", "asft", "sft"}  # an NLL with a factor of 1 is added to these


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigma(x: float) -> float:
    return math.exp(log_sigma(x))


def logit(log_p: float) -> float:
    return log_p - math.log(-math.expm1(log_p))


@dataclass
class Numbers:
    """The tokens that count, of one pair, and what follows from them."""

    w: list[Token]
    l: list[Token]  # noqa: E741

    def __post_init__(self):
        self.s_w, self.s_l = (sum(t[2] * t[0] for t in side) for side in (self.w, self.l))
        self.ref_w, self.ref_l = (sum(t[2] * t[1] for t in side) for side in (self.w, self.l))
        self.n_w, self.n_l = (sum(t[2] for t in side) for side in (self.w, self.l))
        self.c, self.r = self.s_w - self.ref_w, self.s_l - self.ref_l

    def desensitised(self, alpha: float) -> float:
        shared = min(len(self.w), len(self.l))
        c, r = (
            sum((1 if i < shared else alpha) * t[2] * (t[0] - t[1]) for i, t in enumerate(side))
            for side in (self.w, self.l)
        )
        return c - r

    def likeness(self) -> float:
        w, l = (  # noqa: E741
            sum(t[2] * (t[0] - t[3]) for t in side) / sum(t[2] for t in side) for side in (self.w, self.l)
        )
        return math.exp(w) * math.exp(l)


def numbers_of(policy: Pair, reference: Pair) -> list[Numbers]:
    def side(mine: LogProbs, theirs: LogProbs, row: int) -> list[Token]:
        collision = torch.zeros_like(mine.values) if mine.log_collision is None else mine.log_collision
        columns = (mine.values, theirs.values, mine.weight, collision)
        found = zip(*(column[row].tolist() for column in columns), strict=True)
        return [item for item in found if item[2] != 0]

    return [
        Numbers(side(policy.chosen, reference.chosen, i), side(policy.rejected, reference.rejected, i))
        for i in range(len(policy.chosen.values))
    ]


def f_prime(x: float, divergence: str, alpha: float) -> float:
    if divergence == "alpha":
        return math.exp((alpha - 1) * x) / (alpha - 1)
    return {"reverse_kl": lambda: x, "forward_kl": lambda: -math.exp(-x), "js": lambda: log_sigma(x)}[divergence]()


def exo_term(z: float, e: float) -> float:
    return sigma(z) * (log_sigma(z) - math.log(1 - e)) + sigma(-z) * (log_sigma(-z) - math.log(e))


def discopop_term(z: float, tau: float) -> float:
    k = sigma(z / tau)
    return (1 - k) * -log_sigma(z) + (k * math.exp(-z) if k else 0.0)


def seppo_term(p: Numbers, beta: float, anchor: str) -> float:
    s = 1 if p.c > 0 else (-1 if anchor == "sign" else 0)
    return -log_sigma(beta * (p.c - s * p.r))


PER_PAIR: dict[str, Callable[..., float]] = {
    "dpo": lambda p, beta=0.1, label_smoothing=0.0: (
        -(1 - label_smoothing) * log_sigma(beta * (p.c - p.r)) - label_smoothing * log_sigma(-beta * (p.c - p.r))
    ),
    "robust": lambda p, beta=0.1, label_smoothing=0.1: (
        (-(1 - label_smoothing) * log_sigma(beta * (p.c - p.r)) + label_smoothing * log_sigma(-beta * (p.c - p.r)))
        / (1 - 2 * label_smoothing)
    ),
    "hinge": lambda p, beta=0.1: max(0.0, 1 - beta * (p.c - p.r)),
    "ipo": lambda p, beta=0.1, normalize=False: (
        ((p.c / p.n_w - p.r / p.n_l if normalize else p.c - p.r) - 1 / (2 * beta)) ** 2
    ),
    "exo": lambda p, beta=0.1, label_smoothing=1e-3: exo_term(beta * (p.c - p.r), label_smoothing),
    "nca": lambda p, beta=0.1: -log_sigma(beta * p.c) - 0.5 * log_sigma(-beta * p.c) - 0.5 * log_sigma(-beta * p.r),
    "bco_pair": lambda p, shift=0.0, beta=0.1: -log_sigma(beta * p.c - shift) - log_sigma(-(beta * p.r - shift)),
    "sppo": lambda p, beta=0.1: (p.c - 1 / (2 * beta)) ** 2 + (p.r + 1 / (2 * beta)) ** 2,
    "apo_zero": lambda p, beta=0.1: sigma(-beta * p.c) + sigma(beta * p.r),
    "apo_down": lambda p, beta=0.1: sigma(beta * p.c) + sigma(-beta * (p.c - p.r)),
    "discopop": lambda p, beta=0.1, tau=0.05: discopop_term(beta * (p.c - p.r), tau),
    "ln_dpo": lambda p, beta=2.0: -log_sigma(beta * (p.c / p.n_w - p.r / p.n_l)),
    "ld_dpo": lambda p, beta=0.1, alpha=0.5: -log_sigma(beta * p.desensitised(alpha)),
    "wpo": lambda p, beta=0.1: -p.likeness() * log_sigma(beta * (p.c - p.r)),
    "f_dpo": lambda p, beta=0.1, divergence="reverse_kl", alpha=0.5: (
        -log_sigma(beta * (f_prime(p.c, divergence, alpha) - f_prime(p.r, divergence, alpha)))
    ),
    "rpo": lambda p, beta=0.1, eta=0.005, sft_reduction="sum": (
        -log_sigma(beta * (p.c - p.r)) - eta * beta * (p.s_w if sft_reduction == "sum" else p.s_w / p.n_w)
    ),
    "spin": lambda p, beta=0.1: -log_sigma(beta * (p.c - p.r)),
    "cream": lambda p, consistency=1.0, beta=0.1: (
        -consistency * log_sigma(beta * (p.c - p.r)) - (1 - consistency) * log_sigma(beta * (p.r - p.c))
    ),
    "mm_dpo": lambda p, reward_margin=0.0, beta=0.1, scaling=0.5, sensitivity=0.5: (
        -log_sigma(beta * (1 + scaling * (1 - math.exp(-sensitivity * reward_margin))) * (p.c - p.r))
    ),
    "seppo": lambda p, beta=0.1, anchor="sign": seppo_term(p, beta, anchor),
    "cpo": lambda p, beta=0.1, alpha=1.0: -log_sigma(beta * (p.s_w - p.s_l)),
    "simpo": lambda p, beta=2.5, gamma_beta_ratio=0.55: (
        -log_sigma(beta * (p.s_w / p.n_w - p.s_l / p.n_l) - gamma_beta_ratio * beta)
    ),
    "orpo": lambda p, penalty=0.1: -penalty * log_sigma(logit(p.s_w / p.n_w) - logit(p.s_l / p.n_l)),
    "tpo": lambda p, beta=0.1, alpha=1.0: -log_sigma(beta * (p.s_w - p.s_l)),
    "asft": lambda p, penalty=0.1: penalty * (-p.s_w / p.n_w - math.log(-math.expm1(p.s_l / p.n_l))),
    "sft": lambda p: 0.0,
}


def loss_in_numbers(
    name: str,
    pairs: Sequence[Numbers],
    extra: dict[str, Any],
    parameters: dict[str, Any],
    weights: Sequence[float] | None = None,
) -> float:
    """The loss of a batch; `extra` holds numbers, or lists of one per pair."""
    weights = [1.0] * len(pairs) if weights is None else weights
    given = [
        {key: item[i] if isinstance(item, list) else item for key, item in extra.items()} for i in range(len(pairs))
    ]
    terms = [PER_PAIR[name](p, **more, **parameters) for p, more in zip(pairs, given, strict=True)]
    loss = sum(w * term for w, term in zip(weights, terms, strict=True)) / len(terms)
    if name in WITH_NLL:
        loss -= sum(w * p.s_w for w, p in zip(weights, pairs, strict=True)) / sum(p.n_w for p in pairs)
    return loss


def sorted_loss_in_numbers(
    name: str, pairs: Sequence[Numbers], beta: float = 0.1, weights: Sequence[float] | None = None
) -> float:
    """Terms have the weight of the pair whose upper value stands there; pairs of weight 0 are left out of the sort."""
    kept = [(1.0 if weights is None else weights[i], p) for i, p in enumerate(pairs) if weights is None or weights[i]]
    if name == "aot":
        upper, lower = [(p.s_w - p.s_l, w) for w, p in kept], [p.ref_w - p.ref_l for _, p in kept]
    else:
        upper, lower = [(p.c, w) for w, p in kept], [p.r for _, p in kept]
    terms = [-w * log_sigma(beta * (a - b)) for (a, w), b in zip(sorted(upper), sorted(lower), strict=True)]
    return sum(terms) / len(pairs)
