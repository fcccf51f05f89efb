"""How much the samples of one prompt differ: what preference training may cost, beside what it gains.

Two measures, both averaged over prompts: the distance between pictures, which needs no judge, and the share of right
samples that show different content, which needs an exact one.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmalign.evaluate.statistics import Interval, mean_interval, paired_difference

if TYPE_CHECKING:
    from mmalign.evaluate.suite import Judged

# Pictures are compared at this size, so that fine grain does not pass for another picture.
SIDE = 64


def diversity(models: Sequence[Sequence[Judged]]) -> Interval | None:
    """The mean distance between two pictures of one prompt by one model: 0 if it always draws the same one.

    The distance is the mean absolute difference of their pixels, as a share of the whole range. None where no prompt
    has two pictures.
    """
    found = [(prompt, distance) for judged in models for prompt, distance in _distances(judged).items()]
    if not found:
        return None
    return mean_interval(np.array([distance for _, distance in found]), [prompt for prompt, _ in found])


def diversity_gain(models: Sequence[Sequence[Judged]], base: Sequence[Judged]) -> Interval | None:
    """The paired difference of `diversity` to the base, prompt by prompt."""
    before = _distances(base)
    found = [
        (prompt, distance, before[prompt])
        for judged in models
        for prompt, distance in _distances(judged).items()
        if prompt in before
    ]
    if not found:
        return None
    prompts, after, ours = zip(*found, strict=True)
    return paired_difference(np.array(after), np.array(ours), prompts)


def variety(models: Sequence[Sequence[Judged]]) -> Interval | None:
    """Of two right samples of one prompt by one model, how often do they show different content?

    A prompt with k right samples gives the share of its k (k - 1) / 2 pairs that differ: 0 if the model always draws
    the same picture, 1 if it never repeats itself, whatever k is. Wrong samples are left out, lest errors count as
    variety; where there is no verdict, every sample counts. Averaged over prompts and models; None without two.
    """
    shares, prompts = [], []
    for judged in models:
        contents: dict[str, list[Hashable]] = {}
        for one in judged:
            if one.correct is not False and one.content is not None:
                contents.setdefault(one.prompt, []).append(one.content)
        for prompt, shown in contents.items():
            if len(shown) > 1:
                shares.append(np.mean([first != second for first, second in itertools.combinations(shown, 2)]))
                prompts.append(prompt)
    return mean_interval(np.array(shares), prompts) if shares else None


def _distances(judged: Sequence[Judged]) -> dict[str, float]:
    """prompt -> mean distance over the pairs of its pictures, for prompts with two or more."""
    pictures: dict[str, list[Image.Image | Path]] = {}
    for one in judged:
        if one.image is not None:
            pictures.setdefault(one.prompt, []).append(one.image)
    return {prompt: _mean_distance(shown) for prompt, shown in pictures.items() if len(shown) > 1}


def _mean_distance(pictures: Sequence[Image.Image | Path]) -> float:
    pixels = [_pixels(picture) for picture in pictures]
    return float(np.mean([np.abs(first - second).mean() for first, second in itertools.combinations(pixels, 2)]))


def _pixels(picture: Image.Image | Path) -> np.ndarray:
    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            return _pixels(opened.convert("RGB"))
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255
