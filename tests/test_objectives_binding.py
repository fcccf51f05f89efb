"""Objectives against values derived by hand, symmetries, and gradcheck in float64."""

import math

import pytest
import torch

from mmalign.core.objectives import CHOSEN_ONLY, PAIRED, REFERENCE_FREE, bind_objective
from mmalign.core.types import LogProbs, Pair

PREFERENCE = sorted(set(PAIRED) - CHOSEN_ONLY)


def log_probs(rows, weight=None) -> LogProbs:
    values = torch.tensor(rows, dtype=torch.float64)
    weights = torch.ones_like(values) if weight is None else torch.tensor(weight, dtype=torch.float64)
    return LogProbs(values, weights)


def random_pair(seed: int, requires_grad: bool = False) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def rows() -> LogProbs:
        values = -torch.rand(3, 5, dtype=torch.float64, generator=generator)
        weight = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.float64)
        return LogProbs(values.requires_grad_(requires_grad), weight)

    return Pair(rows(), rows())


# One pair of two tokens each: c = (-1 - 2) - (-2 - 2) = 1, r = (-3 - 1) - (-2 - 1) = -1, D = 2, |y| = 2.
POLICY = Pair(log_probs([[-1.0, -2.0]]), log_probs([[-3.0, -1.0]]))
REFERENCE = Pair(log_probs([[-2.0, -2.0]]), log_probs([[-2.0, -1.0]]))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "dpo", "beta": 0.5}, math.log1p(math.exp(-1.0))),  # z = 1
        (
            {"name": "dpo", "beta": 0.5, "label_smoothing": 0.1},
            0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.exp(1)),
        ),
        ({"name": "hinge", "beta": 0.25}, 0.5),
        ({"name": "hinge", "beta": 1.0}, 0.0),
        ({"name": "ipo", "beta": 0.5}, 1.0),  # (2 - 1)^2
        ({"name": "ipo", "beta": 0.25, "normalize": True}, 1.0),  # (1/2 + 1/2 - 2)^2
        ({"name": "ln_dpo", "beta": 3.0}, math.log1p(math.exp(-3.0))),
        ({"name": "sft"}, 1.5),  # (1 + 2) / 2
    ],
)
def test_values_derived_by_hand(section, expected):
    loss, _ = bind_objective(section)(POLICY, REFERENCE)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_metrics_of_the_same_pair():
    _, metrics = bind_objective({"name": "dpo", "beta": 0.5})(POLICY, REFERENCE)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 0.5,
            "rewards/rejected": -0.5,
            "rewards/margins": 1.0,
            "rewards/accuracies": 1.0,
            "logps/chosen": -3.0,
            "logps/rejected": -4.0,
        }
    )


@pytest.mark.parametrize(
    ("section", "constant"),
    [
        ({"name": "dpo", "beta": 3.0}, math.log(2)),
        ({"name": "dpo", "label_smoothing": 0.2}, math.log(2)),
        ({"name": "ln_dpo"}, math.log(2)),
        ({"name": "hinge"}, 1.0),
        ({"name": "ipo", "beta": 0.1}, 25.0),
    ],
)
def test_equal_policy_and_reference_give_the_known_constant(section, constant):
    objective, pair = bind_objective(section), random_pair(0)
    loss, metrics = objective(pair, pair)
    assert loss.item() == pytest.approx(constant, abs=1e-12)
    assert objective.at_equality() == pytest.approx(constant, abs=1e-12)
    assert metrics["rewards/accuracies"].item() == 0.5  # a tie counts half


@pytest.mark.parametrize("name", PREFERENCE)
def test_swapping_the_pair_negates_the_margin(name):
    policy, reference = random_pair(1), random_pair(2)
    swap = [Pair(pair.rejected, pair.chosen) for pair in (policy, reference)]
    _, metrics = PAIRED[name](policy, reference)
    _, swapped = PAIRED[name](*swap)
    assert swapped["rewards/margins"].item() == pytest.approx(-metrics["rewards/margins"].item())


