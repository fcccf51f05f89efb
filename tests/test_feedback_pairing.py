"""From scores to pairs."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.feedback import Balance, PairingSettings, pair, pair_balanced

SCORES = st.lists(st.floats(-10, 10), min_size=2, max_size=6)
MARGINS = st.floats(0, 5)


def test_best_against_worst():
    pairing = pair([0.5, 0.9, 0.1, 0.9], PairingSettings())
    assert pairing.preferred == ((1, 2),)
    assert pairing.ties == 0


def test_equal_scores_are_one_tie_and_no_pair():
    assert pair([0.5, 0.5, 0.5], PairingSettings()) == pair([0.0, 0.0], PairingSettings())
    assert pair([0.5, 0.5], PairingSettings()).ties == 1


def test_all_pairs_above_the_margin():
    pairing = pair([1.0, 3.0, 2.0], PairingSettings(rule="all", margin=1.0))
    assert pairing.preferred == ((1, 0),)
    assert pairing.ties == 2


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_by_place(broken):
    with pytest.raises(ValueError, match="candidate 1"):
        pair([0.1, broken], PairingSettings())


def test_one_candidate_and_a_negative_margin_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        pair([0.1], PairingSettings())
    with pytest.raises(ValueError, match=r"pairing\.margin"):
        pair([0.1, 0.2], PairingSettings(margin=-1.0))


@given(SCORES, MARGINS)
def test_every_pair_exceeds_the_margin_and_none_is_lost(scores, margin):
    pairing = pair(scores, PairingSettings(rule="all", margin=margin))
    assert all(scores[high] - scores[low] > margin for high, low in pairing.preferred)
    assert len(pairing.preferred) + pairing.ties == math.comb(len(scores), 2)


@given(SCORES, MARGINS)
def test_best_against_worst_is_the_widest_of_all_pairs(scores, margin):
    best = pair(scores, PairingSettings(margin=margin)).preferred
    every = pair(scores, PairingSettings(rule="all", margin=margin)).preferred
    assert bool(best) == bool(every)
    assert [scores[high] - scores[low] for high, low in best] == [
        max(scores[high] - scores[low] for high, low in every) for _ in best
    ]


# -- length-balanced choice --------------------------------------------------------------------------------------------

BALANCED = PairingSettings(rule="length_balanced")


def test_the_pair_that_brings_lengths_into_balance_is_taken():
    balance = Balance()
    # Pairs above the margin and what they add: (0, 1) 10 - 30 = -20; (0, 2) 10 - 8 = 2; (1, 2) 30 - 8 = 22.
    assert pair_balanced([0, -1, -2], [10, 30, 8], BALANCED, balance).preferred == ((0, 2),)
    assert balance.excess == 2
    # From 2 on: (0, 1) leads to -3, (0, 2) to 12, (1, 2) to 17.
    assert pair_balanced([0, -1, -2], [20, 25, 10], BALANCED, balance).preferred == ((0, 1),)
    assert balance.excess == -3


def test_among_equally_balanced_pairs_the_widest_margin_is_taken():
    assert pair_balanced([0, -1, -3], [10, 10, 10], BALANCED, Balance()).preferred == ((0, 2),)
    two = PairingSettings(rule="length_balanced", pairs=2)
    assert pair_balanced([0, -1, -3], [10, 10, 10], two, Balance()).preferred == ((0, 2), (1, 2))


def test_pairs_within_the_margin_are_ties_and_claims_differ_by_one():
    pairing = pair_balanced([-2, -2, -1], [5, 9, 1], BALANCED, Balance())
    assert pairing.ties == 1
    assert pairing.preferred == ((2, 0),)  # 1 - 5 = -4 is nearer to zero than 1 - 9


def test_a_pair_that_would_unbalance_the_lengths_is_left_out():
    strict = PairingSettings(rule="length_balanced", max_excess=10)
    balance = Balance()
    assert pair_balanced([0, -1], [5, 20], strict, balance).preferred == ()
    assert balance.excess == 0
    assert pair_balanced([0, -1], [5, 20], strict, balance).unbalanced == 1
    # what brings the balance back is taken, however far off it still is
    balance.excess = -40
    assert pair_balanced([0, -1], [20, 5], strict, balance).preferred == ((0, 1),)
    assert balance.excess == -25


def test_the_rule_needs_lengths():
    with pytest.raises(ValueError, match="needs the lengths of texts"):
        pair([0, 1], BALANCED)
    with pytest.raises(ValueError, match=r"pairing\.pairs"):
        pair_balanced([0, 1], [1, 1], PairingSettings(rule="length_balanced", pairs=0), Balance())


def test_lengths_stay_balanced_where_short_answers_are_better():
    """Scores fall with length, as false claims add up: best against worst prefers the shorter one nearly always."""
    generator, balance, excess = random.Random(0), Balance(), 0
    for _ in range(200):
        lengths = [generator.randrange(20, 60) for _ in range(5)]
        scores = [-round(length / 10 + generator.uniform(-2, 2)) for length in lengths]
        pair_balanced(scores, lengths, BALANCED, balance)
        for high, low in pair(scores, PairingSettings()).preferred:
            excess += lengths[high] - lengths[low]
    assert excess < -200 * 10
    assert abs(balance.excess) < 200
