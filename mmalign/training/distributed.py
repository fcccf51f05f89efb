"""Processes and what travels between them. One process needs none of it and pays nothing for it.

Accelerate finds the launcher (torchrun, accelerate launch), the device and the process group. Wrapping is torch's own:
DistributedDataParallel, or `fully_shard` (FSDP2), which really shards on CPUs too. Accelerate's `prepare` is not used:
it would patch the policy's forward pass alone, and policy and reference must share one precision path.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mmalign.modalities.units import units


@dataclass(frozen=True)
class Processes:
    """This process among its peers. With one process every method returns at once."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element by element over all processes; the argument is overwritten."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """(ranks, *shape): what every process holds, the same everywhere."""
        if self.ranks == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.ranks)]
        dist.all_gather(rows, values)
        return torch.stack(rows)

    def gather_objects(self, value: Any) -> list[Any]:
        """Small Python values of every process, for rare paths."""
        if self.ranks == 1:
            return [value]
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found

    def broadcast_object(self, value: Any, source: int) -> Any:
        if self.ranks == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=source)
        return holder[0]

    def wait(self) -> None:
        if self.ranks > 1:
            dist.barrier()


def launch(cpu: bool = False) -> Processes:
    """Joins the process group of the launcher, if there is one. Safe to call again; the first call decides."""
    from accelerate import DistributedType, PartialState

    state = PartialState(cpu=cpu)
    if state.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.FSDP):
        raise ValueError(
            f"launched for {state.distributed_type.value}; launch plainly (torchrun) and set training.sharding: fsdp2"
        )
    device = torch.device("cpu") if cpu or state.device is None else state.device
    return Processes(state.process_index, state.num_processes, device)


def leave() -> None:
    """Ends the process group at the end of a program that went well; without one it does nothing. After an error the
    group is left alone: ending it waits for the other processes, and they may be waiting for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(network: nn.Module, sharding: str, processes: Processes) -> nn.Module:
    """The network as the loop calls it: itself in one process, under DDP, or with its parameters sharded in place."""
    if processes.ranks == 1:
        return network
    if sharding == "fsdp2":
        return shard(network)
    device_ids = None if processes.device.type == "cpu" else [processes.device.index]
    with warnings.catch_warnings():
        # Newer versions of torch have another name for `broadcast_buffers`, which older ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            network, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def shard(network: nn.Module) -> nn.Module:
    """FSDP2 over all processes: each unit is gathered when it is called, and one more holds the rest."""
    mesh = dist.init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
    for unit in units(network):
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


@contextlib.contextmanager
def gradient_sync(policy: nn.Module, enabled: bool) -> Iterator[None]:
    """Gradients travel between processes only in the last micro-batch of a step."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(policy, DistributedDataParallel) and not enabled:
        with policy.no_sync():
            yield
    else:
        yield


def bare(policy: nn.Module) -> nn.Module:
    """The network inside the DDP wrapper."""
    return policy.module if isinstance(policy, DistributedDataParallel) else policy


def whole(value: Tensor) -> Tensor:
    """The full tensor of a shard, on every process; a tensor that is not sharded, as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded_like(value: Tensor, weight: Tensor) -> Tensor:
    """A full tensor, the same on every process, divided as `weight` is."""
    if isinstance(weight, DTensor):
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return value.to(weight.device)