def test_swapping_the_pair_negates_the_dpo_logit():
    loss, _ = PAIRED["dpo"](POLICY, REFERENCE, beta=0.5)
    swapped, _ = PAIRED["dpo"](
        Pair(POLICY.rejected, POLICY.chosen), Pair(REFERENCE.rejected, REFERENCE.chosen), beta=0.5
    )
    assert swapped.item() - loss.item() == pytest.approx(1.0)  # softplus(z) - softplus(-z) = z


@pytest.mark.parametrize("name", sorted(PAIRED))
def test_gradcheck(name):
    policy, reference = random_pair(3, requires_grad=True), random_pair(4)

    def loss(chosen, rejected):
        pair = Pair(LogProbs(chosen, policy.chosen.weight), LogProbs(rejected, policy.rejected.weight))
        return PAIRED[name](pair, reference)[0] + 0 * rejected.sum()

    assert torch.autograd.gradcheck(loss, (policy.chosen.values, policy.rejected.values))


@pytest.mark.parametrize("name", sorted(PAIRED))
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
def test_masked_values_never_matter(name, garbage):
    policy, reference = random_pair(5, requires_grad=True), random_pair(6)
    loss, _ = PAIRED[name](policy, reference)
    gradient = torch.autograd.grad(loss, policy.chosen.values)[0]
    spoiled = [
        Pair(*(LogProbs(side.values.detach().masked_fill(side.weight == 0, garbage), side.weight) for side in sides))
        for sides in ((policy.chosen, policy.rejected), (reference.chosen, reference.rejected))
    ]
    spoiled[0].chosen.values.requires_grad_()
    again, _ = PAIRED[name](*spoiled)
    assert again.item() == loss.item()
    assert torch.equal(torch.autograd.grad(again, spoiled[0].chosen.values)[0], gradient)


@pytest.mark.parametrize("name", sorted(set(PAIRED) - REFERENCE_FREE))
def test_only_the_reference_moves_the_loss_and_gets_no_gradient(name):
    policy, reference, other = random_pair(7), random_pair(8, requires_grad=True), random_pair(9)
    loss, _ = PAIRED[name](policy, reference)
    assert loss.item() != PAIRED[name](policy, other)[0].item()
    assert not loss.requires_grad


@pytest.mark.parametrize("name", sorted(PAIRED))
@pytest.mark.parametrize("ratio", [100.0, -100.0, 1e4])
def test_extreme_log_ratios_stay_finite(name, ratio):
    values = torch.tensor([[ratio]], dtype=torch.float32, requires_grad=True)
    zero = LogProbs(torch.zeros(1, 1), torch.ones(1, 1))
    policy = Pair(LogProbs(values, torch.ones(1, 1)), zero)
    loss, _ = PAIRED[name](policy, Pair(zero, zero))
    loss.backward()
    assert math.isfinite(loss.item())
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


def test_weights_are_floats_not_a_mask():
    weighted = LogProbs(torch.tensor([[-1.0, -2.0]]), torch.tensor([[0.5, 2.0]]))
    assert weighted.sum().item() == -4.5
    assert weighted.length().item() == 2.5
    assert weighted.mean().item() == pytest.approx(-1.8)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "dpoo"}, "did you mean dpo"),
        ({"beta": 1}, "objective.name is None"),
        ({"name": "dpo", "betta": 1}, "did you mean beta"),
        ({"name": "dpo", "beta": 0}, "beta is 0"),
        ({"name": "dpo", "beta": -1.0}, "above 0"),
        ({"name": "dpo", "label_smoothing": 0.5}, "label_smoothing"),
        ({"name": "sft", "beta": 1}, "no parameters"),
    ],
)
def test_wrong_configs_fail_when_read(section, message):
    with pytest.raises(ValueError, match=message):
        bind_objective(section)
