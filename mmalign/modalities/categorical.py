"""Log-probs of chosen tokens from hidden states and the output layer, in chunks of rows.

    values[i] = log softmax(weight hidden[i] + bias)[targets[i]],   log_collision[i] = log sum_v pi(v)^2

Nothing with the size of rows x vocabulary is ever made: the forward pass keeps one number per row, and the backward
pass computes the logits of a chunk again. Logits are multiplied in the precision of the hidden states (of autocast,
where it is on); everything after that, the gradient of the weight included, is in fp32, or in fp64 for fp64 states.
Refused: a second derivative, and a gradient through `log_collision`, which is a constant to whoever reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def chosen_log_probs(
    hidden: Float[Tensor, "row width"],
    targets: Int[Tensor, " row"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    *,
    chunk: int = 128,
    softcap: float | None = None,
    with_collision: bool = False,
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"] | None]:
    """(log-probs of the targets, log sum pi^2 or None), with a gradient of the first to hidden, weight and bias.

    `chunk` is how many rows have logits at a time. `softcap` c: the logits are c tanh(logits / c), as Gemma has them.
    """
    if chunk < 1:
        raise ValueError(f"logits_chunk is {chunk}; expected 1 row or more")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Everything below names its precision.
    with torch.autocast(device, enabled=False):
        values, collision = _Chosen.apply(hidden, weight, bias, targets, chunk, softcap, with_collision, dtype)
    return values, collision


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        softcap: float | None,
        with_collision: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(dtype, torch.float32)
        values = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        log_sum, collision = torch.empty_like(values), torch.empty_like(values) if with_collision else None
        matrix = weight.to(dtype)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = _logits(hidden[rows].to(dtype), matrix, bias, softcap, wide)
            chosen = logits.gather(1, targets[rows, None])[:, 0]
            top = logits.amax(1)
            powers = logits.sub_(top[:, None]).exp_()
            total = powers.sum(1).log_()
            log_sum[rows] = top + total
            values[rows] = chosen - log_sum[rows]
            if collision is not None:
                # sum pi^2 = sum e^2 / (sum e)^2, and the largest e is 1: no underflow
                collision[rows] = powers.square_().sum(1).log_() - 2 * total
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum)
        ctx.chunk, ctx.softcap, ctx.dtype = chunk, softcap, dtype
        if collision is not None:
            ctx.mark_non_differentiable(collision)
        return values, collision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sum = ctx.saved_tensors
        wide, needs = log_sum.dtype, ctx.needs_input_grad
        matrix = weight.to(ctx.dtype)
        of_hidden = torch.empty_like(hidden) if needs[0] else None
        of_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        of_bias = torch.zeros_like(bias, dtype=wide) if needs[2] else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            states = hidden[rows].to(ctx.dtype)
            logits = _logits(states, matrix, bias, ctx.softcap, wide)
            capped = None if ctx.softcap is None else (logits / ctx.softcap).square_().neg_().add_(1)
            # d value / d logits = onehot(target) - pi
            part = logits.sub_(log_sum[rows, None]).exp_().mul_(-slope[rows, None])
            part.scatter_add_(1, targets[rows, None], slope[rows, None])
            if capped is not None:
                part.mul_(capped)
            if of_bias is not None:
                of_bias += part.sum(0)
            part = part.to(ctx.dtype)
            if of_hidden is not None:
                of_hidden[rows] = part @ matrix
            if of_weight is not None:
                _add_product(of_weight, part, states)
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            *[None] * 5,
        )


def _logits(
    states: Tensor, matrix: Tensor, bias: Tensor | None, softcap: float | None, wide: torch.dtype
) -> Float[Tensor, "row vocabulary"]:
    """In fp32 or better, and free to be overwritten."""
    logits = (states @ matrix.T).to(wide)
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _add_product(total: Tensor, part: Tensor, states: Tensor) -> None:
    """total += part^T states, summed in the precision of the total."""
    if part.dtype == total.dtype:
        total.addmm_(part.T, states)
    else:
        total += part.T @ states
