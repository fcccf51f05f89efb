"""Splits of the world, and the captioned pictures and prompts drawn from them.

A split is a property of what a caption asks for, not of a draw: the unordered pair of (colour, shape) of a two-object
caption, or the attributes of a single object, is hashed into one of ten buckets. Two of them are `test`, one is `tune`;
no base model and no preference set ever sees those, so that following a held-out prompt means more than recall.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Container, Iterator

from mmalign.world.language import Caption, describe
from mmalign.world.scene import Scene, random_scene

SPLITS = ("train", "tune", "test")
# The share of each kind of prompt; "three" is left to models that read pictures.
PROMPT_KINDS = {"one": 0.4, "count": 0.1, "two": 0.25, "relation": 0.25}
# How many objects a scene of the text-to-image training set has: one, two, three.
OBJECT_COUNTS = (0.45, 0.45, 0.10)


def split_of(caption: Caption) -> str:
    """`train`, `tune` or `test`; the same for every wording of one composition."""
    if len(caption.mentions) == 1:
        mention = caption.mentions[0]
        key: object = (mention.count, mention.colour, mention.shape, mention.size, mention.place)
    else:
        key = sorted((mention.colour, mention.shape) for mention in caption.mentions)
    bucket = hashlib.sha256(repr(key).encode()).digest()[0] % 10
    return "test" if bucket < 2 else "tune" if bucket == 2 else "train"


def captioned_scenes(seed: int, split: str = "train", counts=OBJECT_COUNTS) -> Iterator[tuple[Scene, Caption]]:
    """Endless scenes with a true caption of `split`; `counts` are the odds of one, two and three objects."""
    _check_split(split)
    generator = random.Random(f"{seed} {split} scenes")
    while True:
        scene = random_scene(generator, generator.choices(range(1, len(counts) + 1), counts)[0])
        if generator.random() < 0.15 and len(scene.objects) > 1:
            scene = _alike(scene)
        caption = describe(scene, generator)
        if split_of(caption) == split:
            yield scene, caption


def prompts(count: int, seed: int, split: str = "train") -> list[Caption]:
    """`count` different prompts of `split`, of the kinds of PROMPT_KINDS.

    There are only some dozens of prompts with one object or a count; once they are used up, the other kinds fill in.
    """
    _check_split(split)
    generator = random.Random(f"{seed} {split} prompts")
    chosen: dict[Caption, None] = {}
    odds = dict(PROMPT_KINDS)
    while len(chosen) < count:
        kind = generator.choices(list(odds), list(odds.values()))[0]
        fresh = _fresh(kind, split, chosen, generator)
        if fresh is not None:
            chosen[fresh] = None
        elif len(odds) > 1:
            del odds[kind]
        else:
            raise ValueError(f"split {split} has fewer than {count} different prompts")
    return list(chosen)


def _fresh(kind: str, split: str, seen: Container[Caption], generator: random.Random) -> Caption | None:
    """A caption that is not in `seen`; None where 400 draws found none."""
    for _ in range(400):
        caption = _caption_of_kind(kind, split, generator)
        if caption not in seen:
            return caption
    return None


def _caption_of_kind(kind: str, split: str, generator: random.Random) -> Caption:
    while True:
        if kind == "count":
            scene = _alike(random_scene(generator, generator.choice((2, 3))))
        else:
            scene = random_scene(generator, 1 if kind == "one" else 2)
        caption = describe(scene, generator)
        if caption.kind == kind and split_of(caption) == split:
            return caption


def _alike(scene: Scene) -> Scene:
    """The scene with every object in the shape and colour of the first."""
    first = scene.objects[0]
    return Scene(tuple(type(first)(first.shape, first.colour, thing.size, thing.place) for thing in scene.objects))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; expected one of {', '.join(SPLITS)}")
