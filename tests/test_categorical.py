"""Log-probs of chosen tokens: equal to a plain log-softmax, gradients included, and never the size of the vocabulary
times the rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmalign.modalities.categorical import chosen_log_probs

ROWS, WIDTH, VOCABULARY = 11, 6, 17


def drawn(dtype: torch.dtype, with_bias: bool, rows: int = ROWS, vocabulary: int = VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (2 * torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, targets, weight, bias if with_bias else None


def plain(hidden, targets, weight, bias, softcap):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], log_probs.mul(2).logsumexp(-1)


@pytest.mark.parametrize("chunk", [1, 4, ROWS, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_collisions_and_gradients_are_those_of_a_plain_log_softmax(chunk, with_bias, softcap):
    hidden, targets, weight, bias = drawn(torch.float64, with_bias)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    values, collision = chosen_log_probs(
        hidden, targets, weight, bias, chunk=chunk, softcap=softcap, with_collision=True
    )
    expected, expected_collision = plain(hidden, targets, weight, bias, softcap)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(collision, expected_collision)
    slope = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    ours, theirs = torch.autograd.grad(values, leaves, slope), torch.autograd.grad(expected, leaves, slope)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_those_of_difference_quotients(softcap):
    hidden, targets, weight, bias = drawn(torch.float64, True, rows=5, vocabulary=7)

    def values(hidden, weight, bias):
        return chosen_log_probs(hidden, targets, weight, bias, chunk=2, softcap=softcap)[0]

    assert bias is not None
    assert torch.autograd.gradcheck(values, (hidden, weight, bias))


def test_a_vocabulary_of_two_by_hand():
    """Logits 0 and ln 3: probabilities 1/4 and 3/4; the collision is 1/16 + 9/16 = 10/16."""
    weight = torch.tensor([[0.0], [math.log(3)]])
    values, collision = chosen_log_probs(torch.ones(2, 1), torch.tensor([0, 1]), weight, chunk=1, with_collision=True)
    torch.testing.assert_close(values, torch.tensor([1 / 4, 3 / 4]).log())
    assert collision is not None
    torch.testing.assert_close(collision, torch.tensor([10 / 16, 10 / 16]).log())


def test_a_tiny_vocabulary_sums_to_one():
    hidden, _, weight, _ = drawn(torch.float64, False, rows=1, vocabulary=5)
    values, _ = chosen_log_probs(hidden.expand(5, -1), torch.arange(5), weight, chunk=2)
    assert values.exp().sum().item() == pytest.approx(1.0)


def test_logits_that_overflow_a_plain_exponential_do_not():
    weight = torch.tensor([[1000.0], [-1000.0], [999.0]], dtype=torch.float64)
    values, collision = chosen_log_probs(weight.new_ones(3, 1), torch.arange(3), weight, chunk=3, with_collision=True)
    total = math.log1p(math.exp(-1))
    torch.testing.assert_close(values, weight.new_tensor([-total, -2000 - total, -1 - total]))
    assert collision is not None
    assert torch.isfinite(collision).all()


def test_the_collision_carries_no_gradient():
    hidden, targets, weight, _ = drawn(torch.float32, False)
    _, collision = chosen_log_probs(hidden, targets, weight, chunk=4, with_collision=True)
    assert collision is not None
    assert not collision.requires_grad


def test_bfloat16_states_lose_only_what_their_product_loses():
    """The product is rounded, to 1 part in 256, like anyone's; the log-softmax of the rounded logits is exact."""
    hidden, targets, weight, _ = drawn(torch.bfloat16, False)
    values, _ = chosen_log_probs(hidden, targets, weight, chunk=4)
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, rounded, rtol=1e-6, atol=1e-6)


def test_under_autocast_the_weight_gradient_is_summed_in_fp32():
    """Many equal rows: summed in bfloat16 the gradient would stop growing at 2^8 times a term."""
    rows, chunk = 4096, 64
    hidden = torch.ones(rows, 1)
    weight = torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = chosen_log_probs(hidden, torch.zeros(rows, dtype=torch.int64), weight, chunk=chunk)
    values.sum().backward()
    # each row: d log pi(0) / d logits = (1 - 1/2, -1/2)
    torch.testing.assert_close(weight.grad, torch.tensor([[rows / 2], [-rows / 2]]))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return found


@pytest.mark.parametrize("trains", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits(trains):
    rows, vocabulary, chunk = 200, 50, 8
    hidden, targets, weight, _ = drawn(torch.float32, False, rows, vocabulary)
    weight.requires_grad_(trains)
    with LargestTensor() as plainly:
        plain(hidden, targets, weight, None, None)[0].sum().backward()
    assert plainly.size == rows * vocabulary  # what is to be avoided
    hidden.grad = None
    with LargestTensor() as largest:
        chosen_log_probs(hidden, targets, weight, chunk=chunk, with_collision=True)[0].sum().backward()
    assert largest.size <= max(chunk * vocabulary, rows * WIDTH)
    assert chunk * vocabulary <= rows * WIDTH < rows * vocabulary


def test_nothing_is_computed_for_a_frozen_weight():
    hidden, targets, weight, _ = drawn(torch.float32, False)
    weight.requires_grad_(False)
    chosen_log_probs(hidden, targets, weight, chunk=4)[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_a_chunk_without_rows_is_refused():
    hidden, targets, weight, _ = drawn(torch.float32, False)
    with pytest.raises(ValueError, match="logits_chunk is 0"):
        chosen_log_probs(hidden, targets, weight, chunk=0)
