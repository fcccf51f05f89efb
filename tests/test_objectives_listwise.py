"""Objectives on scored groups: values derived by hand and in plain numbers, ties, groups of every size, bad input."""

import inspect
import math

import pytest
import torch

from mmalign.core.objectives.listwise import LISTWISE
from mmalign.core.objectives.paired import dpo
from mmalign.core.types import LogProbs, Pair
from tests.samples import (
    SHORT,
    column,
    gradient,
    leaf,
    log_sigma,
    random_samples,
    ratios,
    sigma,
    softplus,
    sums,
    tokens,
)

LN2 = math.log(2)
LENGTHS = (3, 1, 23, 2, 7, 5, 4)
GROUPS = [4, 9, 4, 4, 9, 1, 9]  # two groups of three, mixed up, and one of one
SCORES = [0.3, 1.0, 0.9, -0.5, 2.5, 0.7, 0.0]
LIKELIHOODS = {"lipo_lambda", "plackett_luce"}  # those with a beta


def run(name, policy, reference, scores=SCORES, groups=GROUPS, **parameters):
    dtype = policy.values.dtype
    return LISTWISE[name](
        policy, reference, torch.tensor(scores, dtype=dtype), torch.tensor(groups, dtype=torch.int64), **parameters
    )


def random_lists(seed, lengths=LENGTHS):
    return random_samples(seed, lengths)


def lists_of(scores, groups):
    """Rows of each group of two samples or more."""
    found = {}
    for row, group in enumerate(groups):
        if not math.isnan(scores[row]):
            found.setdefault(group, []).append(row)
    return [rows for rows in found.values() if len(rows) > 1]


def lipo_in_numbers(s, scores, groups):
    losses = []
    for rows in lists_of(scores, groups):
        # among equal rewards the higher score ranks first, then the earlier row
        order = sorted(rows, key=lambda row: (-s[row], -scores[row], row))
        tau = {row: place + 1 for place, row in enumerate(order)}
        loss = 0.0
        for i in rows:
            for j in rows:
                if scores[i] > scores[j]:
                    gain = abs(2 ** scores[i] - 2 ** scores[j])
                    discount = abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
                    loss -= gain * discount * log_sigma(s[i] - s[j])
        losses.append(loss)
    return sum(losses) / max(1, len(losses))


def plackett_luce_in_numbers(s, scores, groups):
    losses = []
    for rows in lists_of(scores, groups):
        loss = 0.0
        for i in rows:
            lower = [s[j] - s[i] for j in rows if scores[j] < scores[i]]
            top = max([0.0, *lower])
            loss += top + math.log(math.exp(-top) + sum(math.exp(x - top) for x in lower))
        losses.append(loss)
    return sum(losses) / max(1, len(losses))


def best_of_n_in_numbers(policy, scores, groups):
    best = [max(rows, key=lambda row: (scores[row], -row)) for rows in lists_of(scores, groups)]
    chosen = [tokens(policy)[row] for row in best]
    count = sum(weight for row in chosen for _, weight in row)
    return -sum(value * weight for row in chosen for value, weight in row) / count if best else 0.0


def in_numbers(name, policy, reference, scores, groups, beta=0.1):
    if name == "best_of_n":
        return best_of_n_in_numbers(policy, scores, groups)
    s = [beta * r for r in ratios(policy, reference)]
    return (lipo_in_numbers if name == "lipo_lambda" else plackett_luce_in_numbers)(s, scores, groups)


# One list of three, rows out of order; r = 1, 0, 2 and beta = 1/2, so s = 1/2, 0, 1. Scores 1, 0, 2.
POLICY, REFERENCE = column(-1.0, -3.0, -2.0), column(-2.0, -3.0, -4.0)
D = [1 / math.log(2), 1 / math.log(3), 1 / math.log(4)]  # of the ranks 1, 2, 3
BY_HAND = [
    # ranks by s: row 2, row 0, row 1. Pairs (2 over 0): |4 - 2| |D1 - D2|, (2 over 1): |4 - 1| |D1 - D3|,
    # (0 over 1): |2 - 1| |D2 - D3|
    (
        "lipo_lambda",
        2 * (D[0] - D[1]) * softplus(-0.5) + 3 * (D[0] - D[2]) * softplus(-1) + (D[1] - D[2]) * softplus(-0.5),
    ),
    # row 2 out of all, then row 0 out of 0 and 1
    ("plackett_luce", math.log(1 + math.exp(-0.5) + math.exp(-1)) + math.log(1 + math.exp(-0.5))),
    ("best_of_n", 2.0),
]


