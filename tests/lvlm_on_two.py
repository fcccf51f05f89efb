"""Run on two processes: a vision-language network under DDP and FSDP2 against itself in one process, as JSON."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.modalities import lvlm
from mmalign.training import launch
from mmalign.training.distributed import leave, whole, wrap
from tests.lvlm_samples import CPU, pairs

# Unequal work: the second process draws more and longer texts, the first has more samples.
OWN = [(0, 3, 1, 4), (2, 5)]


def gradient(network: nn.Module) -> Tensor:
    """Of all weights in one row: those of an adapter's first factor are 0 before the first step."""
    return torch.cat([whole(weight.grad).flatten() for weight in network.parameters() if weight.grad is not None])


def compare(path: str, lora: bool, sharding: str, folder: Path) -> dict[str, Any]:
    processes = launch(cpu=True)
    settings = lvlm.LvlmSettings(path=path, lora=lvlm.LvlmLoraSettings(rank=2) if lora else None)
    modality, alone = lvlm.load(settings, CPU)
    policy = wrap(copy.deepcopy(alone), sharding, processes)
    prompts, seeds = ["hello", "this?", "hello"][: 1 + 2 * processes.rank], [1, 2, 3][: 1 + 2 * processes.rank]
    sampling = lvlm.LvlmSampling(max_new_tokens=3 + 4 * processes.rank)
    texts = [modality.generate(network, prompts, seeds, sampling) for network in (policy, alone)]
    # Processes average their gradients: each sample counts one half of what it counts in one process.
    (modality.log_prob(alone, modality.prepare(pairs())).sum().sum() / 2).backward()
    own = [pairs()[place] for place in OWN[processes.rank]]
    modality.log_prob(policy, modality.prepare(own)).sum().sum().backward()
    difference = ((gradient(policy) - gradient(alone)).norm() / gradient(alone).norm()).item()
    if processes.main:
        folder.mkdir()
    processes.wait()
    modality.export(policy, folder)
    tokens = [[sample.tensors["tokens"].tolist() for sample in samples] for samples in texts]
    return {"difference": difference, "alike": tokens[0] == tokens[1]}


def main(path: str, folder: str) -> None:
    torch.set_num_threads(1)
    for lora in (False, True):
        for sharding in ("ddp", "fsdp2"):
            name = f"{'lora' if lora else 'full'}-{sharding}"
            found = launch(cpu=True).gather_objects(compare(path, lora, sharding, Path(folder) / name))
            if launch(cpu=True).main:
                print(json.dumps({"name": name, "found": found}), flush=True)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
