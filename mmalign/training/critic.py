"""The value model of PPO: a network of its own that guesses, before each action, the reward that is still to come.

It has its own optimizer and learns beside the policy, on the same minibatches, from the returns of the rollout.
Refused: a network without trainable weights. (fp16 is refused before: gradients would need a scale.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.core.objectives.policy_gradient import clipped_value_loss
from mmalign.core.rollout import in_columns
from mmalign.core.types import LogProbs, Sample
from mmalign.training.distributed import Processes
from mmalign.training.optimizer import trainable
from mmalign.training.settings import TrainingSettings
from mmalign.training.update import precision, seed_draws

# Tensors of a sample: what the value model said when the sample was drawn, and what came of it.
VALUES, RETURNS = "critic_values", "returns"
# Wide enough never to hold a value back.
NO_CLIP = 1e30

# `values(network, inputs)`: one value for each action, in `values`, and the weights of the actions.
ValueFunction = Callable[[nn.Module, Any], LogProbs]


@dataclass(frozen=True)
class CriticSettings:
    learning_rate: float = 1e-5
    # steps of values beyond this distance from those of the rollout are not rewarded; null: no clip
    clip: float | None = 0.2
    # of the value loss; with adamw it matters beside max_grad_norm alone
    coefficient: float = 0.1
    weight_decay: float = 0.0
    # gradients are scaled down to this norm; null: never
    max_grad_norm: float | None = 1.0
    # passes over the first rollout, without clip, before its advantages are taken; a fresh value model knows nothing
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        for key in ("learning_rate", "coefficient", "clip", "max_grad_norm"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"critic.{key} is {value!r}; expected a number above 0")
        for key in ("weight_decay", "warmup_epochs"):
            if getattr(self, key) < 0:
                raise ValueError(f"critic.{key} is {getattr(self, key)!r}; expected 0 or more")


@final
class Critic:
    """`network` is trained in place; `values` says how its values are read. Every process holds a whole copy."""

    def __init__(self, network: nn.Module, values: ValueFunction, settings: CriticSettings | None = None):
        self.network, self.settings = network, settings or CriticSettings()
        self._values = values
        self._weights = trainable(network)
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )

    @torch.no_grad()
    def __call__(self, inputs: Any) -> list[Float[Tensor, " _"]]:
        """The value of each real action's state, sample by sample, on the CPU."""
        self.network.eval()
        found = self._values(self.network, inputs)
        values, real = found.values.float().cpu(), (found.weight != 0).cpu()
        return [row[mask] for row, mask in zip(values, real, strict=True)]

    def update(
        self,
        micro_batches: Sequence[tuple[Any, Sequence[Sample]]],
        processes: Processes,
        training: TrainingSettings,
        place: int,
        *,
        clipped: bool = True,
    ) -> dict[str, float]:
        """One step on this process's prepared samples of a minibatch; the loss is a mean over the actions of all
        processes. `place` seeds dropout. Returns the metrics of the step."""
        self.network.train()
        seed_draws(training.seed, place, processes.device)
        own = [sum(len(sample.tensors[RETURNS]) for sample in samples) for _, samples in micro_batches]
        total = float(processes.sum(torch.tensor(float(sum(own)), device=processes.device)))
        sums = torch.zeros(2, device=processes.device)
        for (inputs, samples), count in zip(micro_batches, own, strict=True):
            with precision(training, processes.device):
                found = self._values(self.network, inputs)
            loss, clip_fraction = self._loss(found, samples, clipped)
            share = count / total if total else 0.0
            (loss * (share * self.settings.coefficient)).backward()
            sums += share * torch.stack([loss.detach().float(), clip_fraction.float()])
        norm = self._move(processes)
        loss, clip_fraction = processes.sum(sums).tolist()
        return {"critic/loss": loss, "critic/clip_fraction": clip_fraction, "critic/grad_norm": norm}

    def _loss(self, found: LogProbs, samples: Sequence[Sample], clipped: bool) -> tuple[Tensor, Tensor]:
        real = found.weight != 0
        old, returns = (in_columns([sample.tensors[name] for sample in samples], real) for name in (VALUES, RETURNS))
        clip = self.settings.clip if clipped and self.settings.clip is not None else NO_CLIP
        values = found.values.float()
        loss, metrics = clipped_value_loss(values, old.float(), returns.float(), real.float(), clip=clip)
        return loss, metrics["value_clip_fraction"]

    def _move(self, processes: Processes) -> float:
        """The gradients of all processes to the weights; returns their norm before clipping."""
        gradients = []
        for weight in self._weights.values():
            weight.grad = processes.sum(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            gradients.append(weight.grad)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self._weights.values()), self.settings.max_grad_norm, norm)
        if bool(norm.isfinite()):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @torch.no_grad()
    def align(self, processes: Processes) -> None:
        """Every process begins with the weights of the first one."""
        for weight in self._weights.values() if processes.ranks > 1 else ():
            weight.copy_(processes.sum(weight.detach() * float(processes.main)))

    def tensors(self) -> dict[str, Tensor]:
        """Trained weights and optimizer: what must travel with a checkpoint."""
        found = {f"weight|{name}": weight.detach() for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            for entry, value in self._optimizer.state.get(weight, {}).items():
                found[f"optimizer|{name}|{entry}"] = value
        return found

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError for those of another network."""
        for name, weight in self._weights.items():
            saved = tensors.get(f"weight|{name}")
            if saved is None or saved.shape != weight.shape:
                came = "none" if saved is None else tuple(saved.shape)
                raise ValueError(f"the checkpoint's value model has {came} for {name}, this one {tuple(weight.shape)}")
            weight.copy_(saved)
        self._optimizer.state.clear()
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("|")
            name, _, entry = rest.rpartition("|")
            if kind == "optimizer":
                weight = self._weights[name]
                # Step counters stay on the CPU, where torch keeps them.
                self._optimizer.state[weight][entry] = tensor.to(weight.device) if tensor.dim() else tensor.clone()