@pytest.mark.parametrize(("name", "expected"), BY_HAND)
def test_values_derived_by_hand(name, expected):
    parameters = {"beta": 0.5} if name in LIKELIHOODS else {}
    loss, metrics = run(name, POLICY, REFERENCE, [1.0, 0.0, 2.0], [5, 5, 5], **parameters)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    best, worst = (-2.0, -3.0) if name == "best_of_n" else (1.0, 0.0)
    assert metrics["rewards/chosen"].item() == best
    assert metrics["rewards/rejected"].item() == worst
    assert metrics["rewards/margins"].item() == 1.0
    assert metrics["rewards/accuracies"].item() == 1.0
    assert (metrics["logps/chosen"].item(), metrics["logps/rejected"].item()) == (-2.0, -3.0)
    assert metrics["single_groups"].item() == 0


def test_every_objective_has_a_value_derived_by_hand():
    assert {name for name, _ in BY_HAND} == set(LISTWISE)


@pytest.mark.parametrize("name", LISTWISE)
@pytest.mark.parametrize("scores", [SCORES, [1.0, 0.0, 1.0, 0.0, 0.0, 3.0, 0.0]])  # without ties, and with many
def test_agrees_with_the_formula_in_plain_numbers(name, scores):
    for seed in range(3):
        policy, reference = random_lists(seed)
        policy = leaf(policy)
        loss, metrics = run(name, policy, reference, scores)
        assert loss.item() == pytest.approx(in_numbers(name, policy, reference, scores, GROUPS), rel=1e-12)
        slope = gradient(loss, policy)
        assert slope.isfinite().all()
        assert (slope[policy.weight == 0] == 0).all()
        assert (slope[5] == 0).all()  # a group of one
        assert metrics["single_groups"].item() == 1
        assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", LISTWISE)
@pytest.mark.parametrize("values", [(100.0, -100.0, 0.0), (-100.0, 100.0, 100.0), (0.0, -100.0, -100.0)])
def test_log_ratios_of_100_are_exact_in_float64_and_finite_in_float32(name, values):
    scores, groups = [2.0, 1.0, 0.0], [0, 0, 0]
    parameters = {"beta": 1.0} if name in LIKELIHOODS else {}
    for dtype, accuracy in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        policy, reference = leaf(column(*values, dtype=dtype)), column(0.0, 0.0, 0.0, dtype=dtype)
        loss, _ = run(name, policy, reference, scores, groups, **parameters)
        expected = in_numbers(name, policy, reference, scores, groups, **parameters)
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(expected, rel=accuracy, abs=1e-14)
        assert gradient(loss, policy).isfinite().all()


@pytest.mark.parametrize("name", LISTWISE)
def test_gradcheck(name):
    policy, reference = random_lists(3, (*SHORT, 2))

    def loss(values):
        return run(name, LogProbs(values, policy.weight), reference)[0]

    assert torch.autograd.gradcheck(loss, leaf(policy).values)


@pytest.mark.parametrize("name", LISTWISE)
def test_the_order_of_the_rows_is_of_no_matter(name):
    policy, reference = random_lists(4)
    order = torch.tensor([6, 3, 1, 5, 0, 4, 2])
    scores, groups = [SCORES[i] for i in order], [GROUPS[i] for i in order]
    loss, _ = run(name, policy.pick(order), reference.pick(order), scores, groups)
    assert loss.item() == pytest.approx(run(name, policy, reference)[0].item(), rel=1e-14)
    # not even where all rewards are equal, and ranks are ties
    loss, _ = run(name, policy.pick(order), policy.pick(order), scores, groups)
    assert loss.item() == pytest.approx(run(name, policy, policy)[0].item(), rel=1e-14)


