"""Trains the tiny Stable Diffusion pipeline from config files, one after the other, in each process of a launcher.

The last config goes through the command line, as a user's would; what is printed then is how much of the network each
sharded training held, and whether the process group was left at the end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import mmalign
from mmalign import cli
from mmalign.data import Candidate, Record, ShardWriter
from mmalign.modalities import tiny
from mmalign.training import distributed
from tests.data_sets import picture


def write_inputs(folder: Path, count: int = 16) -> dict[str, Any]:
    """A pipeline and pairs of pictures; returns the config of a short training on them."""
    with ShardWriter(folder / "pairs", records_per_shard=8) as writer:
        for index in range(count):
            candidates = [Candidate(image=picture(31 * index + 97 * place, side=16)) for place in range(2)]
            writer.write(Record(f"{index:06d}", f"picture {index}", candidates, preferred=[(0, 1)]))
    return {
        "data": {"shards": str(folder / "pairs")},
        "model": {"path": str(tiny.stable_diffusion(folder / "model"))},
        "objective": {"name": "dpo", "beta": 200.0},
        "training": {
            "max_steps": 3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "max_grad_norm": 1.0,
            "trackers": [],
        },
        "device": "cpu",
    }


def write_config(config: dict[str, Any], folder: Path) -> Path:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**config, "output": str(folder)}))
    return path


def main(paths: Sequence[str]) -> None:
    torch.set_num_threads(1)
    held: list[float] = []
    shard = distributed.shard

    def measured(network: nn.Module) -> nn.Module:
        weights = list(shard(network).parameters())
        held.append(sum(_local(weight).numel() for weight in weights) / sum(weight.numel() for weight in weights))
        return network

    distributed.shard = measured
    for path in paths[:-1]:
        mmalign.train(path)
    cli.main(["train", paths[-1]])
    report = {"held": held, "left": not torch.distributed.is_initialized()}
    if os.environ["RANK"] == "0":
        print(json.dumps(report), flush=True)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


if __name__ == "__main__":
    main(sys.argv[1:])
