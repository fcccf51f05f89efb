"""Sample grids: the same prompts and seeds under the base and under the policy as it learns. Pictures only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import nn

from mmalign.core.types import Modality
from mmalign.training.distributed import Processes, bare
from mmalign.training.settings import TrainingSettings

CAPTION, GAP, SMALLEST = 28, 4, 96


class Preview:
    """Writes `samples/step-<n>.png`: one column per prompt, and per seed a row of the base over one of the policy."""

    def __init__(
        self, modality: Modality, settings: TrainingSettings, sampling: Any, folder: Path, processes: Processes
    ):
        if settings.sample_every is not None and sampling is None:
            raise ValueError("training.sample_every is set, but train() was given no `sampling` to draw samples with")
        self._modality = modality
        self._sampling = sampling
        self._every = settings.sample_every
        self._folder = folder / "samples"
        self._processes = processes
        self._prompts = settings.sample_prompts
        self._seeds = settings.sample_seeds

    def due(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def base(self, policy: nn.Module) -> None:
        """The pictures of the untouched model; to be called before the first step."""
        if self._every is None:
            return
        for index, picture in enumerate(self._draw(policy)):
            self._folder.joinpath("base").mkdir(parents=True, exist_ok=True)
            picture.save(self._folder / "base" / f"{index:03d}.png")

    def write(self, policy: nn.Module, step: int) -> None:
        pictures = self._draw(policy)
        if not pictures:
            return
        base = [Image.open(path).convert("RGB") for path in sorted((self._folder / "base").glob("*.png"))]
        columns = len(self._prompts)
        rows: list[tuple[str, Sequence[Image.Image]]] = []
        for index, seed in enumerate(self._seeds):
            here = slice(index * columns, (index + 1) * columns)
            if base:
                rows.append((f"base, seed {seed}", base[here]))
            rows.append((f"step {step}, seed {seed}", pictures[here]))
        grid(self._prompts, rows).save(self._folder / f"step-{step}.png")

    def _draw(self, policy: nn.Module) -> list[Image.Image]:
        """On the first process, and on all where weights are sharded; the others get nothing."""
        network = bare(policy)
        if network is not policy and not self._processes.main:
            return []
        prompts = [prompt for _ in self._seeds for prompt in self._prompts]
        seeds = [seed for seed in self._seeds for _ in self._prompts]
        samples = self._modality.generate(network, prompts, seeds, self._sampling)
        images = [sample.image for sample in samples if sample.image is not None]
        if len(images) != len(samples):
            raise ValueError("training.sample_every draws pictures, and this model writes text; set it to null")
        return images if self._processes.main else []


def grid(prompts: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Labelled rows of pictures under their prompts."""
    size = max(SMALLEST, rows[0][1][0].width)
    wide = (size + GAP) * len(prompts) + GAP
    sheet = Image.new("RGB", (wide, CAPTION + (size + CAPTION + GAP) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        fitting = prompt[: max(size // 6, 1)]
        draw.text((GAP + column * (size + GAP), GAP), fitting, fill="black")
    for index, (label, pictures) in enumerate(rows):
        top = CAPTION + index * (size + CAPTION + GAP)
        draw.text((GAP, top), label, fill="grey")
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((size, size)), (GAP + column * (size + GAP), top + CAPTION // 2))
    return sheet
