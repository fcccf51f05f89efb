"""N candidates for each prompt, drawn from a model and written to shards.

    mmalign generate output=runs/candidates prompts=world:train count=512
    mmalign generate config.yaml model.path=my/stable-diffusion prompts=prompts.txt

Works shard by shard: shards that exist are skipped, so that it can be killed and run again. Under torchrun the shards
are shared out among the processes. The picture of a candidate depends on (seed, prompt number, candidate number) alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mmalign.data import Candidate, Record
from mmalign.jobs.shards import Share, remaining, work_through
from mmalign.jobs.sources import device_of, read_prompts, seed_of, with_shipped_model
from mmalign.modalities.diffusion import DiffusionModality, DiffusionSampling, DiffusionSettings, load

POSITIONAL = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    # folder of the new shards
    output: str
    # world:train, world:tune, world:test, a .txt file (a prompt a line) or a .jsonl file ({"prompt": ...} a line)
    prompts: str = "world:train"
    # how many prompts; null: all of the file
    count: int | None = None
    # pictures for each prompt
    candidates: int = 4
    # [prompts, pictures]: so many pictures for each of the first prompts, to see how much they differ; null: none
    repeats: tuple[int, int] | None = None
    # the guidance scale of each candidate, e.g. [2, 2, 1, 1]; null: sampling.guidance_scale for all
    guidance: list[float] | None = None
    seed: int = 0
    records_per_shard: int = 128
    # [place, of how many]: this process's part of the shards; null: RANK and WORLD_SIZE, as torchrun sets them
    share: Share | None = None
    # cpu, cuda, cuda:1, mps; auto takes what is there
    device: str = "auto"
    model: DiffusionSettings = field(default_factory=DiffusionSettings)
    sampling: DiffusionSampling = field(default_factory=DiffusionSampling)


def run(settings: Settings) -> Path:
    if settings.guidance and len(settings.guidance) != settings.candidates:
        raise ValueError(
            f"guidance lists {len(settings.guidance)} scales for {settings.candidates} candidates; give one for each"
        )
    prompts = read_prompts(settings.prompts, settings.count, settings.seed)
    count = -(-len(prompts) // settings.records_per_shard)
    folder, names = Path(settings.output), [f"{index:06d}.tar" for index in range(count)]

    @functools.cache
    def model() -> tuple[DiffusionModality, nn.Module]:
        return load(with_shipped_model(settings.model), device_of(settings.device), torch.float32, need_vae=True)

    if remaining(folder, names, settings.share):
        model()  # before anything is written, so that a wrong model.path leaves no folder behind

    def records_of(name: str) -> Iterator[Record]:
        modality, network = model()
        start = int(Path(name).stem) * settings.records_per_shard
        numbers = range(start, min(start + settings.records_per_shard, len(prompts)))
        wanted = {
            (number, place): scale for number in numbers for place, scale in enumerate(scales_of(settings, number))
        }
        drawn: dict[tuple[int, int], Candidate] = {}
        for scale in dict.fromkeys(wanted.values()):
            places = [place for place, one in wanted.items() if one == scale]
            samples = modality.generate(
                network,
                [prompts[number] for number, _ in places],
                [seed_of(settings.seed, number, place) for number, place in places],
                dataclasses.replace(settings.sampling, guidance_scale=scale),
            )
            for place, sample in zip(places, samples, strict=True):
                drawn[place] = Candidate(image=sample.image, source=f"{settings.model.path}, guidance {scale:g}")
        for number in numbers:
            candidates = [drawn[number, place] for place in range(len(scales_of(settings, number)))]
            yield Record(key=f"{number:08d}", prompt=prompts[number], candidates=candidates)

    return work_through(folder, names, records_of, "generate, shards", share=settings.share)


def scales_of(settings: Settings, number: int) -> list[float]:
    """The guidance scale of each candidate of a prompt."""
    scales = settings.guidance or [settings.sampling.guidance_scale] * settings.candidates
    prompts, pictures = settings.repeats or (0, 0)
    more = pictures - len(scales) if number < prompts else 0
    return scales + [settings.sampling.guidance_scale] * more
