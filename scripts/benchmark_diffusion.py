"""Measures one Diffusion-DPO LoRA step of mmalign against the common way, on the CPU, alternating in one process.

    python scripts/benchmark_diffusion.py [--repeats 5] [--width 80] [--resolution 256]

The model has the shape of Stable Diffusion 1.5 with fewer channels (320 becomes --width), one pair per step:
  common    both images through the VAE every step, policy with gradient checkpointing, adapter-off reference after it
  mmalign   stored latents, reference first, checkpointing only if memory demands it, through prepare and log_prob
  minimal   the mathematics of `mmalign` written out by hand: the difference is the framework's overhead
The three alternate; printed are the smallest and the median process time of each, with their ratios. The FLOPs at full
width and 512 px are counted by a test (tests/test_memory.py).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import logsigmoid

from mmalign.core.objectives import PAIRED
from mmalign.core.reference import AdapterOff
from mmalign.core.types import Pair, Sample
from mmalign.modalities import diffusion, tiny
from mmalign.modalities.adapters import LoraSettings, adapters_off
from mmalign.modalities.diffusion_loading import no_progress_bars

BETA = 5000.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--width", type=int, default=80, help="channels of the first level, a multiple of 40; 320 in the real model"
    )
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        modality, network = load(reduced_pipeline(Path(folder), args.width, args.resolution))
        perturb(network)
        steps = {
            "common": common_step(modality, network),
            "mmalign": mmalign_step(modality, network),
            "minimal": minimal_step(modality, network),
        }
        times = alternate(network, steps, args.repeats)
    for name, row in times.items():
        print(f"{name:8} min {min(row):.3f} s   median {statistics.median(row):.3f} s")
    for name, other in (("common", "mmalign"), ("mmalign", "minimal")):
        least = min(times[name]) / min(times[other])
        middle = statistics.median(times[name]) / statistics.median(times[other])
        print(f"{name} / {other}: min {least:.3f}   median {middle:.3f}")


def alternate(network: nn.Module, steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Process time of each step, in turn, after one round to warm up. The first two must agree in their loss."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        losses = {}
        for name, step in steps.items():
            network.zero_grad(set_to_none=True)
            gc.collect()
            start = time.process_time()
            losses[name] = step()
            if turn:
                times[name].append(time.process_time() - start)
        print(turn, {name: round(loss, 4) for name, loss in losses.items()}, flush=True)
        assert abs(losses["common"] - losses["mmalign"]) < 1e-2, losses
    return times


def perturb(network: nn.Module) -> None:
    """Away from the start, where every loss is ln 2."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)


def load(path: Path) -> tuple[diffusion.DiffusionModality, Any]:
    settings = diffusion.DiffusionSettings(path=str(path), lora=LoraSettings(rank=8), gradient_checkpointing="off")
    return diffusion.load(settings, torch.device("cpu"))


def reduced_pipeline(folder: Path, width: int, resolution: int) -> Path:
    """SD1.5's own layout, in a folder: the text encoder is the tiny one, for CLIP is 0.2% of the work."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    with no_progress_bars():
        small: Any = StableDiffusionPipeline.from_pretrained(tiny.stable_diffusion(folder / "tiny"))
    unet = {
        "sample_size": resolution // 8,
        "layers_per_block": 2,
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "attention_head_dim": 8,
        "norm_num_groups": 16,
        "cross_attention_dim": small.text_encoder.config.hidden_size,
    }
    vae_width = width * 128 // 320
    vae = {
        "block_out_channels": (vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 16,
        "sample_size": resolution,
    }
    torch.manual_seed(0)
    small.register_modules(unet=UNet2DConditionModel.from_config(unet), vae=AutoencoderKL.from_config(vae))
    with no_progress_bars():
        small.save_pretrained(folder / "reduced")
    return folder / "reduced"


def pair(resolution: int) -> list[Sample]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, resolution, resolution, 3), dtype=np.uint8)
    return [Sample("pair", "a red circle left of a blue square", 0, 1, image=Image.fromarray(p)) for p in pixels]


def stored(modality: diffusion.DiffusionModality) -> list[Sample]:
    samples = pair(modality.codec.resolution)
    tensors = modality.encode_latents(samples, both_flips=False)
    return [Sample(s.key, s.prompt, s.group, s.draw, tensors=t) for s, t in zip(samples, tensors, strict=True)]


def common_step(modality: diffusion.DiffusionModality, network: Any) -> Callable[[], float]:
    samples = pair(modality.codec.resolution)

    def step() -> float:
        network.enable_gradient_checkpointing()
        inputs = modality.prepare(samples)
        policy = modality.log_prob(network, inputs)
        reference = AdapterOff(adapters_off).log_prob(modality, network, inputs, samples)
        loss, _ = PAIRED["dpo"](Pair.split(policy, 1), Pair.split(reference, 1), beta=BETA)
        loss.backward()
        network.disable_gradient_checkpointing()
        return loss.item()

    return step


def mmalign_step(modality: diffusion.DiffusionModality, network: Any) -> Callable[[], float]:
    samples = stored(modality)
    reference = AdapterOff(adapters_off)

    def step() -> float:
        inputs = modality.prepare(samples)
        anchor = Pair.split(reference.log_prob(modality, network, inputs, samples), 1)
        loss, _ = PAIRED["dpo"](Pair.split(modality.log_prob(network, inputs), 1), anchor, beta=BETA)
        loss.backward()
        return loss.item()

    return step


def minimal_step(modality: diffusion.DiffusionModality, network: Any) -> Callable[[], float]:
    samples = stored(modality)
    mean = torch.stack([sample.tensors["mean"] for sample in samples])
    deviation = torch.stack([sample.tensors["std"] for sample in samples])
    alphas, encoder = modality.schedule.alphas_cumprod, modality.prompts.encoders[0]
    tokens = modality.prompts.tokenizers[0](
        samples[0].prompt, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids

    def error(noisy, noise, timestep, prompt):
        return (network(noisy, timestep, prompt, return_dict=False)[0] - noise).square().mean((1, 2, 3))

    def step() -> float:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            timestep = torch.randint(1000, (1,), generator=generator).expand(2)
            noise = torch.randn_like(mean[:1]).expand_as(mean)
            latents = (mean + deviation * torch.randn_like(mean)) * modality.codec.scaling
            alpha = alphas[timestep].reshape(-1, 1, 1, 1)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            prompt = encoder(tokens)[0].expand(2, -1, -1)
            with adapters_off(network):
                anchor = error(noisy, noise, timestep, prompt)
        difference = error(noisy, noise, timestep, prompt) - anchor
        loss = -logsigmoid(-BETA / 2 * (difference[0] - difference[1]))
        loss.backward()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
