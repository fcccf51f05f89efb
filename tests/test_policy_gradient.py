"""Policy gradients: the surrogate with each of its choices, its named rows, D3PO, Nash-MD and the value loss."""

import inspect
import itertools
import math

import pytest
import torch
from torch import Tensor

from mmalign.core.objectives.policy_gradient import POLICY_GRADIENT, clipped_value_loss, surrogate
from mmalign.core.types import LogProbs
from tests.pairs import random_rows
from tests.samples import GARBAGE, LENGTHS, SHORT, column, dirty, gradient, leaf, log_sigma, sigma, softplus, sums

LN2 = math.log(2)
ADVANTAGES = [1.2, -0.7, 0.5, 0.0, -1.6, 2.0]
PER_SAMPLE = {"rloo", "d3po", "nash_md"}
# defaults of the surrogate that each named row changes, or fixes
ROWS = {
    "ppo": {"aggregate": "token_mean"},
    "grpo": {"kl_beta": 0.04},
    "dr_grpo": {"aggregate": "constant"},
    "dapo": {"aggregate": "token_mean", "clip_high": 0.28},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "ddpo": {"aggregate": "token_mean", "clip_low": 1e-4, "clip_high": 1e-4},
}


def rollout(seed, spread=0.6, lengths=LENGTHS):
    """(policy, old, reference), dirty; the log-ratios are of the size of the clip."""
    policy = random_rows(seed, lengths)
    generator = torch.Generator().manual_seed(seed + 50)

    def near() -> LogProbs:
        noise = spread * torch.randn(policy.values.shape, dtype=torch.float64, generator=generator)
        return dirty(LogProbs(policy.values + noise, policy.weight))

    return dirty(policy), near(), near()


