"""The memory estimate against what PyTorch really keeps, the choice of checkpointing, and the FLOPs of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmalign.core.reference import AdapterOff
from mmalign.modalities import diffusion, memory, tiny
from mmalign.modalities.adapters import LoraSettings
from mmalign.modalities.diffusion_loading import DiffusionSettings, PipelineConfig, read_config

CPU = torch.device("cpu")
SD15 = PipelineConfig(
    kind="StableDiffusionPipeline",
    unet={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    text_encoders=(
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("pipeline"))


def estimate(lora: LoraSettings | None, dtype: torch.dtype, config: PipelineConfig = SD15) -> memory.MemoryEstimate:
    settings = DiffusionSettings(path="nowhere", lora=lora)
    return memory.estimate(settings, config, dtype, 2, "adamw", frozen_copy=lora is None, need_vae=False)


def test_known_sizes_of_stable_diffusion():
    full, lora = estimate(None, torch.bfloat16), estimate(LoraSettings(), torch.bfloat16)
    assert full.network_parameters == 859_520_964
    assert lora.trained_parameters == 1_594_368
    assert full.reference == full.network == 4 * full.network_parameters
    assert full.optimizer == 8 * full.network_parameters
    assert lora.reference == 0
    assert lora.total(checkpointing=False) < 0.3 * full.total(checkpointing=False)


@pytest.mark.parametrize("lora", [None, LoraSettings()])
def test_the_estimate_is_what_autograd_keeps(folder, lora):
    """On the tiny network, for real: the bytes that a forward pass leaves behind for the backward pass."""
    config = read_config(str(folder))
    settings = DiffusionSettings(path=str(folder), lora=lora)
    expected = memory.estimate(settings, config, torch.float32, 4, "adamw", False, False)
    _, network = diffusion.load(settings, CPU)
    inputs: dict[str, Any] = {
        name: torch.zeros(value.shape, dtype=value.dtype)
        for name, value in memory.meta_inputs(settings, config, 4).items()
    }
    seen = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        network(**inputs)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    real = sum(size for pointer, size in sizes.items() if pointer not in seen)
    assert expected.activations == pytest.approx(real, rel=0.05)


def test_sharding_divides_what_each_process_holds():
    """Two processes: half of weights, copy, gradients and optimizer each, and whole what is gathered at a time."""
    settings = DiffusionSettings(path="nowhere")
    alone, half = (
        memory.estimate(settings, SD15, torch.float32, 2, "adamw", frozen_copy=True, need_vae=True, ranks=ranks)
        for ranks in (1, 2)
    )
    for name in ("network", "reference", "gradients", "optimizer"):
        assert getattr(half, name) == getattr(alone, name) // 2
    for name in ("frozen", "activations", "activations_checkpointed", "trained_parameters"):
        assert getattr(half, name) == getattr(alone, name)
    assert alone.gathered == 0
    # Two units and a gradient of at most an eighth of the network each, and a small root.
    assert 0 < half.gathered < 0.4 * alone.network
    assert half.total(checkpointing=False) < 0.7 * alone.total(checkpointing=False)


def test_checkpointing_keeps_less_and_follows_the_memory_at_hand():
    sizes = estimate(LoraSettings(), torch.bfloat16)
    assert sizes.activations_checkpointed < sizes.activations / 3
    assert sizes.wants_checkpointing(4 * 2**30)
    assert not sizes.wants_checkpointing(24 * 2**30)


def test_auto_is_resolved_when_loading(folder, monkeypatch):
    settings = DiffusionSettings(path=str(folder))
    _, network = diffusion.load(settings, CPU)
    assert not getattr(network, "is_gradient_checkpointing")  # noqa: B009
    monkeypatch.setattr(memory, "available", lambda device: 2**20)
    _, network = diffusion.load(settings, CPU)
    assert getattr(network, "is_gradient_checkpointing")  # noqa: B009


def test_available_memory_is_plausible():
    assert 2**26 < memory.available(CPU) < 2**45


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="training.optimizer is 'sgd'"):
        memory.estimate(DiffusionSettings(path="nowhere"), SD15, torch.float32, 2, "sgd", False, False)


def test_flops_of_a_lora_step_from_latents(folder, monkeypatch):
    """One SD1.5 pair at 512 px: from stored latents without checkpointing, at most 1/1.6 of the common way.

    The common way encodes both images every step and checkpoints the network; text encoder, policy and reference are
    the same in both.
    """
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    modality, _ = diffusion.load(DiffusionSettings(path=str(folder), lora=LoraSettings()), CPU)
    settings = DiffusionSettings(path="nowhere", lora=LoraSettings(rank=8))
    network = memory.meta_network(settings, SD15, torch.float32)
    named = memory.meta_inputs(settings, SD15, 2)
    inputs = diffusion.DiffusionInputs(
        group=torch.zeros(2, dtype=torch.long, device="meta"),
        noisy=named["sample"],
        target=named["sample"],
        timestep=named["timestep"],
        weight=torch.empty(2, device="meta"),
        prompt=named["encoder_hidden_states"],
    )
    assert modality.reference_switch is not None
    reference = AdapterOff(modality.reference_switch)

    def step() -> None:
        reference.log_prob(modality, network, inputs, [])
        modality.log_prob(network, inputs).sum().sum().backward()

    ours = flops(step)
    network.enable_gradient_checkpointing()
    encode = flops(lambda: meta_vae().encode(torch.empty(2, 3, 512, 512, device="meta")))
    common = flops(step) + encode
    text = 0.013e12
    print(f"{ours / 1e12:.2f} against {common / 1e12:.2f} TFLOP, {(common + text) / (ours + text):.2f}x")
    assert encode == pytest.approx(2.23e12, rel=0.01)
    assert common + text >= 1.6 * (ours + text)


def meta_vae() -> Any:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(SD15.vae)
    return vae.requires_grad_(False)


def fused_attention(query, key, value, **options) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