@pytest.mark.parametrize("name", LISTWISE)
def test_a_loss_is_the_mean_over_its_groups(name):
    policy, reference = random_lists(5)
    both, _ = run(name, policy, reference)
    halves = []
    for group in (4, 9):
        rows = torch.tensor([i for i, one in enumerate(GROUPS) if one == group])
        scores = [SCORES[i] for i in rows]
        halves.append(run(name, policy.pick(rows), reference.pick(rows), scores, [group] * 3)[0].item())
    # best_of_n is a mean over actions; the best are rows 2 and 4
    weights = policy.length()[torch.tensor([2, 4])].tolist() if name == "best_of_n" else [1.0, 1.0]
    expected = sum(w * half for w, half in zip(weights, halves, strict=True)) / sum(weights)
    assert both.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LISTWISE)
def test_groups_of_one_alone_lose_nothing_and_are_counted(name):
    for scores, groups, count in (([1.0], [3], 1), ([1.0, 2.0], [3, 4], 2)):
        policy, reference = (rows.pick(slice(0, len(groups))) for rows in random_lists(6))
        policy = leaf(policy)
        loss, metrics = run(name, policy, reference, scores, groups)
        assert loss.item() == 0
        assert (gradient(loss, policy) == 0).all()  # still part of the graph
        assert metrics["single_groups"].item() == count
        assert metrics["rewards/margins"].item() == 0


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_equal_scores_say_nothing(name):
    policy, reference = random_lists(7)
    policy = leaf(policy)
    loss, metrics = run(name, policy, reference, [2.0] * 7)
    assert loss.item() == 0
    assert (gradient(loss, policy) == 0).all()
    assert metrics["rewards/accuracies"].item() == 0.5


def test_of_equal_scores_best_of_n_takes_the_first_row():
    policy = column(-1.0, -2.0, -3.0, -4.0)
    assert run("best_of_n", policy, None, [0.0, 5.0, 5.0, 5.0], [0, 0, 0, 0])[0].item() == 2.0
    assert run("best_of_n", policy, None, [5.0, 5.0, 5.0, 5.0], [0, 1, 0, 1])[0].item() == 1.5


@pytest.mark.parametrize("name", LISTWISE)
def test_a_sample_without_a_score_is_absent(name):
    policy, reference = random_lists(8)
    values = policy.values.clone()
    values[3] = math.nan  # not even its log-probs are looked at
    policy = leaf(LogProbs(values, policy.weight))
    scores = [math.nan if row == 3 else score for row, score in enumerate(SCORES)]
    loss, _ = run(name, policy, reference, scores)
    rows = torch.tensor([0, 1, 2, 4, 5, 6])
    without, _ = run(
        name, policy.pick(rows), reference.pick(rows), [SCORES[i] for i in rows], [GROUPS[i] for i in rows]
    )
    assert loss.item() == pytest.approx(without.item(), rel=1e-14)
    slope = gradient(loss, policy)
    assert slope.isfinite().all()
    assert (slope[3] == 0).all()


def test_two_samples_are_dpo_under_plackett_luce():
    policy, reference = (rows.pick(slice(0, 4)) for rows in random_lists(9))
    loss, _ = run("plackett_luce", policy, reference, [0.1, 3.0, 0.7, 0.2], [0, 0, 1, 1], beta=0.3)
    chosen, rejected = torch.tensor([1, 2]), torch.tensor([0, 3])
    pairs = (Pair(rows.pick(chosen), rows.pick(rejected)) for rows in (policy, reference))
    assert loss.item() == pytest.approx(dpo(*pairs, beta=0.3)[0].item(), rel=1e-14)


