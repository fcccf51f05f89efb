"""One optimizer step: micro-batches to a gradient, and the gradient to the weights, or to a reason why not.

The gradient is that of the mean loss over all usable rows of the step, on whatever process and in whatever micro-batch
they are, so the division into micro-batches and processes is only a matter of memory and speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmalign.core.objectives import BoundObjective
from mmalign.core.reference import Reference
from mmalign.core.types import LogProbs, Modality, Pair, Sample
from mmalign.data.reader import Geometry, Step
from mmalign.training.distributed import Processes, gradient_sync, whole
from mmalign.training.settings import TrainingSettings

Rows = Sequence[tuple[Sample, ...]]
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
NAMED_RECORDS = 8


@dataclass
class Update:
    """What one step did. `skipped` says in words why there was no update; `keys` then names the records.

    `overflow`: skipped only because the loss scale of fp16 was too high, which happens in every healthy run.
    """

    rows: int
    samples: int
    loss: float = float("nan")
    grad_norm: float = float("nan")
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None
    keys: list[str] = field(default_factory=list)
    overflow: bool = False


class Updater:
    """Everything that an update needs. It keeps no state from one step to the next, except the weights it moves."""

    def __init__(
        self,
        modality: Modality,
        policy: nn.Module,
        reference: Reference,
        objective: BoundObjective,
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
        geometry: Geometry,
        processes: Processes,
    ):
        self._modality = modality
        self._policy = policy
        self._reference = reference
        self._objective = objective
        self._optimizer = optimizer
        self._settings = settings
        self._geometry = geometry
        self._processes = processes
        self._weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=settings.mixed_precision == "fp16")

    def __call__(self, batch: Step, learning_rate: float) -> Update:
        """Raises nothing for a bad step: it is skipped, the weights stay, and the Update says why."""
        counts = self._row_counts(batch)
        rows = int(counts.sum())
        samples = rows * (1 if self._objective.chosen_only else 2)
        if rows == 0:
            return Update(rows, samples, skipped="no usable record in the whole batch")
        numbers, names, seen = self._accumulate(batch, counts, rows)
        grad_norm = self._clip()
        # One transfer from the device per step: loss, metrics and gradient norm together.
        loss, *means, norm = torch.cat([self._processes.sum(numbers), grad_norm[None]]).tolist()
        update = Update(rows, samples, loss, norm, dict(zip(names, means, strict=True)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._explain(update, batch, seen)
        self._move(update, learning_rate)
        return update

    def _row_counts(self, batch: Step) -> Tensor:
        """(rank, micro-batch): usable rows, the same on every process."""
        own = torch.tensor([len(rows) for rows in batch.micro_batches], device=self._processes.device)
        return self._processes.gather(own).cpu()

    def _accumulate(
        self, batch: Step, counts: Tensor, total: int
    ) -> tuple[Tensor, list[str], list[tuple[Rows, LogProbs, LogProbs | None]]]:
        """Backward passes of all micro-batches. Returns this process's share of the mean loss and metrics."""
        self._optimizer.zero_grad(set_to_none=True)
        # A micro-batch that is empty on every process is left out; where only some have rows, the others join in with
        # a borrowed row of weight 0, for every process must make the same passes.
        live = [index for index in range(counts.shape[1]) if counts[:, index].sum() > 0]
        borrowed = self._borrow(batch, counts) if (counts[:, live] == 0).any() else []
        numbers, names, seen = torch.zeros(0), [], []
        for index in live:
            rows = batch.micro_batches[index]
            share = len(rows) / total
            self._seed(batch.position, index)
            with gradient_sync(self._policy, index == live[-1]):
                loss, metrics, policy, reference = self._evaluate(rows or borrowed)
                # Processes average their gradients, hence the factor.
                self.scaler.scale(loss * (share * self._processes.ranks)).backward()
            values = _wide(torch.stack([loss.detach(), *metrics.values()]))
            # A borrowed row counts for nothing, even where it is not finite.
            values = values * share if rows else torch.zeros_like(values)
            numbers = values if not names else numbers + values
            names = list(metrics)
            seen.append((rows, LogProbs(policy.values.detach(), policy.weight), reference))
        return numbers, names, seen

    def _evaluate(self, rows: Rows) -> tuple[Tensor, dict[str, Tensor], LogProbs, LogProbs | None]:
        """The loss of some rows. The reference comes first: its activations are gone before the policy's are kept."""
        chosen = [row[0] for row in rows]
        rejected = [] if self._objective.chosen_only else [row[1] for row in rows]
        inputs = self._modality.prepare([*chosen, *rejected])
        with self._precision():
            reference = self._reference.log_prob(self._modality, self._policy, inputs)
        # A context of its own: autocast keeps the casts of weights, and those made without gradient must not be reused.
        with self._precision():
            policy = self._modality.log_prob(self._policy, inputs)
        pair = Pair.split(policy, len(rows))
        reference_pair = None if reference is None else Pair.split(reference, len(rows))
        loss, metrics = self._objective(pair, reference_pair)
        with torch.no_grad():
            return loss, metrics | self._modality.metrics(inputs, pair, reference_pair), policy, reference

    def _precision(self) -> torch.autocast:
        dtype = PRECISIONS.get(self._settings.mixed_precision)
        return torch.autocast(self._processes.device.type, dtype, enabled=dtype is not None)

    def _seed(self, position: int, micro_batch: int) -> None:
        """Dropout and the like draw from here: from the seed and the place in the stream alone, not from history."""
        seed = hash((self._settings.seed, self._geometry.first_slot(position, micro_batch))) % 2**63
        # Not torch.manual_seed: without a GPU it keeps a stack trace of every call for later.
        torch.default_generator.manual_seed(seed)
        if self._processes.device.type != "cpu":
            torch.get_device_module(self._processes.device).manual_seed(seed)

    def _borrow(self, batch: Step, counts: Tensor) -> Rows:
        source = int((counts.sum(1) > 0).nonzero()[0])
        own = next((rows[:1] for rows in batch.micro_batches if rows), [])
        return self._processes.broadcast_object(own, source)

    def _clip(self) -> Tensor:
        """The norm of the whole gradient before clipping, on the device."""
        self.scaler.unscale_(self._optimizer)
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if self._settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._weights, self._settings.max_grad_norm, norm)
        return _wide(norm.detach())

    def _move(self, update: Update, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if update.skipped is None:
            self.scaler.step(self._optimizer)
        if self.scaler.is_enabled():
            self.scaler.update(None if update.skipped is None else self.scaler.get_scale() / 2)
        self._optimizer.zero_grad(set_to_none=True)

    def _explain(self, update: Update, batch: Step, seen: list[tuple[Rows, LogProbs, LogProbs | None]]) -> None:
        """Names the records whose log-probs are not finite; where none is, the gradient itself overflowed."""
        guilty = [row[0].key for rows, policy, reference in seen for row in _not_finite(rows, policy, reference)]
        named = [key for keys in self._processes.gather_objects(guilty) for key in keys]
        if named:
            update.skipped = "log-probs are not finite for the records named here"
        elif self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            update.skipped, update.overflow = "fp16 overflow, the loss scale was halved", True
        else:
            update.skipped = "the loss or its gradient is not finite though every log-prob is; the batch held"
            own = [row[0].key for rows in batch.micro_batches for row in rows]
            named = [key for keys in self._processes.gather_objects(own) for key in keys]
        update.keys = named[:NAMED_RECORDS] + ([f"{len(named) - NAMED_RECORDS} more"] if named[NAMED_RECORDS:] else [])


def _wide(values: Tensor) -> Tensor:
    """float64, except on Apple's GPUs, which have none."""
    return values.float() if values.device.type == "mps" else values.double()


def _not_finite(rows: Rows, policy: LogProbs, reference: LogProbs | None) -> Rows:
    if not rows:
        return []
    finite = policy.sum().isfinite()
    if reference is not None:
        finite = finite & reference.sum().isfinite()
    # Chosen samples of all rows, then the rejected ones.
    return [row for row, fine in zip(rows, finite.view(-1, len(rows)).all(0).tolist(), strict=True) if not fine]
