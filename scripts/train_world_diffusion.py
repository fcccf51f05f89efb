"""Trains the Stable Diffusion pipeline that ships with mmalign, from nothing, on the embedded world.

    python scripts/train_world_diffusion.py --out mmalign/world/assets/diffusion

Three stages, each on the renders of train-split scenes:
  vae     AutoencoderKL, 64 px to 8 x 8 x 4: mean absolute + squared error, KL weight 1e-6
  unet    UNet2DConditionModel and CLIPTextModel together, v-prediction, zero terminal SNR, 10% empty captions, EMA
  errors  the same, on captions in which each colour and shape word is wrong with probability 0.2, as web captions are:
          the model then knows the right answer and errs, and alignment has something to do
Stages are skipped when their folder exists under --work. The log (stage, step, loss, seconds) is work/log.jsonl.
With --start the VAE is that of an earlier pipeline, and the stage unet goes on from its UNet and text encoder.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmalign.world import corrupt, parse_image, verify
from mmalign.world.datasets import captioned_scenes, prompts
from mmalign.world.language import COUNTS, RELATIONS
from mmalign.world.oracle import ParsedScene
from mmalign.world.render import render_array
from mmalign.world.scene import COLOURS, PLACES, SHAPES, SIZES, Scene, random_scene

MAX_CAPTION_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline (fp16 safetensors)")
    parser.add_argument("--work", type=Path, default=Path("runs/world-diffusion"), help="stages and log")
    parser.add_argument("--start", type=Path, help="folder of an earlier pipeline to go on from; default: from nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--unet-steps", type=int, default=6000)
    parser.add_argument("--unet-learning-rate", type=float, default=1e-3, help="at its peak")
    parser.add_argument("--pictures", type=int, default=24_000, help="captioned scenes, encoded once")
    parser.add_argument("--error-steps", type=int, default=1000)
    parser.add_argument("--error-rate", type=float, default=0.2, help="share of wrong colour and shape words")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    earlier = StableDiffusionPipeline.from_pretrained(args.start, torch_dtype=torch.float32) if args.start else None
    vae = earlier.vae if earlier else stage(args, "vae", AutoencoderKL, train_vae, args.vae_steps)
    vae.eval().requires_grad_(False)
    pictures = Latents(vae, args.seed, args.pictures)
    train = functools.partial(train_unet, vae=vae, pictures=pictures)
    clean = functools.partial(train, error_rate=0.0, peak=args.unet_learning_rate, start_from=earlier)
    base = stage(args, "unet", StableDiffusionPipeline, clean, args.unet_steps)
    wrong = functools.partial(train, error_rate=args.error_rate, peak=3e-4, start_from=base)
    errs = stage(args, "errors", StableDiffusionPipeline, wrong, args.error_steps)
    errs.to(dtype=torch.float16).save_pretrained(args.out, safe_serialization=True)
    shutil.copy(args.work / "log.jsonl", args.out / "training_log.jsonl")
    for path in args.out.rglob("*.json"):
        forget_origin(path)


def forget_origin(path: Path) -> None:
    """Drops the folder that diffusers notes in each config: it means nothing elsewhere."""
    fields = json.loads(path.read_text())
    if fields.pop("_name_or_path", None):
        path.write_text(json.dumps(fields, indent=2) + "\n")


def stage(args, name, loader, train, steps):
    """The model of a stage: read from the work folder, or trained and written there."""
    folder = args.work / name
    if not folder.exists():
        with (args.work / "log.jsonl").open("a") as file:
            model = train(args, lambda **row: log(file, stage=name, **row), steps)
        model.save_pretrained(folder)
    return loader.from_pretrained(folder)


def log(file, **row) -> None:
    print(json.dumps(row), flush=True)
    file.write(json.dumps(row) + "\n")
    file.flush()


def to_tensor(arrays: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures to (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_arrays(pixels: torch.Tensor) -> list[np.ndarray]:
    return list(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


# -- vae ---------------------------------------------------------------------------------------------------------------


def train_vae(args, report, steps: int) -> AutoencoderKL:
    build: Any = AutoencoderKL  # its annotations are narrower than its arguments
    vae = build(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    generator, start = random.Random(args.seed), time.time()
    for step in range(1, steps + 1):
        scenes = [random_scene(generator, generator.randint(0, 4)) for _ in range(8)]
        pixels = to_tensor([render_array(scene) for scene in scenes])
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        loss = error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            right = reconstruction_accuracy(vae, 200)
            report(step=step, loss=loss.item(), oracle_on_reconstructions=right, seconds=time.time() - start)
    vae.register_to_config(scaling_factor=measure_scaling(vae, args.seed))
    return vae


@torch.no_grad()
def reconstruction_accuracy(vae, count: int, seed: int = 12345) -> float:
    generator = random.Random(seed)
    scenes = [random_scene(generator, 1 + index % 4) for index in range(count)]
    right = 0
    for chunk in _batched(scenes, 50):
        pixels = to_tensor([render_array(scene) for scene in chunk])
        decoded = to_arrays(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)
        for scene, array in zip(chunk, decoded, strict=True):
            right += parse_image(array) == ParsedScene(tuple(sorted(scene.objects)))
    return right / count


def _batched(items, size):
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.no_grad()
def measure_scaling(vae, seed: int) -> float:
    """One over the standard deviation of the latents, as in Stable Diffusion."""
    generator = random.Random(seed)
    pixels = to_tensor([render_array(random_scene(generator, 1 + index % 3)) for index in range(256)])
    return 1 / vae.encode(pixels).latent_dist.sample().std().item()


class Latents:
    """Captioned scenes with the posterior mean of their latents, encoded once."""

    def __init__(self, vae, seed: int, count: int):
        source = captioned_scenes(seed)
        self.scenes, self.captions = zip(*(next(source) for _ in range(count)), strict=True)
        with torch.no_grad():
            self.latents = torch.cat([self._encode(vae, chunk) for chunk in _batched(self.scenes, 128)])

    @staticmethod
    def _encode(vae, scenes: Sequence[Scene]) -> torch.Tensor:
        pixels = to_tensor([render_array(scene) for scene in scenes])
        return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor


# -- unet --------------------------------------------------------------------------------------------------------------


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges make each word of the world one token."""
    words = {"a", "and", "in", "the", ",", *COUNTS, *COLOURS, *SIZES, *SHAPES}
    words |= {word for phrase in (*RELATIONS, *PLACES) for word in phrase.split()}
    words |= {{"cross": "crosses"}.get(shape, f"{shape}s") for shape in SHAPES}
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = WhitespaceSplit()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = BpeTrainer(vocab_size=2000, special_tokens=special, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(sorted(words), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    learner.model.save(str(folder))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_CAPTION_TOKENS)


def build_pipeline(work: Path, vae) -> StableDiffusionPipeline:
    tokenizer: Any = build_tokenizer(work / "tokenizer")
    for word in ("magenta", "crosses", "triangles", "bottom"):
        assert len(tokenizer(word).input_ids) == 3, f"{word} is not one token: {tokenizer.tokenize(word)}"
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_CAPTION_TOKENS,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler: Any = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )
    absent: Any = None
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, absent, absent, requires_safety_checker=False
    )


