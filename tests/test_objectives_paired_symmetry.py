"""What must not change the paired objectives, and what must: swapped pairs, shifts, padding and garbage, the reference,
weights, the order of the pairs; and parameters out of range."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from mmalign.core.objectives.common import capped_exp, log1mexp
from mmalign.core.objectives.paired import CHOSEN_ONLY, PAIRED, PAIRED_BATCH_DEPENDENT, PAIRED_REFERENCE_FREE
from mmalign.core.types import LogProbs, Pair
from tests.paired_in_numbers import WITH_NLL, numbers_of
from tests.pairs import CASES, gradients, leaves, loss_of, pick, random_pairs, rows, swapped, values_of, with_values

PREFERENCE = sorted(set(PAIRED) - CHOSEN_ONLY)
LN2 = math.log(2)
NO_NLL = {"alpha": 0.0}


@pytest.mark.parametrize("name", PREFERENCE)
def test_swapping_the_pair_negates_the_margin(name):
    policy, reference = random_pairs(1)
    metrics = PAIRED[name](policy, reference)[1]
    mirrored = PAIRED[name](swapped(policy), swapped(reference))[1]
    assert mirrored["rewards/margins"].item() == pytest.approx(-metrics["rewards/margins"].item())
    assert mirrored["rewards/accuracies"].item() == pytest.approx(1 - metrics["rewards/accuracies"].item())
    assert mirrored["logps/chosen"].item() == pytest.approx(metrics["logps/rejected"].item())
    assert not any(value.requires_grad for value in PAIRED[name](leaves(policy), reference)[1].values())


@pytest.mark.parametrize(
    ("name", "parameters", "factor"),
    [
        # softplus(z) - softplus(-z) = z, and the metrics hold the mean of z
        ("dpo", {}, 1.0),
        ("dpo", {"label_smoothing": 0.2}, 0.6),  # (1-e) z - e z
        ("robust", {"label_smoothing": 0.2}, 1 / 0.6),  # ((1-e) z + e z) / (1-2e)
        ("spin", {}, 1.0),
        ("cream", {}, 1.0),
        ("mm_dpo", {}, 1.0),
        ("ln_dpo", {}, 1.0),
        ("ipo", {"beta": 0.4}, 2 / 0.4**2),  # (D + 1/2b)^2 - (D - 1/2b)^2 = 2D/b, and z = b D
        ("ipo", {"beta": 0.4, "normalize": True}, 2 / 0.4**2),
        ("sppo", {"beta": 0.4}, 2 / 0.4**2),
        ("bco_pair", {}, 1.0),  # once for beta c, once for -beta r
        ("aot", {}, 1.0),  # the sum of sorted differences is the sum of differences
        ("aot_unpaired", {}, 1.0),
        ("rpo", {"eta": 0.0}, 1.0),
        ("cpo", NO_NLL, 1.0),
        ("tpo", NO_NLL, 1.0),
        ("simpo", {"gamma_beta_ratio": 0.0}, 1.0),
    ],
)
def test_swapping_the_pair_changes_the_loss_by_the_margin(name, parameters, factor):
    policy, reference = random_pairs(2)
    loss, metrics = PAIRED[name](policy, reference, **parameters)
    mirrored, _ = PAIRED[name](swapped(policy), swapped(reference), **parameters)
    assert (mirrored - loss).item() == pytest.approx(factor * metrics["rewards/margins"].item(), rel=1e-9)


def test_swapping_the_pair_mirrors_apo_zero_and_cream():
    policy, reference = random_pairs(2)
    mirrored = swapped(policy), swapped(reference)
    both = loss_of("apo_zero", policy, reference) + loss_of("apo_zero", *mirrored)
    assert both.item() == pytest.approx(2.0)  # sigma(x) + sigma(-x) = 1, twice
    trust = {"consistency": [0.9, 0.3, 0.5, 0.0]}
    doubt = {"consistency": [0.1, 0.7, 0.5, 1.0]}
    assert loss_of("cream", policy, reference, trust).item() == pytest.approx(loss_of("cream", *mirrored, doubt).item())


def shift(pair: Pair, by: float) -> Pair:
    """The same constant on the log-prob of every sample."""
    first = torch.zeros_like(pair.chosen.values[0])
    other = torch.zeros_like(pair.rejected.values[0])
    first[0] = other[0] = by  # the first action has weight 1
    return with_values(pair, pair.chosen.values + first, pair.rejected.values + other)


SEES_ONLY_THE_MARGIN = {
    "dpo": {},
    "robust": {},
    "hinge": {},
    "ipo": {},
    "exo": {},
    "discopop": {},
    "ld_dpo": {},
    "f_dpo": {},
    "spin": {},
    "cream": {},
    "mm_dpo": {},
    "aot": {},
    "aot_unpaired": {},
    "rpo": {"eta": 0.0},
    "cpo": NO_NLL,
    "tpo": NO_NLL,
}


@pytest.mark.parametrize("name", PAIRED)
def test_a_constant_on_both_log_probs_is_seen_only_by_who_looks_beyond_the_margin(name):
    policy, reference = random_pairs(3)
    parameters = SEES_ONLY_THE_MARGIN.get(name, {})
    before = loss_of(name, policy, reference, None, parameters).item()
    after = loss_of(name, shift(policy, -0.75), reference, None, parameters).item()
    assert (after == pytest.approx(before, rel=1e-12)) == (name in SEES_ONLY_THE_MARGIN)


def test_the_shift_of_bco_takes_a_constant_back():
    policy, reference = random_pairs(3)
    before = loss_of("bco_pair", policy, reference, {"shift": 0.0}, {"beta": 0.4})
    after = loss_of("bco_pair", shift(policy, -0.75), reference, {"shift": -0.75 * 0.4}, {"beta": 0.4})
    assert after.item() == pytest.approx(before.item(), rel=1e-12)
    delta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert not loss_of("bco_pair", policy, reference, {"shift": delta}).requires_grad


def spoil(rows: LogProbs, garbage: float, columns: int) -> LogProbs:
    """Garbage in every masked position, and `columns` more of them."""
    masked = rows.weight == 0
    more = torch.full((len(masked), columns), garbage, dtype=rows.values.dtype)
    assert rows.log_collision is not None
    values, collision = (
        torch.cat([item.detach().masked_fill(masked, garbage), more], 1) for item in (rows.values, rows.log_collision)
    )
    return LogProbs(values, torch.cat([rows.weight, torch.zeros_like(more)], 1), collision)


@pytest.mark.parametrize(("name", "extra", "parameters"), CASES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_and_what_stands_in_masked_positions_never_matter(name, extra, parameters, garbage):
    policy, reference = random_pairs(4)
    policy = leaves(policy)
    loss = loss_of(name, policy, reference, extra, parameters)
    bad_policy, bad_reference = (
        Pair(spoil(pair.chosen, garbage, 3), spoil(pair.rejected, garbage, 2)) for pair in (policy, reference)
    )
    bad_policy = leaves(bad_policy)
    again = loss_of(name, bad_policy, bad_reference, extra, parameters)
    assert again.item() == pytest.approx(loss.item(), rel=1e-14)
    for clean, spoiled in zip(gradients(loss, policy), gradients(again, bad_policy), strict=True):
        torch.testing.assert_close(spoiled[:, : clean.shape[1]], clean, rtol=1e-12, atol=0)
        assert not spoiled[:, clean.shape[1] :].any()


@pytest.mark.parametrize("name", sorted(set(PAIRED) - PAIRED_REFERENCE_FREE))
def test_the_reference_moves_the_loss_and_gets_no_gradient(name):
    policy, reference = random_pairs(5)
    loss = loss_of(name, policy, leaves(reference))
    assert not loss.requires_grad
    assert loss.item() != loss_of(name, policy, random_pairs(6)[1]).item()


@pytest.mark.parametrize("name", sorted(PAIRED_REFERENCE_FREE))
def test_reference_free_objectives_ignore_the_reference(name):
    policy, reference = random_pairs(5)
    assert loss_of(name, policy, None).item() == loss_of(name, policy, reference).item()
    assert "The reference is ignored and may be None." in " ".join((PAIRED[name].__doc__ or "").split())


def test_sft_reads_liked_samples_alone():
    policy, _ = random_pairs(5)
    liked = Pair(policy.chosen, policy.rejected.rows(0, 0))
    assert loss_of("sft", liked, None).item() == policy.chosen.nll().item()


@pytest.mark.parametrize("name", PAIRED)
def test_weights_of_pairs(name):
    policy, reference = random_pairs(7)
    ones = replace(policy, weight=torch.ones(4))
    assert loss_of(name, ones, reference).item() == pytest.approx(loss_of(name, policy, reference).item(), rel=1e-15)
    one, anchor = pick(policy, [2]), pick(reference, [2])
    double = loss_of(name, replace(one, weight=torch.tensor([2.0])), anchor)
    assert double.item() == pytest.approx(2 * loss_of(name, one, anchor).item(), rel=1e-15)
    # weight 0 takes the pair out of everything but the count of pairs
    without = leaves(replace(policy, weight=torch.tensor([1.0, 0.0, 1.0, 1.0])))
    loss = loss_of(name, without, reference)
    assert not any(part[1].any() for part in gradients(loss, without))
    if name not in WITH_NLL:
        rest = loss_of(name, pick(policy, [0, 2, 3]), pick(reference, [0, 2, 3]))
        assert loss.item() == pytest.approx(0.75 * rest.item(), rel=1e-14)


@pytest.mark.parametrize("name", PAIRED)
def test_the_order_of_the_pairs_does_not_matter(name):
    policy, reference = random_pairs(8)
    policy = replace(policy, weight=torch.tensor([1.0, 0.5, 0.0, 3.0]))
    order = [2, 0, 3, 1]
    permuted = loss_of(name, pick(policy, order), pick(reference, order))
    assert permuted.item() == pytest.approx(loss_of(name, policy, reference).item(), rel=1e-14)


def test_what_the_sorted_objectives_see_of_the_batch():
    # margins of the policy 1, 5, 3.5, 0.5, of the reference 2, -1, 0, 4; c = 1, 3, 0.5, -1; r = 2, -3, -3, 2.5
    policy = Pair(rows([[-1.0], [-3.0], [-0.5], [-2.0]]), rows([[-2.0], [-8.0], [-4.0], [-2.5]]))
    reference = Pair(rows([[-2.0], [-6.0], [-1.0], [-1.0]]), rows([[-4.0], [-5.0], [-1.0], [-5.0]]))
    # aot_unpaired does not know which rejected sample came with which chosen one; aot does
    order, others = [0, 1, 2, 3], [3, 2, 0, 1]
    mixed = pick(policy, order, others), pick(reference, order, others)
    assert loss_of("aot_unpaired", *mixed).item() == pytest.approx(loss_of("aot_unpaired", policy, reference).item())
    assert loss_of("aot", *mixed).item() != pytest.approx(loss_of("aot", policy, reference).item())
    for name in PAIRED_BATCH_DEPENDENT:
        single = pick(policy, [1]), pick(reference, [1])
        assert loss_of(name, *single).item() == pytest.approx(loss_of("dpo", *single).item())
        # the batch is not the mean of its pairs
        batch, pairs = loss_of(name, policy, reference).item(), loss_of("dpo", policy, reference).item()
        assert batch != pytest.approx(pairs)
        nobody = replace(policy, weight=torch.zeros(4))
        assert loss_of(name, nobody, reference).item() == 0


def test_special_cases_are_dpo():
    policy, reference = random_pairs(10)
    dpo = loss_of("dpo", policy, reference).item()
    for name, parameters in (
        ("robust", {"label_smoothing": 0.0}),
        ("ld_dpo", {"alpha": 1.0}),
        ("f_dpo", {"divergence": "reverse_kl"}),
        ("f_dpo", {"divergence": "alpha", "alpha": 1 + 1e-9}),
        ("rpo", {"eta": 0.0}),
        ("mm_dpo", {"scaling": 0.0}),
    ):
        assert loss_of(name, policy, reference, None, parameters).item() == pytest.approx(dpo, rel=1e-6)
    zeros = with_values(policy, *(torch.zeros_like(side) for side in values_of(policy)))
    cpo = loss_of("cpo", policy, None, None, NO_NLL).item()
    assert cpo == pytest.approx(loss_of("dpo", policy, zeros).item())  # a uniform reference


@pytest.mark.parametrize("name", ["orpo", "asft"])
def test_probabilities_of_one_are_finite(name):
    for dtype in (torch.float64, torch.float32):
        for chosen, rejected in ((0.0, 0.0), (0.0, -1e-30), (-1e-30, 0.0), (-1e4, 0.0), (0.0, -1e4)):
            one = torch.ones(1, 1, dtype=dtype)
            policy = leaves(Pair(LogProbs(chosen * one, one), LogProbs(rejected * one, one)))
            loss = loss_of(name, policy, None)
            assert loss.isfinite()
            assert all(part.isfinite().all() for part in gradients(loss, policy))


def test_log1mexp_is_accurate_at_both_ends():
    # near 0: 1 - exp(-x) = x - x^2/2; far away: log(1 - y) = -y
    points = torch.tensor([-1e-12, -0.5, -LN2, -1.0, -50.0], dtype=torch.float64, requires_grad=True)
    expected = [math.log(1e-12) - 5e-13, math.log(1 - math.exp(-0.5)), -LN2, math.log(1 - math.exp(-1)), -math.exp(-50)]
    values = log1mexp(points)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    (slope,) = torch.autograd.grad(values.sum(), points)  # -1 / (exp(-x) - 1)
    expected = [-1 / math.expm1(-x) for x in points.tolist()]
    torch.testing.assert_close(slope, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_capped_exp_is_exact_until_the_dtype_overflows_and_keeps_its_slope():
    exact = torch.tensor([-1e4, -100.0, 0.0, 100.0, 600.0], dtype=torch.float64)
    assert torch.equal(capped_exp(exact), exact.exp())
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([1e3, 1e30], dtype=dtype, requires_grad=True)
        value = capped_exp(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert (value * 2.0**31).isfinite().all()
        assert torch.equal(slope, value)


NUMBER = "a number, 0 or above"


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("dpo", {"label_smoothing": 0.5}, r"objective.label_smoothing is 0.5; expected a number in \[0, 0.5\)"),
        ("dpo", {"label_smoothing": -0.1}, "label_smoothing"),
        ("robust", {"label_smoothing": 0.5}, "label_smoothing"),
        ("exo", {"label_smoothing": 0.0}, "objective.label_smoothing is 0.0; expected .* no logarithm"),
        ("exo", {"label_smoothing": 0.6}, "label_smoothing"),
        ("discopop", {"tau": 0.0}, "objective.tau is 0.0"),
        ("discopop", {"tau": -1.0}, "tau"),
        ("ld_dpo", {"alpha": 1.5}, "alpha"),
        ("ld_dpo", {"alpha": -0.1}, "alpha"),
        (
            "f_dpo",
            {"divergence": "kl"},
            "divergence is 'kl'; expected one of reverse_kl, forward_kl, js, alpha",
        ),
        ("f_dpo", {"alpha": 1.0}, "objective.alpha is 1.0; .*reverse_kl"),
        ("f_dpo", {"alpha": math.nan}, "alpha"),
        ("rpo", {"eta": -1.0}, NUMBER),
        ("rpo", {"sft_reduction": "token"}, "sum or mean"),
        ("mm_dpo", {"scaling": -0.5}, NUMBER),
        ("mm_dpo", {"sensitivity": -0.5}, NUMBER),
        ("seppo", {"anchor": "signed"}, "objective.anchor is 'signed'; expected sign or indicator"),
        ("seppo", {"at_zero": 2.0}, "at_zero"),
        ("cpo", {"alpha": -1.0}, NUMBER),
        ("tpo", {"alpha": math.nan}, NUMBER),
        ("simpo", {"gamma_beta_ratio": -0.5}, NUMBER),
        ("orpo", {"penalty": -0.1}, NUMBER),
        ("asft", {"penalty": math.inf}, NUMBER),
    ],
)
def test_parameters_out_of_range_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        loss_of(name, *random_pairs(11), None, parameters)


@pytest.mark.parametrize("name", [name for name in PAIRED if "beta" in inspect.signature(PAIRED[name]).parameters])
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_must_be_a_number_above_0(name, beta):
    with pytest.raises(ValueError, match=r"objective\.beta is .*; expected a number above 0"):
        loss_of(name, *random_pairs(11), None, {"beta": beta})


@pytest.mark.parametrize("name", PAIRED)
def test_docstrings_are_summary_equation_notes_source(name):
    summary, equation, *_, source = (inspect.getdoc(PAIRED[name]) or "").split("\n\n")
    assert summary.endswith(".")
    assert "\n" not in summary
    assert all(line.startswith("    ") for line in equation.splitlines())
    assert equation.split()[:2] == ["L", "="]
    assert "(arXiv " in source
    keywords = [p for p in inspect.signature(PAIRED[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert all(isinstance(p.default, float | bool | str) for p in keywords)


def test_the_numbers_of_this_file_are_of_very_unequal_lengths():
    counts = [(len(numbers.w), len(numbers.l)) for numbers in numbers_of(*random_pairs(0))]
    assert counts == [(3, 6), (1, 5), (14, 1), (2, 2)]
