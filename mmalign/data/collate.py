"""From a record to the samples of one row of a batch: a pair, a liked sample, or a bare prompt.

These run where records are read, loader workers included. A choice among several pairs is made by `draw` alone. A
record whose feedback does not say what is asked raises RecordError; a preference is never made up.
"""

from __future__ import annotations

from mmalign.core.types import Sample
from mmalign.data.errors import RecordError
from mmalign.data.schema import Record


def preference_pair(record: Record, draw: int, group: int) -> tuple[Sample, ...]:
    """(chosen, rejected). Of several preferred pairs one is drawn; without any, the best score against the worst."""
    chosen, rejected = _pair(record, draw)
    return _sample(record, chosen, draw, group), _sample(record, rejected, draw, group)


def liked(record: Record, draw: int, group: int) -> tuple[Sample, ...]:
    """(chosen,): the chosen one of a pair, else a desirable candidate, else the only one that is not undesirable."""
    if not record.preferred:
        desirable = [place for place, candidate in enumerate(record.candidates) if candidate.desirable]
        if desirable:
            return (_sample(record, desirable[draw % len(desirable)], draw, group),)
        if len(record.candidates) == 1:
            if record.candidates[0].desirable is False:
                raise RecordError("no_feedback", record.shard, record.key, "the only candidate is marked undesirable")
            return (_sample(record, 0, draw, group),)
    return (_sample(record, _pair(record, draw)[0], draw, group),)


def bare(record: Record, draw: int, group: int) -> tuple[Sample, ...]:
    """(prompt,): the prompt without an answer."""
    return (_sample(record, None, draw, group),)


def _pair(record: Record, draw: int) -> tuple[int, int]:
    """Indices of (chosen, rejected)."""
    if record.preferred:
        return record.preferred[draw % len(record.preferred)]
    scored = [(item.score, place) for place, item in enumerate(record.candidates) if item.score is not None]
    if len(scored) < 2:
        message = f"{len(record.candidates)} candidates, {len(scored)} of them scored, and no preferred pair"
        raise RecordError("no_feedback", record.shard, record.key, message)
    # Of equals the first candidate is taken, so that the choice does not depend on chance.
    best = max(scored, key=lambda item: (item[0], -item[1]))
    worst = min(scored)
    if best[0] == worst[0]:
        raise RecordError("tie", record.shard, record.key, f"every score is {best[0]:g} and there is no preferred pair")
    return best[1], worst[1]


def _sample(record: Record, place: int | None, draw: int, group: int) -> Sample:
    candidate = None if place is None else record.candidates[place]
    for image in (*record.prompt_images, *([candidate.image] if candidate else [])):
        if isinstance(image, bytes):
            raise TypeError("samples hold decoded pictures; read records with need={'image'}, not 'raw'")
    return Sample(
        key=record.name,
        prompt=record.prompt,
        group=group,
        draw=draw,
        prompt_images=tuple(record.prompt_images),  # pyright: ignore[reportArgumentType]
        image=candidate.image if candidate else None,  # pyright: ignore[reportArgumentType]
        text=candidate.text if candidate else None,
        tensors={**record.tensors, **candidate.tensors} if candidate else record.tensors,
    )
