"""What the doctor takes into account before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.config import build
from mmalign.data import ShardWriter
from mmalign.jobs import doctor
from mmalign.modalities import memory, tiny
from mmalign.modalities.diffusion_loading import DiffusionSettings, read_config
from tests.data_sets import pair


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict[str, Any]:
    """Pairs with stored latents, for the tiny pipeline."""
    folder = tmp_path_factory.mktemp("doctor")
    with ShardWriter(folder / "latents", encoder={"encoder_sha256": "0"}) as writer:
        for number in range(8):
            writer.write(pair(number))
    return {
        "data": {"shards": str(folder / "latents")},
        "model": {"path": str(tiny.stable_diffusion(folder / "model"))},
        "training": {"batch_size": 8, "micro_batch_size": 1},
        "device": "cpu",
    }


@pytest.fixture
def estimates(monkeypatch) -> list[dict[str, Any]]:
    """What the memory estimate was asked for, call by call."""
    asked: list[dict[str, Any]] = []
    estimate = memory.estimate

    def noted(*given: Any, **named: Any) -> memory.MemoryEstimate:
        asked.append(named)
        return estimate(*given, **named)

    monkeypatch.setattr(memory, "estimate", noted)
    return asked


def needs(config: dict[str, Any], **training: Any) -> dict[str, str]:
    return doctor.run(build(doctor.Settings, {**config, "training": {**config["training"], **training}}))


def test_sample_grids_need_the_vae_even_where_latents_are_stored(config, estimates):
    needs(config)
    needs(config, sample_every=10, sample_prompts=["a fox"])
    assert [asked["need_vae"] for asked in estimates] == [False, True]


def test_sharding_divides_the_estimate_by_the_processes(config, estimates, monkeypatch):
    needs(config, sharding="fsdp2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    rows = needs(config, sharding="fsdp2")
    assert "gathered for the units at hand" in rows["weights"]
    assert rows["in all"].endswith("for each process")
    assert rows["batch"] == "8 = 1 x 2 accumulated x 4 processes"
    assert "gathered" not in needs(config, sharding="ddp")["weights"]
    assert [asked["ranks"] for asked in estimates] == [1, 4, 1]


def test_a_vae_weighs_what_it_weighs(config):
    """The difference that need_vae makes is the VAE in fp32, to the byte."""
    from diffusers import AutoencoderKL

    settings = build(doctor.Settings, config).model
    assert isinstance(settings, DiffusionSettings)
    found = read_config(settings.path)
    frozen = [
        memory.estimate(settings, found, torch.float32, 2, "adamw", True, need_vae).frozen for need_vae in (False, True)
    ]
    vae: Any = AutoencoderKL.from_pretrained(Path(settings.path), subfolder="vae")
    assert frozen[1] - frozen[0] == 4 * sum(parameter.numel() for parameter in vae.parameters())
