"""What every page is made with: templates, pictures as data URIs, strips, and files written whole or not at all.

A page needs no network and no script; everything put into it is escaped unless it is markup of our own.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from mmalign.evaluate.statistics import Interval

# Large pictures are stored as JPEG with no longer side than this.
LARGEST_PICTURE = 320


def write_whole(path: Path, text: str) -> Path:
    """The whole file or nothing: a temporary neighbour that takes its name once it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    return path


@dataclass(frozen=True)
class Axis:
    """Places on a strip, in percent of its width."""

    low: float
    high: float

    def at(self, value: float) -> float:
        return round(100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low), 2)


def axis_of(gains: Iterable[Interval]) -> Axis:
    """Holds every interval and zero."""
    ends = [0.0, *(gain.low for gain in gains), *(gain.high for gain in gains)]
    margin = max(0.06 * (max(ends) - min(ends)), 1e-9)
    return Axis(min(ends) - margin, max(ends) + margin)


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a data URI. `small` pictures, up to 128 px, are stored exactly and drawn with hard pixels."""

    uri: str
    small: bool


def thumbnail(image: Image.Image | Path) -> Thumbnail:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    small = max(image.size) <= 128
    file = io.BytesIO()
    if small:
        image.save(file, "PNG", optimize=True)
    else:
        image = image.convert("RGB")
        image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
        image.save(file, "JPEG", quality=88)
    kind = "png" if small else "jpeg"
    return Thumbnail(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", small)


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def signed(value: float, scale: float = 100.0) -> str:
    """With its sign, a true minus, and no "-0.0"."""
    text = f"{abs(scale * value):.1f}" if scale == 100.0 else f"{abs(scale * value):.3g}"
    sign = "" if float(text) == 0 else "+" if value > 0 else "\N{MINUS SIGN}"
    return sign + text


def template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "thumbnail": thumbnail}
    return environment.get_template(name)
