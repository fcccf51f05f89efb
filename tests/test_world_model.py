"""Gates of the pipeline that ships with mmalign: the oracle reads its VAE, and it is a plain diffusers folder."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.jobs.models import ASSETS
from mmalign.world import parse_image
from mmalign.world.oracle import ParsedScene
from mmalign.world.render import render_array
from mmalign.world.scene import Scene, every_object, random_scene

FOLDER = ASSETS / "diffusion"


@torch.no_grad()
def test_at_least_97_percent_of_the_reconstructions_are_parsed_wholly_right():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(FOLDER, subfolder="vae", torch_dtype=torch.float32)
    generator = random.Random(0)
    scenes = [Scene((thing,)) for thing in every_object()]
    scenes += [random_scene(generator, 1 + index % 3) for index in range(208)]
    right = 0
    for start in range(0, len(scenes), 16):
        chunk = scenes[start : start + 16]
        pixels = torch.from_numpy(np.stack([render_array(scene) for scene in chunk])).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample  # pyright: ignore
        pictures = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for scene, picture in zip(chunk, pictures, strict=True):
            right += parse_image(picture) == ParsedScene(tuple(sorted(scene.objects)))
    assert right / len(scenes) >= 0.97


def test_the_folder_is_small_and_loads_as_a_stable_diffusion_pipeline():
    from diffusers import StableDiffusionPipeline

    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 20_000_000
    assert {path.suffix for path in FOLDER.rglob("*") if path.is_file()} <= {".json", ".jsonl", ".safetensors"}
    pipeline: Any = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    [picture] = pipeline("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert picture.size == (64, 64)


@pytest.mark.parametrize("word", ["magenta", "triangles", "crosses", "bottom"])
def test_each_word_of_the_world_is_one_token(word):
    from transformers import CLIPTokenizer

    assert len(CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")(word).input_ids) == 3
