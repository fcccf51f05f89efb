"""The values and gradients of every paired objective: derived by hand, and a second time in plain numbers; constants,
ties and log-ratios of 100."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmalign.core.objectives.paired import CHOSEN_ONLY, PAIRED, PAIRED_BATCH_DEPENDENT
from mmalign.core.types import LogProbs, Pair
from tests.paired_in_numbers import loss_in_numbers, numbers_of, sorted_loss_in_numbers
from tests.pairs import CASES, gradients, leaves, loss_of, pick, random_pairs, rows, swapped, values_of, with_values

LN2 = math.log(2)
# the wpo weights are constants of its gradient, but not of a difference quotient
SMOOTH = [case for case in CASES if case[0] != "wpo"]
PREFERENCE = sorted(set(PAIRED) - CHOSEN_ONLY)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# One pair of two tokens each: S_w = -3, S_l = -4, c = -3 + 4 = 1, r = -4 + 3 = -1, D = 2, |y| = 2.
# With beta = 1/2: beta c = 1/2, beta r = -1/2, z = 1.
POLICY = Pair(rows([[-1.0, -2.0]]), rows([[-3.0, -1.0]]))
REFERENCE = Pair(rows([[-2.0, -2.0]]), rows([[-2.0, -1.0]]))
HALF = {"beta": 0.5}
BY_HAND = [
    ("dpo", {}, HALF, softplus(-1)),
    ("dpo", {}, HALF | {"label_smoothing": 0.1}, 0.9 * softplus(-1) + 0.1 * softplus(1)),
    ("robust", {}, HALF | {"label_smoothing": 0.1}, (0.9 * softplus(-1) - 0.1 * softplus(1)) / 0.8),
    ("hinge", {}, {"beta": 0.25}, 0.5),  # 1 - 1/2
    ("hinge", {}, {"beta": 1.0}, 0.0),
    ("ipo", {}, HALF, 1.0),  # (2 - 1)^2
    ("ipo", {}, {"beta": 0.25, "normalize": True}, 1.0),  # (1/2 + 1/2 - 2)^2
    ("exo", {}, HALF | {"label_smoothing": sigma(-1)}, 0.0),  # sigma(z) = 1-e
    ("nca", {}, HALF, softplus(-0.5) + 0.5 * softplus(0.5) + 0.5 * softplus(-0.5)),
    ("bco_pair", {}, HALF, 2 * softplus(-0.5)),
    ("bco_pair", {"shift": 0.5}, HALF, LN2 + softplus(-1)),  # beta c - delta = 0, delta - beta r = 1
    ("sppo", {}, HALF, 0.0),  # (1 - 1)^2 + (-1 + 1)^2
    ("sppo", {}, {"beta": 0.25}, 2.0),  # (1 - 2)^2 + (-1 + 2)^2
    ("aot", {}, HALF, softplus(-1)),  # one pair: dpo
    ("aot_unpaired", {}, HALF, softplus(-1)),
    ("apo_zero", {}, HALF, 2 * sigma(-0.5)),
    ("apo_down", {}, HALF, sigma(0.5) + sigma(-1)),
    ("discopop", {}, HALF | {"tau": 1.0}, sigma(-1) * softplus(-1) + sigma(1) * math.exp(-1)),
    ("ln_dpo", {}, {"beta": 3.0}, softplus(-3)),  # 3 (1/2 + 1/2)
    ("ld_dpo", {}, HALF | {"alpha": 0.1}, softplus(-1)),  # equal lengths: dpo
    ("wpo", {}, HALF, math.exp(-1.5 - 2) * softplus(-1)),  # no collision: w = exp(-3/2), exp(-4/2)
    ("f_dpo", {}, HALF | {"divergence": "reverse_kl"}, softplus(-1)),
    ("f_dpo", {}, HALF | {"divergence": "forward_kl"}, softplus(-(math.e - 1 / math.e) / 2)),  # -1/e + e
    ("f_dpo", {}, HALF | {"divergence": "js"}, softplus(-0.5)),  # log sigma(1) - log sigma(-1) = 1
    ("f_dpo", {}, HALF | {"divergence": "alpha", "alpha": 2.0}, softplus(-(math.e - 1 / math.e) / 2)),  # e - 1/e
    ("rpo", {}, HALF | {"eta": 0.1}, softplus(-1) + 0.15),  # + 0.1 x 1/2 x 3
    ("rpo", {}, HALF | {"eta": 0.1, "sft_reduction": "mean"}, softplus(-1) + 0.075),
    ("spin", {}, HALF, softplus(-1)),
    ("cream", {}, HALF, softplus(-1)),
    ("cream", {"consistency": [0.75]}, HALF, 0.75 * softplus(-1) + 0.25 * softplus(1)),
    ("mm_dpo", {}, HALF, softplus(-1)),
    # beta(delta) = 1/2 (1 + 1 - 1/2) = 3/4
    ("mm_dpo", {"reward_margin": [LN2]}, HALF | {"scaling": 1.0, "sensitivity": 1.0}, softplus(-1.5)),
    ("seppo", {}, HALF, softplus(-1)),  # s = 1
    ("cpo", {}, HALF, softplus(-0.5) + 1.5),  # S_w - S_l = 1, NLL = 3/2
    ("cpo", {}, HALF | {"alpha": 0.0}, softplus(-0.5)),
    ("simpo", {}, {"beta": 2.0, "gamma_beta_ratio": 0.25}, softplus(-0.5)),  # 2 (-3/2 + 2) - 1/2
    # logit p = -log(1/p - 1) with p = exp(-3/2), exp(-2)
    ("orpo", {}, {}, 1.5 + 0.1 * softplus(math.log((math.exp(1.5) - 1) / (math.exp(2) - 1)))),
    ("tpo", {}, HALF, softplus(-0.5) + 1.5),
    ("tpo", {"gold": rows([[-5.0]])}, HALF | {"alpha": 0.1}, softplus(-0.5) + 0.5),
    ("asft", {}, {"penalty": 1.0}, 1.5 + 1.5 - math.log(1 - math.exp(-2))),
    ("sft", {}, {}, 1.5),
]


@pytest.mark.parametrize(("name", "extra", "parameters", "expected"), BY_HAND)
def test_values_derived_by_hand(name, extra, parameters, expected):
    assert loss_of(name, POLICY, REFERENCE, extra, parameters).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_every_objective_has_a_value_derived_by_hand():
    assert {name for name, *_ in BY_HAND} == set(PAIRED)


def test_seppo_pulls_its_reference_sample_up_until_it_is_overtaken():
    # swapped: c = -1, r = 1. s = -1: c + r = 0. Indicator: s = 0, beta c = -1/2.
    pairs = swapped(POLICY), swapped(REFERENCE)
    assert loss_of("seppo", *pairs, None, HALF).item() == pytest.approx(LN2)
    assert loss_of("seppo", *pairs, None, HALF | {"anchor": "indicator"}).item() == pytest.approx(softplus(0.5))
    # c = 0, r = -1: s is at_zero
    policy = Pair(REFERENCE.chosen, POLICY.rejected)
    for anchor in ("sign", "indicator"):
        for at_zero in (1.0, -1.0, 0.0):
            parameters = HALF | {"anchor": anchor, "at_zero": at_zero}
            loss = loss_of("seppo", policy, REFERENCE, None, parameters)
            assert loss.item() == pytest.approx(softplus(-0.5 * at_zero))


def test_sorted_objectives_on_two_pairs_by_hand():
    # margins of the policy 1, 5; of the reference 2, -1: sorted 1, 5 against -1, 2, differences 2 and 3.
    # c = 1 - 0, 3 - 0; r = 0 + 2, -2 - 1 = 2, -3: sorted 1, 3 against -3, 2, differences 4 and 1.
    policy, reference = (
        Pair(rows([[-1.0], [-3.0]]), rows([[-2.0], [-8.0]])),
        Pair(rows([[-2.0], [-6.0]]), rows([[-4.0], [-5.0]])),
    )
    one = {"beta": 1.0}
    assert loss_of("aot", policy, reference, None, one).item() == pytest.approx((softplus(-2) + softplus(-3)) / 2)
    assert loss_of("aot_unpaired", policy, reference, None, one).item() == pytest.approx(
        (softplus(-4) + softplus(-1)) / 2
    )


def test_ld_dpo_discounts_what_the_longer_answer_has_more():
    # The rejected answer counts 3 tokens, with garbage between them; the chosen one 1. alpha = 1/4, beta = 1:
    # c = 1, r = -1 + 1/4 (-2 - 6) = -3, z = 4.
    gap = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    policy = Pair(rows([[-1.0]]), LogProbs(torch.tensor([[-2.0, math.nan, -3.0, -7.0]]).double(), gap))
    reference = Pair(rows([[-2.0]]), LogProbs(torch.tensor([[-1.0, math.inf, -1.0, -1.0]]).double(), gap))
    loss = loss_of("ld_dpo", policy, reference, None, {"beta": 1.0, "alpha": 0.25})
    assert loss.item() == pytest.approx(softplus(-4))


@pytest.mark.parametrize(("name", "extra", "parameters"), CASES)
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0, 0.5]])
def test_agrees_with_the_formula_in_plain_numbers(name, extra, parameters, weights):
    for seed in range(3):
        policy, reference = random_pairs(seed)
        numbers = numbers_of(policy, reference)
        if name in PAIRED_BATCH_DEPENDENT:
            expected = sorted_loss_in_numbers(name, numbers, weights=weights)
        else:
            expected = loss_in_numbers(name, numbers, extra, parameters, weights)
        policy = replace(policy, weight=None if weights is None else torch.tensor(weights))
        loss = loss_of(name, policy, reference, extra, parameters)
        assert loss.item() == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("chosen", [100.0, -100.0, 0.0])
@pytest.mark.parametrize("rejected", [100.0, -100.0, 0.0])
@pytest.mark.parametrize(("name", "extra", "parameters"), CASES)
def test_log_ratios_of_100_are_exact_in_float64_and_finite_in_float32(name, extra, parameters, chosen, rejected):
    extra = {key: item[1:2] if isinstance(item, list) else item for key, item in extra.items()}

    def pairs(dtype: torch.dtype) -> tuple[Pair, Pair]:
        def pair(first: float, second: float) -> Pair:
            one = torch.ones(1, 1, dtype=dtype)
            return Pair(LogProbs(first * one, one), LogProbs(second * one, one))

        # policy minus reference is the log-ratio, and no log-prob is above -1
        policy = pair(-1 + min(chosen, 0), -1 + min(rejected, 0))
        return leaves(policy), pair(-1 - max(chosen, 0), -1 - max(rejected, 0))

    policy, reference = pairs(torch.float64)
    numbers = numbers_of(policy, reference)
    assert (numbers[0].c, numbers[0].r) == (chosen, rejected)
    expected = (
        sorted_loss_in_numbers(name, numbers)
        if name in PAIRED_BATCH_DEPENDENT
        else loss_in_numbers(name, numbers, extra, parameters)
    )
    if not (name == "seppo" and chosen == 0):  # a tie: at_zero decides
        loss = loss_of(name, policy, reference, extra, parameters)
        assert loss.item() == pytest.approx(expected, rel=1e-11, abs=1e-30)
    for dtype in (torch.float64, torch.float32):
        policy, reference = pairs(dtype)
        loss = loss_of(name, policy, reference, extra, parameters)
        assert loss.dtype == dtype
        assert loss.isfinite()
        assert all(part.isfinite().all() for part in gradients(loss, policy))


@pytest.mark.parametrize(("name", "extra", "parameters"), SMOOTH)
def test_gradcheck(name, extra, parameters):
    policy, reference = random_pairs(3)
    policy = replace(leaves(policy), weight=torch.tensor([1.0, 0.5, 2.0, 1.0]).double())

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss_of(name, with_values(policy, chosen, rejected), reference, extra, parameters) + 0 * rejected.sum()

    assert torch.autograd.gradcheck(loss, values_of(policy))


def test_the_weights_of_wpo_are_constants_of_its_gradient():
    policy, reference = random_pairs(4)
    policy = leaves(policy)
    likeness = torch.tensor([numbers.likeness() for numbers in numbers_of(policy, reference)], dtype=torch.float64)
    weighted = loss_of("dpo", replace(policy, weight=likeness), reference)
    torch.testing.assert_close(loss_of("wpo", policy, reference), weighted)
    torch.testing.assert_close(
        gradients(loss_of("wpo", policy, reference), policy), gradients(weighted, policy), rtol=1e-12, atol=0
    )


EQUAL = [
    ("dpo", {"beta": 3.0}, LN2),
    ("dpo", {"label_smoothing": 0.2}, LN2),
    ("robust", {}, LN2),
    ("hinge", {}, 1.0),
    ("ipo", {}, 25.0),
    ("exo", {"label_smoothing": 0.2}, -LN2 - math.log(0.16) / 2),
    ("nca", {}, 2 * LN2),
    ("bco_pair", {}, 2 * LN2),
    ("sppo", {}, 50.0),
    ("aot", {}, LN2),
    ("aot_unpaired", {}, LN2),
    ("apo_zero", {}, 1.0),
    ("apo_down", {}, 1.0),
    ("discopop", {}, (1 + LN2) / 2),
    ("ln_dpo", {}, LN2),
    ("ld_dpo", {}, LN2),
    ("f_dpo", {"divergence": "forward_kl"}, LN2),
    ("f_dpo", {"divergence": "js"}, LN2),
    ("f_dpo", {"divergence": "alpha"}, LN2),
    ("rpo", {"eta": 0.0}, LN2),
    ("spin", {}, LN2),
    ("cream", {}, LN2),
    ("mm_dpo", {}, LN2),
    ("seppo", {}, LN2),
]


@pytest.mark.parametrize(("name", "parameters", "constant"), EQUAL)
def test_equal_policy_and_reference_give_the_known_constant(name, parameters, constant):
    pair, _ = random_pairs(5)
    for both in (pair, pick(pair, [0]), pick(pair, [1, 1, 1])):  # many pairs, a single one, ties
        loss, metrics = PAIRED[name](both, both, **parameters)
        assert loss.item() == pytest.approx(constant, rel=1e-12)
        assert metrics["rewards/margins"].item() == 0
        assert metrics["rewards/accuracies"].item() == 0.5  # a tie counts half


@pytest.mark.parametrize("name", PREFERENCE)
def test_identical_samples_tie_and_keep_their_gradients_finite(name):
    policy, reference = random_pairs(6)
    same = leaves(Pair(policy.chosen, policy.chosen))
    loss, metrics = PAIRED[name](same, Pair(reference.chosen, reference.chosen))
    assert metrics["rewards/accuracies"].item() == 0.5
    assert all(part.isfinite().all() for part in gradients(loss, same))


@pytest.mark.parametrize("name", PREFERENCE)
def test_the_first_step_widens_the_margin(name):
    """Where policy and reference agree, going down the gradient lifts the chosen over the rejected sample. DiscoPOP
    does so only beyond tau = 0.102, as its docstring says."""
    pair = leaves(pick(random_pairs(7)[0], [0]))
    chosen, rejected = gradients(loss_of(name, pair, pair), pair)
    sign = -1 if name == "discopop" else 1
    assert sign * (rejected[0, 0] - chosen[0, 0]).item() > 0
    if name == "discopop":
        chosen, rejected = gradients(loss_of(name, pair, pair, None, {"tau": 0.11}), pair)
        assert rejected[0, 0] > chosen[0, 0]
