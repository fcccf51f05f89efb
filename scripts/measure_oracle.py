"""The oracle on record: how often it reads a scene wholly right, clean, blurred, noisy, and after the shipped VAE.

    python scripts/measure_oracle.py            # 2,000 scenes of one to four objects, every single object among them

Prints a table. The first two rows are gates of the test suite: nothing may be labelled when they fail.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from mmalign.jobs.models import ASSETS
from mmalign.world import parse_image
from mmalign.world.oracle import ParsedScene
from mmalign.world.render import render_array
from mmalign.world.scene import Scene, every_object, random_scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator, noise = random.Random(args.seed), np.random.default_rng(args.seed)
    scenes = [Scene((thing,)) for thing in every_object()]
    scenes += [random_scene(generator, 1 + index % 4) for index in range(args.scenes - len(scenes))]
    clean = [render_array(scene) for scene in scenes]
    print("| picture | read wholly right |\n|---|---|")
    print(f"| clean render | {share(scenes, clean):.4f} |")
    print(f"| reconstruction by the shipped VAE | {share(scenes, reconstruct(clean)):.4f} |")
    for radius in (0.5, 1.0, 1.5, 2.0, 3.0):
        print(f"| Gaussian blur, radius {radius} px | {share(scenes, each(clean, blurred(radius))):.4f} |")
    for level in (10, 20, 30, 40, 60):
        spoiled = each(clean, lambda picture, level=level: noisy(picture, level, noise))
        print(f"| Gaussian noise, {level} of 255 levels | {share(scenes, spoiled):.4f} |")


def share(scenes: list[Scene], pictures: list[np.ndarray]) -> float:
    right = [
        parse_image(picture) == ParsedScene(tuple(sorted(scene.objects)))
        for scene, picture in zip(scenes, pictures, strict=True)
    ]
    return float(np.mean(right))


def each(pictures: list[np.ndarray], spoil: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    return [spoil(picture) for picture in pictures]


def blurred(radius: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda picture: np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def noisy(picture: np.ndarray, level: float, noise: np.random.Generator) -> np.ndarray:
    return (picture + noise.normal(0, level, picture.shape)).clip(0, 255).round().astype(np.uint8)


@torch.no_grad()
def reconstruct(pictures: list[np.ndarray]) -> list[np.ndarray]:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(ASSETS / "diffusion", subfolder="vae", dtype=torch.float32)
    found: list[np.ndarray] = []
    for start in range(0, len(pictures), 16):
        pixels = torch.from_numpy(np.stack(pictures[start : start + 16])).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        found += list(((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return found


if __name__ == "__main__":
    main()
