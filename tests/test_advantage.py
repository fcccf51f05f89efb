"""Advantages: values derived by hand and in plain numbers, groups of one, equal rewards, masked actions."""

import math
import statistics

import pytest
import torch

from mmalign.core.advantage import centre, gae, leave_one_out, normalise, per_prompt, single_groups, with_kl_penalty
from tests.samples import random_samples, sums

GROUP_FUNCTIONS = (centre, normalise, per_prompt, leave_one_out)
# Group 3: rewards 1, 2, 6, mean 3; group 8: 4 alone; rows are mixed up.
REWARDS, GROUPS = [1.0, 4.0, 6.0, 2.0], [3, 8, 3, 3]
# squared deviations 4 + 9 + 1 = 14: std sqrt(7) unbiased, sqrt(14/3) biased
UNBIASED, BIASED = math.sqrt(7), math.sqrt(14 / 3)


def tensors(rewards=REWARDS, groups=GROUPS, dtype=torch.float64):
    return torch.tensor(rewards, dtype=dtype), torch.tensor(groups)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (centre, [-2, 0, 3, -1]),
        (normalise, [x / (UNBIASED + 1e-4) for x in (-2, 0, 3, -1)]),
        (per_prompt, [x / (BIASED + 1e-6) for x in (-2, 0, 3, -1)]),
        (leave_one_out, [1 - 4, 0, 6 - 1.5, 2 - 3.5]),
    ],
)
def test_values_derived_by_hand(function, expected):
    assert function(*tensors()).tolist() == pytest.approx(expected, rel=1e-14)


# one reward and those of its group, itself among them
IN_NUMBERS = {
    centre: lambda reward, own: reward - statistics.fmean(own),
    normalise: lambda reward, own: (reward - statistics.fmean(own)) / (statistics.stdev(own) + 1e-4),
    per_prompt: lambda reward, own: (reward - statistics.fmean(own)) / (statistics.pstdev(own) + 1e-6),
    leave_one_out: lambda reward, own: reward - (sum(own) - reward) / (len(own) - 1),
}


@pytest.mark.parametrize("function", GROUP_FUNCTIONS)
def test_agrees_with_plain_numbers(function):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(40, dtype=torch.float64, generator=generator)
    groups = torch.cat([torch.arange(9), torch.arange(9), torch.randint(0, 9, (22,), generator=generator)])
    rows = list(zip(rewards.tolist(), groups.tolist(), strict=True))
    expected = [IN_NUMBERS[function](reward, [r for r, own in rows if own == group]) for reward, group in rows]
    assert function(rewards, groups).tolist() == pytest.approx(expected, rel=1e-10)
    order = torch.randperm(40, generator=generator)
    torch.testing.assert_close(function(rewards[order], groups[order]), function(rewards, groups)[order])


@pytest.mark.parametrize("function", GROUP_FUNCTIONS)
def test_groups_of_one_and_equal_rewards_have_advantages_of_exactly_0(function):
    for rewards, groups in (([5.0], [0]), ([0.1] * 3, [2] * 3), ([0.1] * 3 + [7.0], [2] * 3 + [1])):
        for dtype in (torch.float32, torch.float64):
            found = function(*tensors(rewards, groups, dtype))
            assert found.dtype == dtype
            assert (found == 0).all()


def test_groups_of_one_are_counted():
    for groups, count in ((GROUPS, 1), ([1, 2, 3], 3), ([1, 1], 0)):
        assert single_groups(torch.tensor(groups)).item() == count


def test_a_prompt_with_few_rows_is_compared_with_all():
    # group 8 has fewer than 2 rows: mean 13/4 and the biased spread of all four
    found = per_prompt(*tensors(), min_count=2)
    expected = [x / (BIASED + 1e-6) for x in (-2, 3, -1)]
    assert found[torch.tensor([0, 2, 3])].tolist() == pytest.approx(expected)
    assert found[1].item() == pytest.approx((4 - 13 / 4) / (statistics.pstdev(REWARDS) + 1e-6))
    everyone = per_prompt(*tensors(), min_count=16)
    assert everyone[0].item() == pytest.approx((1 - 13 / 4) / (statistics.pstdev(REWARDS) + 1e-6))


