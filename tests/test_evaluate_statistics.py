"""Intervals: known cases, symmetries, coverage."""

import numpy as np
import pytest

from mmalign.evaluate.statistics import Interval, mean_interval, paired_difference, share_interval, win_rate


def test_the_interval_of_a_rate_is_close_to_theory():
    values = np.repeat([1.0, 0.0], [300, 700])
    interval = mean_interval(values, range(1000))
    expected = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert interval.value == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - expected, abs=0.003)
    assert interval.high == pytest.approx(0.3 + expected, abs=0.003)


def test_a_seed_repeats_the_interval_exactly():
    values = np.random.default_rng(0).random(50)
    assert mean_interval(values, range(50), seed=1) == mean_interval(values, range(50), seed=1)
    assert mean_interval(values, range(50), seed=1) != mean_interval(values, range(50), seed=2)


def test_answers_to_one_prompt_are_not_independent():
    values = np.repeat(np.random.default_rng(0).integers(0, 2, 100), 10).astype(float)
    prompts = np.repeat(np.arange(100), 10).tolist()
    clustered, naive = mean_interval(values, prompts), mean_interval(values, range(1000))
    assert clustered.value == naive.value
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)


def test_without_spread_the_interval_is_the_exact_binomial_one():
    assert mean_interval(np.zeros(20), range(20)).high == pytest.approx(1 - 0.025 ** (1 / 20))
    nothing = mean_interval(np.ones(1), [0])
    assert (nothing.low, nothing.high) == (pytest.approx(0.025), 1.0)
    same = paired_difference(np.ones(20), np.ones(20), range(20))
    assert -same.low == same.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert mean_interval(np.full(3, 30.0), range(3), bounds=None) == Interval(30.0, 30.0, 30.0)


def test_shares_weigh_prompts_by_their_facts():
    interval = share_interval(np.array([3.0, 0.0]), np.array([3.0, 1.0]), ["first", "second"])
    assert interval.value == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_paired_differences_change_sign_when_swapped():
    generator = np.random.default_rng(3)
    first, second = generator.random(80), generator.random(80)
    forward, backward = paired_difference(first, second, range(80)), paired_difference(second, first, range(80))
    assert forward.value == pytest.approx(-backward.value)
    assert forward.low == pytest.approx(-backward.high, abs=0.01)


def test_pairing_is_sharper_than_two_separate_intervals():
    hardness = np.random.default_rng(0).random(200)
    gain = paired_difference(hardness + 0.01, hardness + np.random.default_rng(1).normal(0, 0.01, 200), range(200))
    assert gain.side == 1
    assert mean_interval(hardness, range(200)).high > hardness.mean() + 0.02


def test_win_rate_counts_a_tie_as_one_half():
    assert win_rate(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 1.0, 1.0]), range(4)).value == 0.625


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = [
        interval.low <= 0.4 <= interval.high
        for interval in (mean_interval((generator.random(150) < 0.4).astype(float), range(150)) for _ in range(120))
    ]
    assert 0.88 <= np.mean(covered) <= 1.0


def test_side_says_where_zero_is():
    assert [Interval(0, low, high).side for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [1, -1, 0]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="some"):
        mean_interval(np.zeros(0), [])
    with pytest.raises(ValueError, match="finite"):
        mean_interval(np.array([1.0, np.nan]), range(2))
    with pytest.raises(ValueError, match="equal lengths"):
        win_rate(np.zeros(3), np.zeros(4), range(3))
