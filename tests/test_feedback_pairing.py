"""From scores to pairs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.feedback import PairingSettings, pair

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
