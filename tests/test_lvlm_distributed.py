"""Two processes, copied (DDP) and sharded (FSDP2): the gradients, texts and exports of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.modalities import lvlm, tiny_lvlm
from tests.lvlm_samples import CPU, pairs
from tests.two_processes import run_on_two

CASES = ["full-ddp", "full-fsdp2", "lora-ddp", "lora-fsdp2"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, list[dict[str, Any]]]]:
    """The model, whose output layer is its embeddings, where the exports are, and what the processes found."""
    folder = tmp_path_factory.mktemp("two")
    model = tiny_lvlm.FAMILIES["gemma3"](folder / "model")
    rows = [json.loads(line) for line in run_on_two("tests.lvlm_on_two", str(model), str(folder)).splitlines()]
    return model, folder, {row["name"]: row["found"] for row in rows}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(two_processes, name):
    assert all(found["difference"] < 1e-5 for found in two_processes[2][name])


@pytest.mark.parametrize("name", CASES)
def test_processes_draw_texts_of_their_own_number_and_length(two_processes, name):
    assert all(found["alike"] for found in two_processes[2][name])


@pytest.mark.parametrize("name", CASES)
def test_exports_are_whole(two_processes, name):
    model, folder, _ = two_processes
    whole = lvlm.LvlmSettings(path=str(folder / name))
    exported = lvlm.LvlmSettings(path=str(model), adapter=str(folder / name)) if "lora" in name else whole
    values = []
    for settings in (lvlm.LvlmSettings(path=str(model)), exported):
        modality, network = lvlm.load(settings, CPU)
        with torch.no_grad():
            values.append(modality.log_prob(network, modality.prepare(pairs())).values)
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-5)