def per_action(policy, seed=0):
    """An advantage per action, garbage where there is none."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(policy.values.shape, dtype=torch.float64, generator=generator)
    return dirty(LogProbs(values, policy.weight)).values


def advantages(*values: float) -> Tensor:
    return torch.tensor(values or ADVANTAGES, dtype=torch.float64)


def actions_of(policy, *others):
    """For every sample its actions: (weight, log-prob, ...) of each that counts."""
    columns = [rows.values if isinstance(rows, LogProbs) else rows for rows in (policy, *others)]
    weight = policy.weight.tolist()
    return [
        [
            (weight[row][t], *(one[row, t].item() for one in columns))
            for t in range(len(weight[row]))
            if weight[row][t] != 0
        ]
        for row in range(len(weight))
    ]


def in_numbers(
    policy, old, advantage, reference, *, clip_low=0.2, clip_high=0.2, clip="two_sided", ratio="token",
    aggregate="sequence_mean", max_length=1.0, kl_beta=0.0, kl_estimator="k3",
):  # fmt: skip
    """The surrogate once more: no tensors, one action at a time."""
    if advantage.ndim == 1:
        advantage = advantage[:, None].expand(policy.values.shape)
    totals = []
    for row in actions_of(policy, old, advantage, reference):
        length = sum(action[0] for action in row)
        joint = math.exp(sum(w * (new - before) for w, new, before, *_ in row) / length)
        total = 0.0
        for w, new, before, gain, anchor in row:
            rho = math.exp(new - before) if ratio == "token" else joint
            low = 1 - clip_low if clip == "two_sided" else -math.inf
            loss = -min(rho * gain, min(max(rho, low), 1 + clip_high) * gain)
            x = anchor - new
            loss += kl_beta * {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - x - 1}[kl_estimator]
            total += w * loss
        totals.append((total, length))
    if aggregate == "token_mean":
        return sum(total for total, _ in totals) / sum(length for _, length in totals)
    per_length = [total / (length if aggregate == "sequence_mean" else max_length) for total, length in totals]
    return sum(per_length) / len(per_length)


CHOICES = [
    {"ratio": ratio, "aggregate": aggregate, "clip": clip}
    for ratio, aggregate, clip in itertools.product(
        ("token", "sequence"), ("sequence_mean", "token_mean", "constant"), ("two_sided", "upper")
    )
] + [{"kl_beta": 0.3, "kl_estimator": one, "max_length": 7.0, "aggregate": "constant"} for one in ("k1", "k2", "k3")]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_surrogate_agrees_with_the_formula_in_plain_numbers(choice):
    for seed in range(2):
        policy, old, reference = rollout(seed)
        policy = leaf(policy)
        for advantage in (advantages(), per_action(policy, seed)):
            loss, metrics = surrogate(policy, old, advantage, reference, clip_low=0.1, clip_high=0.3, **choice)
            expected = in_numbers(policy, old, advantage, reference, clip_low=0.1, clip_high=0.3, **choice)
            assert loss.item() == pytest.approx(expected, rel=1e-12)
            slope = gradient(loss, policy)
            assert slope.isfinite().all()
            assert (slope[policy.weight == 0] == 0).all()
            assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", ROWS)
def test_named_rows_are_arguments_of_the_surrogate(name):
    policy, old, reference = rollout(3, spread=1e-3 if name in ("gspo", "ddpo") else 0.6)
    shown = {
        key: item.default
        for key, item in inspect.signature(POLICY_GRADIENT[name]).parameters.items()
        if item.kind is item.KEYWORD_ONLY
    }
    plain = {
        key: item.default
        for key, item in inspect.signature(surrogate).parameters.items()
        if item.kind is item.KEYWORD_ONLY
    }
    for key, value in shown.items():
        if key in plain:
            assert value == ROWS[name].get(key, plain[key]), key
    for changed in ({}, {"clip_low": 0.05, "clip_high": 0.4, "kl_beta": 0.7, "kl_estimator": "k2"}):
        if name == "dr_grpo" and changed:
            changed = changed | {"max_length": 12.0}
        for advantage in (advantages(), per_action(policy)):
            loss, _ = POLICY_GRADIENT[name](policy, old, advantage, reference, **changed)
            held = advantage.clamp(-5, 5) if name == "ddpo" else advantage
            expected = in_numbers(policy, old, held, reference, **(ROWS[name] | changed))
            assert loss.item() == pytest.approx(expected, rel=1e-11)


# Two samples, two actions and one; rho = 2, 1/2 and 1.1 (weights 1).
LOG2 = math.log(2)
HAND_POLICY = LogProbs(
    torch.tensor([[-1.0, -2.0], [-1.0, math.nan]], dtype=torch.float64),
    torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
)
HAND_OLD = LogProbs(
    torch.tensor([[-1.0 - LOG2, -2.0 + LOG2], [-1.0 - math.log(1.1), math.inf]], dtype=torch.float64),
    HAND_POLICY.weight,
)
BY_HAND = [
    # A = 1: min(2, 1.2) + min(1/2, 0.8) = 1.7 over 2 actions; A = -1: max(1.1, 1.1) = 1.1
    ("ppo", [1.0, -1.0], {}, (-1.7 + 1.1) / 3),
    ("grpo", [1.0, -1.0], {}, (-1.7 / 2 + 1.1) / 2),
    ("dr_grpo", [1.0, -1.0], {}, (-1.7 + 1.1) / 2),
    ("dr_grpo", [1.0, -1.0], {"max_length": 10.0}, (-0.17 + 0.11) / 2),
    # A = 1: min(2, 1.28) + 1/2
    ("dapo", [1.0, -1.0], {}, (-1.78 + 1.1) / 3),
    # A = -1: max(2, 1.2) + max(1/2, 0.8); A = 2: min(2.2, 2.4)
    ("ppo", [-1.0, 2.0], {}, (2.8 - 2.2) / 3),
    # without a lower clip: max(2, 1.2) + 1/2
    ("surrogate", [-1.0, 2.0], {"clip": "upper", "aggregate": "token_mean"}, (2.5 - 2.2) / 3),
    # the geometric mean of 2 and 1/2 is 1; 1.1 is clipped to 1.0004 for A = 1, not for A = -1
    ("gspo", [1.0, 1.0], {}, (-1 - 1.0004) / 2),
    ("gspo", [1.0, -1.0], {}, (-1 + 1.1) / 2),
    # the product of 2 and 1/2 is 1
    ("rloo", [1.0, -1.0], {}, (-1 + 1.1) / 2),
    # A is held at 5: 5 (1.0001 + 1/2); -5: 5 x 1.1
    ("ddpo", [9.0, -70.0], {}, (-7.5005 + 5.5) / 3),
]


@pytest.mark.parametrize(("name", "advantage", "parameters", "expected"), BY_HAND)
def test_values_derived_by_hand(name, advantage, parameters, expected):
    loss, _ = POLICY_GRADIENT[name](HAND_POLICY, HAND_OLD, advantages(*advantage), **parameters)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_kl_term_by_hand():
    # x = l_ref - l = ln 2, -ln 2 and 0: k3 = 2 - ln 2 - 1, 1/2 + ln 2 - 1, 0; A = 0 leaves nothing else
    values = torch.tensor([[-1.0 + LOG2, -2.0 - LOG2], [-1.0, -math.inf]], dtype=torch.float64)
    reference = LogProbs(values, HAND_POLICY.weight)
    for name, estimator, pair in (
        ("grpo", "k3", (1 - LOG2) + (LOG2 - 0.5)),
        ("grpo", "k2", LOG2**2),
        ("grpo", "k1", 0.0),
        ("ppo", "k3", 0.5),
    ):
        loss, metrics = POLICY_GRADIENT[name](
            HAND_POLICY, HAND_OLD, advantages(0.0, 0.0), reference, kl_beta=0.1, kl_estimator=estimator
        )
        # the mean over 2 actions, then over 2 sequences; or over all 3 actions
        expected = 0.1 * pair / (4 if name == "grpo" else 3)
        assert loss.item() == pytest.approx(expected, abs=1e-15)
        assert metrics["kl"].item() == pytest.approx(pair / 3, abs=1e-15)
    without, metrics = POLICY_GRADIENT["grpo"](HAND_POLICY, HAND_OLD, advantages(0.0, 0.0))
    assert without.item() == 0
    assert "kl" not in metrics


def test_the_kl_estimate_keeps_its_digits_where_models_are_close():
    policy = leaf(column(-1.0))
    x = 2.0**-24  # its square over 2 is 2^-49, far below the rounding of exp(x) - x - 1
    loss, _ = surrogate(policy, policy, advantages(0.0), column(-1.0 + x), kl_beta=1.0)
    assert loss.item() == pytest.approx(x * x / 2, rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(POLICY_GRADIENT) - {"d3po", "nash_md"}))
def test_on_the_first_pass_the_ratio_is_1_and_the_gradient_that_of_reinforce(name):
    policy, _, _ = rollout(4)
    policy = leaf(policy)
    loss, metrics = POLICY_GRADIENT[name](policy, policy, advantages())
    assert metrics["ratio"].item() == 1
    assert metrics["approx_kl"].item() == 0
    assert metrics["clip_fraction"].item() == 0
    weight, length = policy.weight, policy.length()[:, None]
    divisor = {"ppo": weight.sum(), "dapo": weight.sum(), "ddpo": weight.sum(), "dr_grpo": 6.0, "rloo": 6.0}
    expected = -advantages()[:, None] * weight / divisor.get(name, 6 * length)
    torch.testing.assert_close(gradient(loss, policy), expected)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_beyond_the_clip_only_mistakes_have_a_gradient(ratio):
    # rho is far above 1 in the first two samples, far below in the others
    policy, old = leaf(column(-1.0, -1.0, -3.0, -3.0)), column(-2.0, -2.0, -2.0, -2.0)
    gain = advantages(1.0, -1.0, 1.0, -1.0)
    loss, metrics = surrogate(policy, old, gain, ratio=ratio)
    slope = gradient(loss, policy)[:, 0]
    assert (slope == 0).tolist() == [True, False, False, True]
    assert metrics["clip_fraction"].item() == 0.5
    # nothing below holds it with the upper clip alone
    loss, metrics = surrogate(policy, old, gain, ratio=ratio, clip="upper")
    assert (gradient(loss, policy)[:, 0] == 0).tolist() == [True, False, False, False]
    assert metrics["clip_fraction"].item() == 0.25


def test_metrics_are_means_over_real_actions():
    policy, old, reference = rollout(5)
    _, metrics = surrogate(policy, old, advantages(), reference, clip_low=0.1, clip_high=0.3)
    actions = [
        (gain, *action)
        for gain, row in zip(ADVANTAGES, actions_of(policy, old, reference), strict=True)
        for action in row
    ]
    total = sum(w for _, w, *_ in actions)

    def mean(f):
        return sum(w * f(gain, new - before, anchor - new) for gain, w, new, before, anchor in actions) / total

    assert metrics["ratio"].item() == pytest.approx(mean(lambda _, d, x: math.exp(d)))
    assert metrics["approx_kl"].item() == pytest.approx(mean(lambda _, d, x: math.exp(d) - 1 - d))
    assert metrics["kl"].item() == pytest.approx(mean(lambda _, d, x: math.exp(x) - 1 - x))
    expected = mean(lambda gain, d, x: (gain > 0 and math.exp(d) > 1.3) or (gain < 0 and math.exp(d) < 0.9))
    assert metrics["clip_fraction"].item() == pytest.approx(expected)


def inputs_of(name, seed, lengths=LENGTHS):
    spread = {"gspo": 1e-3, "ddpo": 3e-4, "d3po": 0.1}.get(name, 0.4)
    policy, old, reference = rollout(seed, spread, lengths)
    return policy, old, advantages() if name in PER_SAMPLE else per_action(policy, seed), reference


@pytest.mark.parametrize("name", sorted(set(POLICY_GRADIENT) - {"nash_md"}))
def test_gradcheck(name):
    policy, old, advantage, reference = inputs_of(name, 6, SHORT)
    # rows with a narrow clip are looked at with a wide one: a difference quotient must not step over its edge
    wide = {"gspo": {"clip_low": 0.4}, "ddpo": {"clip_low": 0.4, "clip_high": 0.4}}.get(name, {})

    def loss(values):
        return POLICY_GRADIENT[name](LogProbs(values, policy.weight), old, advantage, reference, **wide)[0]

    assert torch.autograd.gradcheck(loss, leaf(policy).values)


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_gradients_flow_into_the_policy_alone(name):
    policy, old, advantage, reference = inputs_of(name, 7)
    policy, old, reference = leaf(policy), leaf(old), leaf(reference)
    advantage = advantage.clone().requires_grad_()
    POLICY_GRADIENT[name](policy, old, advantage, reference)[0].backward()
    assert policy.values.grad is not None
    assert policy.values.grad.isfinite().all()
    assert (policy.values.grad[policy.weight == 0] == 0).all()
    assert old.values.grad is reference.values.grad is advantage.grad is None


@pytest.mark.parametrize("name", POLICY_GRADIENT)
@pytest.mark.parametrize("far", [100.0, -100.0])
def test_log_ratios_of_100_are_finite(name, far):
    for dtype in (torch.float64, torch.float32):
        policy = leaf(column(far, -far, far, -far, dtype=dtype))
        zero = column(0.0, 0.0, 0.0, 0.0, dtype=dtype)
        gain = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=dtype)
        loss, metrics = POLICY_GRADIENT[name](policy, zero, gain, zero)
        assert loss.dtype == dtype
        assert loss.isfinite()
        assert gradient(loss, policy).isfinite().all()
        assert all(value.isfinite() for value in metrics.values())


def test_log_ratios_of_100_are_exact_in_float64():
    values, zero = (100.0, -100.0, 100.0, -100.0), column(0.0, 0.0, 0.0, 0.0)
    policy, gain = column(*values), advantages(1.0, 1.0, -1.0, -1.0)
    loss, _ = POLICY_GRADIENT["grpo"](policy, zero, gain, zero, kl_beta=1.0)
    expected = (-1.2 - math.exp(-100) + math.exp(100) + 0.8 + 2 * (math.exp(100) + math.exp(-100) - 2)) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_likely_actions_of_good_samples_rise(name):
    policy = leaf(rollout(8)[0])
    gain = advantages(1.0, -1.0, 1.0, -1.0, 1.0, -1.0)
    slope = gradient(POLICY_GRADIENT[name](policy, policy, gain)[0], policy).sum(-1)
    if name == "d3po":  # samples of different lengths share only some of their steps
        slope = slope[:2]
    assert (torch.sign(slope) == -torch.sign(gain[: len(slope)])).all()


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_samples_without_actions_and_advantages_of_0_teach_nothing(name):
    policy, old, _, reference = inputs_of(name, 9)
    empty = LogProbs(torch.full_like(policy.values, math.nan), torch.zeros_like(policy.weight)).values.clone()
    bare = leaf(LogProbs(empty, torch.zeros_like(policy.weight)))
    loss, metrics = POLICY_GRADIENT[name](bare, LogProbs(empty, bare.weight), advantages())
    assert loss.item() == 0
    assert (gradient(loss, bare) == 0).all()
    assert all(value.isfinite() for value in metrics.values())
    policy = leaf(policy)
    loss, _ = POLICY_GRADIENT[name](policy, old, torch.zeros(6, dtype=torch.float64))
    assert (gradient(loss, policy) == 0).all()
    assert loss.item() == pytest.approx(LN2 if name == "d3po" else 0.0)


@pytest.mark.parametrize("name", sorted(set(POLICY_GRADIENT) - {"d3po"}))
def test_a_single_sample_is_enough(name):
    policy, old, _, reference = inputs_of(name, 10)
    policy = leaf(policy.pick(slice(2, 3)))
    loss, _ = POLICY_GRADIENT[name](policy, old.pick(slice(2, 3)), advantages(0.5), reference.pick(slice(2, 3)))
    assert gradient(loss, policy).isfinite().all()


def test_one_advantage_per_sample_is_the_same_on_all_its_actions():
    policy, old, reference = rollout(11)
    wide = advantages()[:, None].expand(policy.values.shape)
    for name in ROWS:
        loss, _ = POLICY_GRADIENT[name](policy, old, advantages(), reference)
        assert loss.item() == POLICY_GRADIENT[name](policy, old, wide, reference)[0].item()


def test_rloo_takes_a_whole_answer_as_one_action():
    policy, old, _ = rollout(12, spread=0.1)
    loss, _ = POLICY_GRADIENT["rloo"](policy, old, advantages())
    terms = []
    for gain, new, before in zip(ADVANTAGES, sums(policy), sums(old), strict=True):
        rho = math.exp(new - before)
        terms.append(-min(rho * gain, min(max(rho, 0.8), 1.2) * gain))
    assert loss.item() == pytest.approx(sum(terms) / 6, rel=1e-12)


def test_d3po_agrees_with_the_released_loss_in_plain_numbers():
    for seed in range(3):
        policy, old, reference = rollout(seed, spread=0.1)
        signs = [1, -1, -1, 1, 0, 0]
        for anchor in (reference, None):
            loss, _ = POLICY_GRADIENT["d3po"](policy, old, advantages(*signs), anchor, beta=0.4, clip=0.08)
            total = count = 0.0
            for first in (0, 2, 4):
                for t in range(policy.values.shape[1]):
                    weight = min(policy.weight[first, t].item(), policy.weight[first + 1, t].item())
                    if weight == 0:
                        continue
                    logit = 0.0
                    for row in (first, first + 1):
                        other = old if anchor is None else anchor
                        ratio = math.exp(policy.values[row, t].item() - other.values[row, t].item())
                        logit += 0.4 * signs[row] * math.log(min(max(ratio, 0.92), 1.08))
                    total -= weight * log_sigma(logit)
                    count += weight
            assert loss.item() == pytest.approx(total / count, rel=1e-12)


def test_d3po_by_hand():
    # log R = ln 1.1 (clipped), -0.05, preferred second: beta (-ln 1.1 - 0.05)
    policy = leaf(column(-1.0, -2.05))
    loss, metrics = POLICY_GRADIENT["d3po"](policy, column(-2.0, -2.0), advantages(-3.0, 0.5), beta=2.0)
    logit = -2 * (math.log(1.1) + 0.05)
    assert loss.item() == pytest.approx(softplus(-logit))
    assert metrics["clip_fraction"].item() == 0.5
    # the clipped side has no gradient; the other -beta s sigma(-logit)
    assert gradient(loss, policy)[:, 0].tolist() == pytest.approx([0, -2 * sigma(-logit)])
    equal, _ = POLICY_GRADIENT["d3po"](policy, policy, advantages(1.0, -1.0))
    assert equal.item() == pytest.approx(LN2)


def test_nash_md_is_the_published_gradient():
    policy, old, reference = rollout(13)
    policy = leaf(policy)
    preferred = torch.tensor([0.9, 0.2, 0.5, 0.6, 0.1, 1.0], dtype=torch.float64)
    for anchor, tau in ((reference, 0.05), (None, 0.0)):
        loss, metrics = POLICY_GRADIENT["nash_md"](policy, old, preferred - 0.5, anchor, tau=0.05)
        drift = [a - b for a, b in zip(sums(policy), sums(reference), strict=True)]
        gains = [p - 0.5 - tau * d for p, d in zip(preferred.tolist(), drift, strict=True)]
        expected = -sum(gain * s for gain, s in zip(gains, sums(policy), strict=True)) / 6
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        # mean of (P - 1/2 - tau log(pi/pi_ref)) grad log pi, descended
        slope = -torch.tensor(gains)[:, None] * policy.weight / 6
        torch.testing.assert_close(gradient(loss, policy), slope)
        assert ("kl" in metrics) == (anchor is not None)


def test_the_value_loss_by_hand():
    # v_old = 0, R = 1, clip 0.2. v = 0.1 is inside: 0.81. v = 0.5 is held at 0.2: max(0.25, 0.64).
    # v = -0.5 is held at -0.2: max(2.25, 1.44). The last one is not real.
    values = torch.tensor([[0.1, 0.5], [-0.5, math.nan]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[0.0, 0.0], [0.0, math.inf]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    loss, metrics = clipped_value_loss(values, old, old + 1, weight)
    assert loss.item() == pytest.approx((0.81 + 0.64 + 2.25) / 6)
    assert metrics["value_clip_fraction"].item() == pytest.approx(1 / 3)
    # 1/2 d/dv (v - 1)^2 = v - 1, over 3; none beyond the clip
    (slope,) = torch.autograd.grad(loss, values)
    assert slope.flatten().tolist() == pytest.approx([-0.9 / 3, 0, -1.5 / 3, 0])


def test_the_value_loss_agrees_with_the_formula_in_plain_numbers():
    policy, old, reference = rollout(14)
    values, before, target, weight = policy.values, old.values, reference.values, policy.weight
    loss, _ = clipped_value_loss(values, before, target, weight, clip=0.3)
    total = count = 0.0
    for row in actions_of(policy, old, reference):
        for w, v, v_old, goal in row:
            held = min(max(v, v_old - 0.3), v_old + 0.3)
            total += w * 0.5 * max((v - goal) ** 2, (held - goal) ** 2)
            count += w
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    clean = torch.where(weight == 0, 0.0, values).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, before, target, weight)[0], clean)
    zero, _ = clipped_value_loss(values, before, target, torch.zeros_like(weight))
    assert zero.item() == 0


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("surrogate", {"clip_low": 0.0}, "objective.clip_low is 0.0; expected a number above 0, at most 1"),
        ("surrogate", {"clip_low": 1.5}, "clip_low"),
        ("ppo", {"clip_high": -0.2}, "objective.clip_high is -0.2"),
        ("gspo", {"clip_high": math.nan}, "clip_high"),
        ("surrogate", {"clip": "lower"}, "expected one of two_sided, upper"),
        ("surrogate", {"ratio": "word"}, "expected one of token, sequence"),
        ("surrogate", {"aggregate": "sum"}, "expected one of sequence_mean, token_mean, constant"),
        ("dr_grpo", {"max_length": 0.0}, "objective.max_length is 0.0"),
        ("grpo", {"kl_beta": -0.1}, "objective.kl_beta is -0.1; expected a number, 0 or above"),
        ("grpo", {"kl_estimator": "k4"}, "expected one of k1, k2, k3"),
        ("ddpo", {"advantage_clip": 0.0}, "advantage_clip"),
        ("d3po", {"beta": 0.0}, "objective.beta is 0.0"),
        ("d3po", {"clip": 1.0}, "objective.clip is 1.0"),
        ("nash_md", {"tau": -1.0}, "objective.tau is -1.0"),
    ],
)
def test_parameters_out_of_range_are_refused(name, parameters, message):
    policy, old, reference = rollout(15)
    with pytest.raises(ValueError, match=message):
        POLICY_GRADIENT[name](policy, old, advantages(), reference, **parameters)


def test_shapes_that_do_not_fit_are_refused():
    policy, old, reference = rollout(16)
    short = LogProbs(old.values[:, :-1], old.weight[:, :-1])
    with pytest.raises(ValueError, match=r"policy has log-probs of \(6, 25\).*old of \(6, 24\)"):
        surrogate(policy, short, advantages())
    with pytest.raises(ValueError, match="reference of"):
        surrogate(policy, old, advantages(), short)
    for wrong in (advantages()[:-1], advantages()[:, None], per_action(policy)[:, :-1]):
        with pytest.raises(ValueError, match=r"expected \(6,\), one per sample, or \(6, 25\), one per action"):
            surrogate(policy, old, wrong)
    with pytest.raises(ValueError, match="got 5 rows; expected pairs"):
        POLICY_GRADIENT["d3po"](policy.pick(slice(0, 5)), old.pick(slice(0, 5)), advantages()[:5])
    for name in PER_SAMPLE:
        with pytest.raises(Exception, match="advantage"):  # by its shape, or by the checker of annotations before
            POLICY_GRADIENT[name](policy, old, per_action(policy))
    with pytest.raises(ValueError, match="objective.clip is 0.0"):
        clipped_value_loss(policy.values, old.values, reference.values, policy.weight, clip=0.0)


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_docstrings_are_summary_equation_notes_source(name):
    function = POLICY_GRADIENT[name]
    summary, equation, *notes, source = (inspect.getdoc(function) or "").split("\n\n")
    assert summary.endswith(".")
    assert "\n" not in summary
    assert notes
    assert equation.split()[:2] == ["L", "="]
    assert "(arXiv " in source
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters][:4] == ["policy", "old", "advantage", "reference"]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert keywords
    assert all(isinstance(p.default, float | bool | str) for p in keywords)


def test_the_rollouts_of_this_file_hold_garbage():
    policy, old, reference = rollout(0)
    for rows in (policy, old, reference):
        assert not rows.values[rows.weight == 0].isfinite().all()
    assert len(GARBAGE) == 4
