"""Adds VAE latents to shards, so that training needs no VAE: it costs more than a UNet forward pass at SD1.5's size.

    mmalign encode shards=runs/pairs output=runs/latents model.path=my/stable-diffusion model.flip=0.5

The posterior's mean and standard deviation are stored (and those of the mirrored picture where model.flip is on), so
that sampling and augmentation stay what they were. The manifest carries a fingerprint of the VAE and of how pictures
were brought to size; training refuses latents of another. Works shard by shard and can be killed and run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from mmalign.core.types import Sample
from mmalign.data import Manifest, Record, RecordError, open_image, read_shard
from mmalign.data.errors import Defect
from mmalign.jobs.shards import Share, Skipped, by_name, work_through
from mmalign.jobs.sources import device_of, with_shipped_model
from mmalign.modalities.diffusion import DiffusionModality, DiffusionSettings, load

POSITIONAL = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    # folder with shards.json, tars, or URLs
    shards: str | list[str]
    # folder of the new shards
    output: str
    model: DiffusionSettings = field(default_factory=DiffusionSettings)
    # keep the pictures beside the latents
    keep_pictures: bool = False
    # pictures per pass through the VAE
    batch_size: int = 32
    # the share of records that may be unreadable before the job stops
    max_bad_share: float = 0.01
    # [place, of how many]: this process's part of the shards; null: RANK and WORLD_SIZE, as torchrun sets them
    share: Share | None = None
    # cpu, cuda, cuda:1, mps; auto takes what is there
    device: str = "auto"


def run(settings: Settings) -> Path:
    manifest = Manifest.read(settings.shards)
    modality, _ = load(with_shipped_model(settings.model), device_of(settings.device), torch.float32, need_vae=True)
    shards = by_name(manifest)
    skipped = Skipped(settings.max_bad_share)

    def records_of(name: str) -> Iterator[Record]:
        batch: list[Record] = []
        for record in skipped.good(_decodable(read_shard(shards[name], need=frozenset({"raw"})))):
            batch.append(record)
            if sum(len(one.candidates) for one in batch) >= settings.batch_size:
                yield from _encoded(batch, modality, settings)
                batch = []
        yield from _encoded(batch, modality, settings)

    encoder = modality.fingerprint()
    folder = Path(settings.output)
    work_through(folder, list(shards), records_of, "encode, shards", encoder, settings.share)
    Console().print(f"{skipped.seen} records encoded, {skipped.log.total} skipped {skipped.log.summary()} -> {folder}")
    return folder


def _decodable(found: Iterator[Record | RecordError]) -> Iterator[Record | RecordError]:
    """A record with a picture that cannot be decoded becomes its error."""
    for record in found:
        if not isinstance(record, RecordError):
            try:
                for candidate in record.candidates:
                    if isinstance(candidate.image, bytes):
                        open_image(candidate.image)
            except Defect as defect:
                record = defect.at(record.shard, record.key)
        yield record


def _encoded(batch: list[Record], modality: DiffusionModality, settings: Settings) -> Iterator[Record]:
    samples = [
        Sample(key=record.name, prompt=record.prompt, group=0, draw=0, image=open_image(candidate.image))
        for record in batch
        for candidate in record.candidates
        if isinstance(candidate.image, bytes)
    ]
    latents = iter(modality.encode_latents(samples, both_flips=settings.model.flip > 0) if samples else [])
    for record in batch:
        candidates = [
            dataclasses.replace(
                candidate, tensors=next(latents), image=candidate.image if settings.keep_pictures else None
            )
            if isinstance(candidate.image, bytes)
            else candidate
            for candidate in record.candidates
        ]
        yield dataclasses.replace(record, candidates=candidates)