def train_unet(args, report, steps: int, *, vae, pictures: Latents, error_rate: float, peak: float, start_from):
    pipeline = start_from or build_pipeline(args.work, vae)
    pipeline.set_progress_bar_config(disable=True)
    modules = torch.nn.ModuleList([pipeline.unet, pipeline.text_encoder]).train()
    average = copy.deepcopy(modules)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=peak, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.05)
    draws, start, running = random.Random(args.seed + 1), time.time(), []
    for step in range(1, steps + 1):
        loss = denoising_loss(pipeline, pictures, draws, error_rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_average(average, modules, 0.998 if step > 1000 or start_from else 0.98)
        running.append(loss.item())
        if step % 250 == 0:
            report(step=step, loss=float(np.mean(running[-250:])), seconds=time.time() - start)
        if step % 1000 == 0 or step == steps:
            with weights_of(average, modules):
                report(step=step, **{f"guided_{k}": v for k, v in accuracy(pipeline, 3.0).items()})
                report(step=step, **{f"unguided_{k}": v for k, v in accuracy(pipeline, 1.0).items()})
                pipeline.save_pretrained(args.work / f"latest-{error_rate}")
    modules.load_state_dict(average.state_dict())
    modules.eval()
    return pipeline


def denoising_loss(pipeline, pictures: Latents, draws: random.Random, error_rate: float, batch: int = 32):
    indices = draws.sample(range(len(pictures.captions)), batch)
    texts = [str(corrupt(pictures.captions[index], draws, error_rate)) for index in indices]
    texts = ["" if draws.random() < 0.1 else text for text in texts]
    latents = pictures.latents[indices]
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (batch,))
    noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
    target = pipeline.scheduler.get_velocity(latents, noise, timesteps)
    embedded = pipeline.text_encoder(tokens_of(pipeline, texts))[0]
    return torch.nn.functional.mse_loss(pipeline.unet(noisy, timesteps, embedded).sample, target)


def tokens_of(pipeline, texts: list[str]) -> torch.Tensor:
    return pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def update_average(average, modules, decay: float) -> None:
    for mean, value in zip(average.parameters(), modules.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


class weights_of:
    """The averaged weights for the length of a with-block."""

    def __init__(self, average, modules):
        self.average, self.modules = average, modules

    def __enter__(self):
        self.saved = copy.deepcopy(self.modules.state_dict())
        self.modules.load_state_dict(self.average.state_dict())
        self.modules.eval()

    def __exit__(self, *_):
        self.modules.load_state_dict(self.saved)
        self.modules.train()


def accuracy(pipeline, guidance: float, count: int = 192) -> dict[str, float]:
    """The share of tune-split prompts drawn wholly right, by kind."""
    wanted = prompts(count, seed=7, split="tune")
    right: dict[str, list[bool]] = {}
    for chunk in _batched(wanted, 64):
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            [str(caption) for caption in chunk],
            guidance_scale=guidance,
            num_inference_steps=20,
            generator=generator,
            output_type="np",
        ).images
        for caption, image in zip(chunk, images, strict=True):
            verdict = verify(caption, parse_image((image * 255).round().astype(np.uint8)))
            right.setdefault(caption.kind, []).append(verdict.correct)
    rates = {kind: float(np.mean(values)) for kind, values in right.items()}
    return {"all": float(np.mean(list(itertools.chain(*right.values())))), **rates}


if __name__ == "__main__":
    main()
