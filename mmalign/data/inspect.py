"""What a data set holds: counts, fields, feedback, bad records by kind, and a grid of its pictures.

Read-only. Every record is decoded when pictures are asked for, so that a truncated one is found here and not in
training; `limit` looks at a sample of the shards' first records instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mmalign.data.columns import Columns
from mmalign.data.errors import RecordError
from mmalign.data.manifest import Manifest, read_shard
from mmalign.data.reader import ErrorLog
from mmalign.data.schema import Record

_CAPTION = 30
_FRAME = {"chosen": (35, 140, 70), "rejected": (190, 60, 50), None: (150, 150, 150)}


@dataclass
class Summary:
    """Counts over the records that were looked at. Fields count candidates; feedback counts records."""

    shards: int = 0
    records: int = 0  # what the manifest says
    looked_at: int = 0  # how many of them this summary rests on, bad ones included
    candidates: Counter[int] = field(default_factory=Counter)  # records by their number of candidates
    fields: Counter[str] = field(default_factory=Counter)
    feedback: Counter[str] = field(default_factory=Counter)  # preferred, scores, desirable, tie, none
    prompt_characters: tuple[int, int] | None = None  # shortest and longest text prompt
    encoder: dict[str, Any] | None = None
    errors: ErrorLog = field(default_factory=ErrorLog)

    def lines(self) -> list[str]:
        """The summary in words, a line per subject."""
        found = [
            f"{self.records} records in {self.shards} shards ({self.looked_at} looked at)",
            f"candidates per record: {_counts(self.candidates)}",
            f"fields: {_counts(self.fields)}",
            f"feedback: {_counts(self.feedback)}",
        ]
        if self.prompt_characters is not None:
            found.append("prompts: {} to {} characters".format(*self.prompt_characters))
        if self.encoder is not None:
            found.append(f"latents encoded by: {self.encoder}")
        found.append(f"bad records: {self.errors.summary() or 'none'}")
        return found


def summarise(
    manifest: Manifest,
    columns: Columns | None = None,
    need: frozenset[str] = frozenset({"image"}),
    limit: int | None = None,
    cache: str | Path | None = None,
) -> Summary:
    """Looks at every record, or at `limit` of them spread evenly over the shards."""
    summary = Summary(shards=len(manifest.shards), records=manifest.records)
    summary.encoder = dict(manifest.encoder) if manifest.encoder is not None else None
    for record in records(manifest, columns, need, limit, cache):
        summary.looked_at += 1
        if isinstance(record, RecordError):
            summary.errors.add(record)
        else:
            _count(summary, record)
    return summary


def records(
    manifest: Manifest,
    columns: Columns | None = None,
    need: frozenset[str] = frozenset({"image"}),
    limit: int | None = None,
    cache: str | Path | None = None,
) -> Iterator[Record | RecordError]:
    """Records in the order of the shards; with `limit`, the first few of each shard."""
    left = manifest.records if limit is None else limit
    for number, shard in enumerate(manifest.shards):
        share = -(-left // (len(manifest.shards) - number))
        for record in read_shard(shard, need, columns, cache):
            if limit is not None and share <= 0:
                break
            share, left = share - 1, left - 1
            yield record


def feedback_of(record: Record) -> str:
    """Which feedback the record carries: preferred, tie, scores, desirable or none."""
    scores = {candidate.score for candidate in record.candidates if candidate.score is not None}
    if record.preferred:
        return "preferred"
    if scores:
        tied = len(scores) == 1 and len(record.candidates) > 1
        return "tie" if tied else "scores"
    if any(candidate.desirable is not None for candidate in record.candidates):
        return "desirable"
    return "none"


def picture_grid(records: Sequence[Record], side: int = 160, columns: int = 4) -> Image.Image:
    """One row per record, its prompt above its candidates: chosen framed green, rejected red, others grey.

    At most `columns` candidates are shown. Raises ValueError when there is no record.
    """
    if not records:
        raise ValueError("no records to show")
    shown = min(columns, max(1, max(len(record.candidates) for record in records)))
    grid = Image.new("RGB", (shown * side, len(records) * (side + _CAPTION)), "white")
    draw = ImageDraw.Draw(grid)
    for row, record in enumerate(records):
        top = row * (side + _CAPTION)
        title = f"{record.key}: {_prompt_text(record.prompt)}".replace("\n", " ")
        draw.text((4, top + 8), _shortened(title, draw, shown * side - 8), "black")
        for place, candidate in enumerate(record.candidates[:shown]):
            box = (place * side, top + _CAPTION, (place + 1) * side, top + _CAPTION + side)
            if candidate.image is not None:
                _paste(grid, record.picture(place), box)
            elif candidate.text is not None:
                draw.text((box[0] + 8, box[1] + 8), _wrapped(candidate.text, side), "black")
            draw.rectangle(
                (box[0] + 1, box[1] + 1, box[2] - 2, box[3] - 2), outline=_FRAME[_role(record, place)], width=3
            )
    return grid


def _count(summary: Summary, record: Record) -> None:
    summary.candidates[len(record.candidates)] += 1
    summary.feedback[feedback_of(record)] += 1
    for candidate in record.candidates:
        for name in ("image", "text", "score", "desirable", "source"):
            summary.fields[name] += getattr(candidate, name) is not None
        summary.fields["segments"] += bool(candidate.segments)
        summary.fields["latent"] += bool(candidate.tensors)
    summary.fields["prompt image"] += len(record.prompt_images)
    if isinstance(record.prompt, str):
        low, high = summary.prompt_characters or (len(record.prompt), len(record.prompt))
        summary.prompt_characters = (min(low, len(record.prompt)), max(high, len(record.prompt)))


def _counts(counter: Counter[Any]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in sorted(counter.items()) if count) or "none"


def _role(record: Record, place: int) -> str | None:
    if any(chosen == place for chosen, _ in record.preferred):
        return "chosen"
    if any(rejected == place for _, rejected in record.preferred):
        return "rejected"
    return None


def _paste(grid: Image.Image, picture: Image.Image, box: tuple[int, int, int, int]) -> None:
    room = box[2] - box[0] - 8
    if max(picture.size) * 2 <= room:
        # Small pictures grow by a whole factor, so that their pixels can be seen as they are.
        factor = room // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    else:
        picture = picture.copy()
        picture.thumbnail((room, room))
    left = (box[0] + box[2] - picture.width) // 2
    grid.paste(picture, (left, (box[1] + box[3] - picture.height) // 2))


def _prompt_text(prompt: Any) -> str:
    """A text prompt as it is; of a chat the last message."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt[-1].get("content", "")) if prompt else ""


def _shortened(text: str, draw: ImageDraw.ImageDraw, pixels: int) -> str:
    """`text`, cut where it would run out of `pixels`."""
    shown = text[:pixels]
    while len(shown) > 1 and draw.textlength(shown + "...") > pixels:
        shown = shown[:-1]
    return text if draw.textlength(text[:pixels]) <= pixels and len(text) <= pixels else shown + "..."


def _wrapped(text: str, pixels: int) -> str:
    width = max(8, pixels // 6 - 3)  # the built-in font is some 6 pixels wide
    return "\n".join(text[start : start + width] for start in range(0, min(len(text), 8 * width), width))
