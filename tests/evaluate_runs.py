"""Judged world pictures for the tests of the table and of the report: no model, exact truth."""

from __future__ import annotations

import random

from mmalign.evaluate.statistics import Interval
from mmalign.evaluate.suite import Run
from mmalign.evaluate.world import judge_pictures
from mmalign.world import Caption, Scene, corrupt, random_scene, render
from mmalign.world.datasets import prompts
from mmalign.world.scene import Object


def known(interval: Interval | None) -> Interval:
    assert interval is not None
    return interval


def draw(caption: Caption, generator: random.Random) -> Scene:
    """A scene in which `caption` holds, as far as the draw of places allows."""
    mentions = [mention for mention in caption.mentions for _ in range(mention.count)]
    things = random_scene(generator, len(mentions)).objects
    try:
        return Scene(
            tuple(
                Object(mention.shape, mention.colour, mention.size or thing.size, mention.place or thing.place)
                for mention, thing in zip(mentions, things, strict=True)
            )
        )
    except ValueError:
        return draw(caption, generator)


def world_run(name: str, errors: float, count: int = 40, each: int = 1, seed=None, guidance=None) -> Run:
    """A model that gets each colour and shape wrong with probability `errors`; `each` pictures per prompt."""
    generator = random.Random(f"{name} {errors} {seed}")
    captions = [caption for caption in prompts(count, seed=3, split="tune") for _ in range(each)]
    pictures = [render(draw(corrupt(caption, generator, errors), generator)) for caption in captions]
    judged = judge_pictures([str(caption) for caption in captions], list(range(len(captions))), pictures)
    return Run(name, judged, seed, guidance)