def test_the_epsilon_of_a_normalisation_is_added_to_the_spread():
    assert normalise(*tensors(), eps=1.0)[0].item() == pytest.approx(-2 / (UNBIASED + 1))
    assert per_prompt(*tensors(), eps=1.0)[0].item() == pytest.approx(-2 / (BIASED + 1))


@pytest.mark.parametrize("function", GROUP_FUNCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_refused(function, bad):
    with pytest.raises(ValueError, match=f"the reward of sample 1 is {bad}; expected a finite number"):
        function(*tensors([1.0, bad, 2.0], [0, 0, 0]))


def test_the_kl_penalty_of_a_reward():
    old, reference = random_samples(0)
    rewards = torch.arange(6, dtype=torch.float64)
    expected = [i - 0.3 * (a - b) for i, (a, b) in enumerate(zip(sums(old), sums(reference), strict=True))]
    assert with_kl_penalty(rewards, old, reference, 0.3).tolist() == pytest.approx(expected)


# -- generalised advantage estimation ----------------------------------------------------------------------------------


def test_gae_by_hand():
    # gamma = 1/2, lambda = 1/2. From the end: delta_2 = 4 - 1 = 3. delta_1 = 0 + 1/2 - 2 = -3/2, A_1 = -3/2 + 3/4.
    # delta_0 = 1 + 1 - 0 = 2, A_0 = 2 - 3/16.
    rewards, values = (
        torch.tensor([[1.0, 0.0, 4.0]], dtype=torch.float64),
        torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64),
    )
    found, returns = gae(rewards, values, torch.ones(1, 3).double(), gamma=0.5, lambda_=0.5)
    assert found[0].tolist() == pytest.approx([2 - 3 / 16, -3 / 4, 3.0])
    assert returns[0].tolist() == pytest.approx([2 - 3 / 16, 5 / 4, 4.0])


def test_with_gamma_and_lambda_1_returns_are_rewards_to_come():
    generator = torch.Generator().manual_seed(1)
    rewards, values = (torch.randn(3, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    found, returns = gae(rewards, values, torch.ones(3, 8).double())
    to_come = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(returns, to_come)
    torch.testing.assert_close(found, to_come - values)
    # lambda = 0: the error of one step
    found, _ = gae(rewards, values, torch.ones(3, 8).double(), gamma=0.9, lambda_=0.0)
    after = torch.cat([values[:, 1:], torch.zeros(3, 1)], -1)
    torch.testing.assert_close(found, rewards + 0.9 * after - values)


def test_places_without_an_action_are_skipped_wherever_they_stand():
    generator = torch.Generator().manual_seed(2)
    real = torch.tensor(
        [
            [0, 1, 1, 0, 0, 1, 0, 1, 0],
            [1, 1, 1, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0, 0],
        ]
    ).bool()
    rewards, values = (torch.randn(4, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = 0.5 * real.double()  # a weight is no reward: 1/2 counts like 1
    rewards[~real], values[~real] = math.nan, math.inf
    found, returns = gae(rewards, values, weight, gamma=0.9, lambda_=0.7)
    assert (found[~real] == 0).all()
    assert (returns[~real] == 0).all()
    for row in range(4):
        places = [t for t in range(9) if real[row, t]]
        running = after = 0.0
        for t in reversed(places):
            reward, value = rewards[row, t].item(), values[row, t].item()
            running = reward + 0.9 * after - value + 0.9 * 0.7 * running
            after = value
            assert found[row, t].item() == pytest.approx(running, rel=1e-12)
            assert returns[row, t].item() == pytest.approx(running + value, rel=1e-12)


def test_gae_has_no_gradient_and_refuses_discounts_out_of_range():
    ones = torch.ones(1, 2, dtype=torch.float64)
    found, returns = gae(ones, ones.clone().requires_grad_(), ones)
    assert not found.requires_grad
    assert not returns.requires_grad
    for parameters, message in (({"gamma": 1.1}, "gamma is 1.1"), ({"lambda_": -0.1}, "lambda_ is -0.1")):
        with pytest.raises(ValueError, match=message):
            gae(ones, ones, ones, **parameters)
