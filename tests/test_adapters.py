"""LoRA: exactly the base at the start and when switched off, files that diffusers loads, and teaching errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.modalities import diffusion, tiny
from mmalign.modalities.adapters import LoraSettings, adapters_off, add_lora, load_lora

CPU = torch.device("cpu")
LORA = LoraSettings(rank=2, alpha=6.0)


@pytest.fixture(scope="module", params=[tiny.stable_diffusion, tiny.stable_diffusion_xl])
def folder(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def loaded(folder) -> tuple[diffusion.DiffusionModality, nn.Module]:
    return diffusion.load(diffusion.DiffusionSettings(path=str(folder), lora=LORA), CPU)


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def perturb(network: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained(network):
            parameter.normal_(std=0.1)


def predict(network: Any, xl: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    tokens = torch.randn(2, 5, network.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.ones(2, 24), "time_ids": torch.ones(2, 6)} if xl else None
    with torch.no_grad():
        return network(latents, torch.tensor([3, 700]), tokens, added_cond_kwargs=added).sample


def is_xl(network: Any) -> bool:
    return network.config.addition_embed_type == "text_time"


def test_adapters_start_as_nothing_and_switch_off_to_the_base(folder, loaded):
    _, network = loaded
    _, base = diffusion.load(diffusion.DiffusionSettings(path=str(folder)), CPU)
    expected = predict(base, is_xl(network))
    assert torch.equal(predict(network, is_xl(network)), expected)
    perturb(network)
    moved = predict(network, is_xl(network))
    assert not torch.allclose(moved, expected, atol=1e-4)
    with adapters_off(network):
        assert torch.equal(predict(network, is_xl(network)), expected)
    assert torch.equal(predict(network, is_xl(network)), moved)


def test_only_adapters_train_in_fp32_also_after_a_switch(folder):
    settings = diffusion.DiffusionSettings(path=str(folder), lora=LORA)
    _, network = diffusion.load(settings, CPU, torch.bfloat16)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert {parameter.dtype for parameter in trained(network)} == {torch.float32}
    assert {p.dtype for p in network.parameters() if not p.requires_grad} == {torch.bfloat16}
    with adapters_off(network):
        pass
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad] == names
    network.requires_grad_(False)
    with adapters_off(network):
        pass
    assert not trained(network)


def test_the_switch_comes_back_on_after_an_error(loaded):
    _, network = loaded
    perturb(network)
    before = predict(network, is_xl(network))
    with pytest.raises(RuntimeError, match="in between"), adapters_off(network):
        raise RuntimeError("in between")
    assert torch.equal(predict(network, is_xl(network)), before)


def test_the_seed_decides_the_first_weights(folder):
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 77)
        settings = diffusion.DiffusionSettings(path=str(folder), lora=LORA, gradient_checkpointing="off")
        return torch.cat([p.flatten() for p in trained(diffusion.load(settings, CPU, seed=seed)[1])])

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_diffusers_loads_the_export_with_its_alpha(folder, loaded, tmp_path):
    from diffusers import DiffusionPipeline

    modality, network = loaded
    perturb(network)
    modality.export(network, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(tmp_path)
    xl = is_xl(network)
    torch.testing.assert_close(predict(pipeline.unet, xl), predict(network.eval(), xl), rtol=1e-5, atol=1e-6)


def test_diffusers_loads_adapters_of_attention_and_convolutions_together(folder, tmp_path):
    from diffusers import DiffusionPipeline

    lora = LoraSettings(rank=3, alpha=1.5, target_modules=("to_q", "to_out.0", "conv1", "proj_in"))
    modality, network = diffusion.load(diffusion.DiffusionSettings(path=str(folder), lora=lora), CPU)
    perturb(network)
    modality.export(network, tmp_path)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(tmp_path)
    xl = is_xl(network)
    torch.testing.assert_close(predict(pipeline.unet, xl), predict(network.eval(), xl), rtol=1e-5, atol=1e-6)


def test_an_export_is_read_back(folder, loaded, tmp_path):
    modality, network = loaded
    perturb(network)
    modality.export(network, tmp_path)
    _, fresh = diffusion.load(diffusion.DiffusionSettings(path=str(folder), lora=LORA), CPU, seed=5)
    load_lora(fresh, tmp_path)
    assert torch.equal(predict(fresh, is_xl(fresh)), predict(network, is_xl(network)))
    assert len(trained(fresh)) == len(trained(network))


def test_errors_teach(folder, loaded, tmp_path):
    _, base = diffusion.load(diffusion.DiffusionSettings(path=str(folder)), CPU)
    with pytest.raises(ValueError, match="set model.lora or reference: copy"), adapters_off(base):
        pass
    with pytest.raises(ValueError, match=r"model.lora.target_modules \['nowhere'\] fit no module.*to_q"):
        add_lora(base, LoraSettings(target_modules=("nowhere",)))
    with pytest.raises(ValueError, match="model.lora.rank is 0"):
        LoraSettings(rank=0)
    with pytest.raises(ValueError, match=r"model.lora.dropout is 1.0"):
        LoraSettings(dropout=1.0)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        load_lora(loaded[1], tmp_path / "nothing")
