"""References: what the policy is held against. Switching one never changes an objective.

`of(modality, policy, inputs)` gives the reference's log-probs, without gradient, in evaluation mode and in the same
precision path as the policy's. It runs *before* the policy's pass: that lowers the peak memory for free.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import nn

from mmalign.core.types import LogProbs, Modality


@runtime_checkable
class Reference(Protocol):
    def log_prob(self, modality: Modality, policy: nn.Module, inputs: Any) -> LogProbs | None:
        """Log-probs of `inputs` under the reference; None where there is none. `policy` is the network in training."""
        ...


@final
class FrozenCopy:
    """A second network with its own weights: what full fine-tuning needs. Costs the memory of the weights."""

    def __init__(self, network: nn.Module):
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def log_prob(self, modality: Modality, policy: nn.Module, inputs: Any) -> LogProbs:
        return modality.log_prob(self.network, inputs)


@final
class AdapterOff:
    """The policy with its adapters switched off: exact for LoRA, and free of memory.

    `switched_off(policy)` is a context manager. The adapters are on again before the policy's own forward pass, hence
    before any backward pass that recomputes activations.
    """

    def __init__(self, switched_off: Callable[[nn.Module], AbstractContextManager]):
        self.switched_off = switched_off

    @torch.no_grad()
    def log_prob(self, modality: Modality, policy: nn.Module, inputs: Any) -> LogProbs:
        training = policy.training
        policy.eval()
        try:
            with self.switched_off(policy):
                return modality.log_prob(policy, inputs)
        finally:
            policy.train(training)


@final
class NoReference:
    """For objectives that need none (REFERENCE_FREE)."""

    def log_prob(self, modality: Modality, policy: nn.Module, inputs: Any) -> None:
        return None