def test_equal_policy_and_reference_give_the_known_constants():
    policy, _ = random_lists(10)
    assert run("plackett_luce", policy, policy)[0].item() == pytest.approx(math.log(6), rel=1e-14)  # log 3 + log 2
    # all rewards are equal, so the ranks are those of the scores; ln 2 for each pair
    loss, _ = run("lipo_lambda", policy, policy)
    expected = 0.0
    for ranked in ([0.9, 0.3, -0.5], [2.5, 1.0, 0.0]):
        gains = [2**psi for psi in ranked]
        for i in range(3):
            for j in range(i + 1, 3):
                expected += LN2 * (gains[i] - gains[j]) * (D[i] - D[j]) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_no_gradient_flows_through_the_weights_of_lipo():
    # two samples: the weight is |4 - 1| |D1 - D2|, whichever ranks first; d/ds -log sigma(s) = -sigma(-s)
    for first, second in ((1.0, -1.0), (-1.0, 1.0)):
        policy = leaf(column(first, second))
        loss, _ = run("lipo_lambda", policy, column(0.0, 0.0), [2.0, 0.0], [0, 0], beta=1.0)
        slope = 3 * (D[0] - D[1]) * sigma(second - first)
        assert gradient(loss, policy)[:, 0].tolist() == pytest.approx([-slope, slope])


def test_scores_that_would_overflow_are_held():
    for dtype, limit in ((torch.float32, 96), (torch.float64, 992)):
        policy = leaf(column(0.5, -0.5, dtype=dtype))
        losses = [
            run("lipo_lambda", policy, column(0.0, 0.0, dtype=dtype), [float(top), 0.0], [0, 0])[0]
            for top in (limit, limit + 1, 1e30, math.inf)
        ]
        assert all(loss.isfinite() for loss in losses)
        assert len({loss.item() for loss in losses}) == 1
        assert gradient(losses[-1], policy).isfinite().all()
    negative, _ = run("lipo_lambda", policy, column(0.0, 0.0), [0.0, -math.inf], [0, 0])
    assert negative.item() == pytest.approx((D[0] - D[1]) * softplus(-0.1))


@pytest.mark.parametrize("name", LISTWISE)
def test_the_best_sample_of_a_list_rises(name):
    policy = leaf(random_lists(11)[0])
    slope = gradient(run(name, policy, policy)[0], policy).sum(-1)
    assert (slope[torch.tensor([2, 4])] < 0).all()
    worst = slope[torch.tensor([3, 6])]
    assert (worst == 0).all() if name == "best_of_n" else (worst > 0).all()


@pytest.mark.parametrize("name", LISTWISE)
def test_no_gradient_flows_into_the_reference(name):
    policy, reference = (leaf(rows) for rows in random_lists(12))
    run(name, policy, reference)[0].backward()
    assert policy.values.grad is not None
    assert reference.values.grad is None


def test_identical_samples_keep_their_gradients_finite():
    policy, reference = (rows.pick(torch.tensor([2, 2, 2])) for rows in random_lists(13))
    policy = leaf(policy)
    for name in LISTWISE:
        loss, metrics = run(name, policy, reference, [2.0, 1.0, 0.0], [0, 0, 0])
        assert gradient(loss, policy).isfinite().all()
        assert metrics["rewards/accuracies"].item() == 0.5


def test_best_of_n_needs_no_reference():
    policy, reference = random_lists(14)
    assert run("best_of_n", policy, None)[0] == run("best_of_n", policy, reference)[0]
    assert run("best_of_n", policy, None)[1]["logps/chosen"].item() == pytest.approx(
        (sums(policy)[2] + sums(policy)[4]) / 2
    )


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_must_be_a_number_above_0(name, beta):
    with pytest.raises(ValueError, match=r"objective\.beta is .*; expected a number above 0"):
        run(name, *random_lists(15), beta=beta)


@pytest.mark.parametrize("name", LISTWISE)
def test_docstrings_are_summary_equation_notes_source(name):
    summary, equation, *notes, source = (inspect.getdoc(LISTWISE[name]) or "").split("\n\n")
    assert summary.endswith(".")
    assert "\n" not in summary
    assert notes
    assert equation.split()[:2] == ["L", "="]
    assert "(arXiv " in source
