"""The world's oracle as a judge: exact truth for pictures of the embedded world, and for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmalign.core.types import Sample
from mmalign.evaluate.suite import Judged, Truth
from mmalign.world import parse_caption, parse_image, verify

if TYPE_CHECKING:
    from PIL.Image import Image


def judge_pictures(prompts: Sequence[str], seeds: Sequence[int], pictures: Sequence[Image]) -> list[Judged]:
    """One Judged per picture: right if every fact of the prompt holds and nothing else is there; the score is the share
    of true facts.

    Raises ValueError for a prompt outside the world's grammar and for pictures that are not 64 x 64 RGB.
    """
    return [judge(prompt, seed, picture) for prompt, seed, picture in zip(prompts, seeds, pictures, strict=True)]


def judge(prompt: str, seed: int, picture: Image) -> Judged:
    """The verdict on one picture; its content is the scene that the oracle saw."""
    caption, scene = parse_caption(prompt), parse_image(picture)
    verdict = verify(caption, scene)
    facts = tuple(Truth(fact.kind, fact.text, bool(holds)) for fact, holds in verdict.truths)
    return Judged(prompt, caption.kind, seed, float(verdict.score), bool(verdict.correct), facts, scene, picture)


def oracle_score(samples: Sequence[Sample]) -> list[float]:
    """The oracle as a scorer: the share of the prompt's facts that hold in the picture, 0 to 1."""
    scores = []
    for sample in samples:
        if sample.image is None:
            raise ValueError(f"sample {sample.key} has no image; the oracle reads pictures")
        scores.append(judge(str(sample.prompt), 0, sample.image).score)
    return scores
