"""Adds to shards what training would otherwise compute anew for every pass.

    mmalign encode shards=runs/pairs output=runs/latents model.path=my/stable-diffusion model.flip=0.5
    mmalign encode shards=runs/pairs output=runs/cached model.kind=lvlm model.path=my/llava

A diffusion model adds VAE latents: the posterior's mean and standard deviation (and those of the mirrored picture where
model.flip is on), so that sampling and augmentation stay what they were. Training then needs no VAE, which costs more
than a UNet forward pass at SD1.5's size. A vision-language model adds the log-probs of its own response tokens, for
`reference: cached`: a training then needs no reference.

The manifest carries a fingerprint of all that decides them (weights, processor, template, how pictures are prepared);
training refuses what another model made. Works shard by shard and can be killed and run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from mmalign.core.reference import STORED_BY
from mmalign.core.types import Sample, Unusable
from mmalign.data import Manifest, Record, RecordError, open_image, read_shard
from mmalign.data.errors import Defect
from mmalign.jobs import models
from mmalign.jobs.models import Answering, Model
from mmalign.jobs.shards import Share, Skipped, by_name, work_through
from mmalign.jobs.sources import device_of
from mmalign.modalities.diffusion import DiffusionModality, DiffusionSettings
from mmalign.modalities.lvlm import LvlmModality

POSITIONAL = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    # folder with shards.json, tars, or URLs
    shards: str | list[str]
    # folder of the new shards
    output: str
    model: Model = field(default_factory=DiffusionSettings)
    # keep the pictures beside the latents; log-probs always keep them
    keep_pictures: bool = False
    # candidates per pass through the model
    batch_size: int = 32
    # the share of records that may be unreadable before the job stops
    max_bad_share: float = 0.01
    # [place, of how many]: this process's part of the shards; null: RANK and WORLD_SIZE, as torchrun sets them
    share: Share | None = None
    # cpu, cuda, cuda:1, mps; auto takes what is there
    device: str = "auto"


def run(settings: Settings) -> Path:
    manifest = Manifest.read(settings.shards)
    modality, network = models.load(settings.model, device_of(settings.device))
    shards = by_name(manifest)
    skipped = Skipped(settings.max_bad_share)

    def records_of(name: str) -> Iterator[Record]:
        found = _decodable(read_shard(shards[name], need=frozenset({"raw"})))
        if isinstance(modality, LvlmModality):
            yield from skipped.good(_scored(found, modality, network))
            return
        batch: list[Record] = []
        for record in skipped.good(found):
            batch.append(record)
            if sum(len(one.candidates) for one in batch) >= settings.batch_size:
                yield from _encoded(batch, modality, settings)
                batch = []
        yield from _encoded(batch, modality, settings)

    folder = Path(settings.output)
    work_through(folder, list(shards), records_of, "encode, shards", _encoder(modality, network), settings.share)
    Console().print(f"{skipped.seen} records encoded, {skipped.log.total} skipped {skipped.log.summary()} -> {folder}")
    return folder


def _encoder(modality: Answering, network: nn.Module) -> Mapping[str, Any]:
    """What the manifest says of the tensors in the shards."""
    if isinstance(modality, LvlmModality):
        return {STORED_BY: modality.reference_fingerprint(network)}
    return modality.fingerprint()


def _scored(
    found: Iterator[Record | RecordError], modality: LvlmModality, network: nn.Module
) -> Iterator[Record | RecordError]:
    """Records with the log-probs of their responses; one that the model cannot read becomes its error."""
    for record in found:
        if isinstance(record, RecordError):
            yield record
            continue
        images = [open_image(image) if isinstance(image, bytes) else image for image in record.prompt_images]
        places = [place for place, candidate in enumerate(record.candidates) if candidate.text is not None]
        samples = [
            Sample(record.name, record.prompt, 0, 0, tuple(images), text=record.candidates[place].text)
            for place in places
        ]
        try:
            tensors = dict(zip(places, modality.reference_tensors(network, samples), strict=True)) if samples else {}
        except Unusable as error:
            yield RecordError(error.kind, record.shard, record.key, error.message)
            continue
        candidates = [
            dataclasses.replace(candidate, tensors=tensors.get(place, {}))
            for place, candidate in enumerate(record.candidates)
        ]
        yield dataclasses.replace(record, candidates=candidates)


def _decodable(found: Iterator[Record | RecordError]) -> Iterator[Record | RecordError]:
    """A record with a picture that cannot be decoded becomes its error."""
    for record in found:
        if not isinstance(record, RecordError):
            try:
                for image in (*record.prompt_images, *(candidate.image for candidate in record.candidates)):
                    if isinstance(image, bytes):
                        open_image(image)
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
    latents = iter(modality.encode_latents(samples, both_flips=modality.settings.flip > 0) if samples else [])
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
