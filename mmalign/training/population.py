"""The rows of a whole batch, put together from micro-batches and processes, for objectives that look at all of them.

An objective that sorts or averages over the batch is no sum over micro-batches. Its gradient with respect to the
log-probs is taken once, on all rows; each micro-batch then carries its own rows of it back into the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.functional import pad

from mmalign.core.labels import Labels
from mmalign.core.types import LogProbs
from mmalign.training.distributed import Processes


def gather_log_probs(parts: Sequence[LogProbs], processes: Processes) -> LogProbs:
    """All rows of all processes, by process and then as they came; actions are padded with weight 0. No gradient."""
    parts = [part.detach() for part in parts]
    width = torch.tensor([part.values.shape[1] for part in parts], device=processes.device).max()
    actions = int(processes.gather(width).max())
    values = gather_rows(_cat([part.values for part in parts], actions), processes)
    weight = gather_rows(_cat([part.weight for part in parts], actions), processes)
    collisions = [part.log_collision for part in parts if part.log_collision is not None]
    collision = gather_rows(_cat(collisions, actions), processes) if len(collisions) == len(parts) else None
    return LogProbs(values, weight, collision)


def gather_labels(parts: Sequence[Labels], processes: Processes) -> Labels:
    tables = [part.tensors() for part in parts]
    return Labels(**{name: gather_rows(torch.cat([table[name] for table in tables]), processes) for name in tables[0]})


def gather_rows(values: Shaped[Tensor, "row ..."], processes: Processes) -> Shaped[Tensor, "row ..."]:
    """The rows of every process, one after the other; processes may hold different numbers of them."""
    if processes.ranks == 1:
        return values
    counts = processes.gather(torch.tensor(len(values), device=processes.device)).tolist()
    spare = [0] * (2 * (values.ndim - 1)) + [0, max(counts) - len(values)]
    # all_gather knows no booleans on some backends
    wire = values.to(torch.uint8) if values.dtype == torch.bool else values
    rows = processes.gather(pad(wire, spare).contiguous())
    return torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)]).to(values.dtype)


def first_row(count: int, processes: Processes) -> int:
    """Where the rows of this process start among those of all."""
    counts = processes.gather(torch.tensor(count, device=processes.device))
    return int(counts[: processes.rank].sum())


def _cat(parts: Sequence[Tensor], actions: int) -> Tensor:
    return torch.cat([pad(part, (0, actions - part.shape[1])) for part in parts])
