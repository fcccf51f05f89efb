"""Prompts with or without pictures as records, shard by shard: captions of the world, scenes of the world to describe,
files of prompts, and shards whose records already hold prompts.

A scene of the world stands in `meta.scene` of its record, so that whatever is said of its picture can be checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmalign.data import Manifest, Record, read_shard
from mmalign.jobs.shards import Skipped, by_name
from mmalign.jobs.sources import read_prompts
from mmalign.world import Object, Scene, render
from mmalign.world.datasets import SPLITS
from mmalign.world.writing import described_scenes

DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Question:
    """A prompt that waits for answers; `number` seeds what is drawn for it."""

    number: int | str
    record: Record


class Questions:
    """`names` are the shards to be made; `questions[name]` what belongs into one of them."""

    def __init__(self, source: str | list[str], count: int | None, seed: int, per_shard: int, with_scenes: bool):
        """`with_scenes`: `world:<split>` means pictures to be described, not captions to be drawn."""
        self._per_shard = per_shard
        self._shards = by_name(Manifest.read(source)) if _are_shards(source) else {}
        if self._shards:
            if count is not None:
                raise ValueError(f"prompts {source} are shards, of which all records are taken; unset count")
            self._records: Sequence[Record] = ()
            self.names = list(self._shards)
            return
        assert isinstance(source, str)
        self._records = (
            _scenes(source.partition(":")[2], count, seed)
            if with_scenes and source.partition(":")[2] in SPLITS and source.startswith("world:")
            else [Record(f"{number:08d}", text) for number, text in enumerate(read_prompts(source, count, seed))]
        )
        self.names = [f"{index:06d}.tar" for index in range(-(-len(self._records) // per_shard))]

    def __getitem__(self, name: str) -> list[Question]:
        if self._shards:
            skipped = Skipped(max_bad_share=0.01)
            records = skipped.good(read_shard(self._shards[name], frozenset({"raw"})))
            return [Question(record.name, record) for record in records]
        start = self.names.index(name) * self._per_shard
        rows = self._records[start : start + self._per_shard]
        return [Question(start + place, record) for place, record in enumerate(rows)]


def _are_shards(source: str | list[str]) -> bool:
    return not isinstance(source, str) or not (source.startswith("world:") or source.endswith((".txt", ".jsonl")))


def _scenes(split: str, count: int | None, seed: int) -> list[Record]:
    if count is None:
        raise ValueError(f"the scenes of world:{split} are endless; set count")
    drawn = itertools.islice(described_scenes(seed, split), count)
    return [scene_record(f"{number:08d}", scene) for number, (scene, _) in enumerate(drawn)]


def scene_record(key: str, scene: Scene) -> Record:
    """A picture of the world and the request to describe it."""
    meta = {"scene": [asdict(thing) for thing in scene.objects]}
    return Record(key, DESCRIBE, meta=meta, prompt_images=[render(scene)])


def scene_in(meta: Mapping[str, Any], name: str) -> Scene:
    """What the picture of record `name` shows. Raises ValueError for a record that does not say."""
    found: Any = meta.get("scene")
    if not isinstance(found, list):
        raise ValueError(f"record {name} has no meta.scene; only pictures of the embedded world have exact truth")
    return Scene(tuple(Object(**thing) for thing in found))
