"""The oracle: from a picture back to its scene, and from a scene to the truth of every fact that a caption states.

A picture is segmented by hue, each connected region is matched against the outlines of the shapes, and what matches
none is counted as malformed. Its accuracy is a gate of the test suite: nothing may be labelled by an oracle that fails
on clean renders or on the VAE's reconstructions of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from mmalign.world.language import RELATIONS, Caption, Mention
from mmalign.world.render import cell
from mmalign.world.scene import BACKGROUND, CELL_SIZE, COLOURS, IMAGE_SIZE, PLACES, SHAPES, SIZES, Object

# A pixel belongs to an object when its brightest channel is nearer to an object's than to the ground's.
_FOREGROUND = 120
# Regions below this area (px) are specks: not seen. The smallest object, a small cross, has 142 px.
_SMALLEST_REGION = 24
_LEAST_OVERLAP = 0.8
_TEMPLATE_SIDE = 24
_HUES = np.array(list(COLOURS.values()), dtype=np.float32)
_HUES = _HUES / np.linalg.norm(_HUES, axis=1, keepdims=True)


@dataclass(frozen=True)
class ParsedScene:
    """What the oracle saw. Unlike a Scene it may hold two objects in one place, and malformed regions."""

    objects: tuple[Object, ...]
    malformed: int = 0

    @property
    def count(self) -> int:
        return len(self.objects) + self.malformed


@dataclass(frozen=True)
class Fact:
    """One statement of a caption: `kind` is object, attribute or relation."""

    kind: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """The truth of each fact of a caption, for one picture."""

    truths: tuple[tuple[Fact, bool], ...]

    @property
    def correct(self) -> bool:
        """Every fact is true, the number of objects included."""
        return all(true for _, true in self.truths)

    @property
    def score(self) -> float:
        """The share of true facts, 0 to 1."""
        return sum(true for _, true in self.truths) / len(self.truths)

    def of_kind(self, kind: str) -> list[bool]:
        return [true for fact, true in self.truths if fact.kind == kind]


def parse_image(image: Image.Image | np.ndarray) -> ParsedScene:
    """The scene in a 64 x 64 RGB picture (PIL, or uint8 (64, 64, 3))."""
    pixels = np.asarray(image)
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"the oracle reads uint8 RGB pictures of {IMAGE_SIZE} x {IMAGE_SIZE} px, got {pixels.dtype} {pixels.shape}"
        )
    colour_of = _nearest_colour(pixels)
    objects, malformed = [], 0
    for index, colour in enumerate(COLOURS):
        regions, _ = ndimage.label(colour_of == index)  # pyright: ignore[reportGeneralTypeIssues]
        for number in range(1, regions.max() + 1):
            mask = np.asarray(regions == number)
            if mask.sum() < _SMALLEST_REGION:
                continue
            thing = _recognise(np.asarray(ndimage.binary_fill_holes(mask)), colour)
            objects, malformed = (objects + [thing], malformed) if thing else (objects, malformed + 1)
    return ParsedScene(tuple(sorted(objects)), malformed)


def _nearest_colour(pixels: np.ndarray) -> np.ndarray:
    """The index of each pixel's hue in COLOURS, -1 on the ground: int (64, 64)."""
    values = pixels.astype(np.float32)
    above_ground = np.maximum(values - np.array(BACKGROUND, dtype=np.float32) / 2, 1e-3)
    hue = above_ground / np.linalg.norm(above_ground, axis=-1, keepdims=True)
    return np.where(values.max(-1) >= _FOREGROUND, (hue @ _HUES.T).argmax(-1), -1)


def _recognise(mask: np.ndarray, colour: str) -> Object | None:
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    overlaps = {shape: _overlap(_resample(box), template) for shape, template in _templates().items()}
    shape = max(overlaps, key=overlaps.__getitem__)
    if overlaps[shape] < _LEAST_OVERLAP:
        return None
    extent = max(box.shape) / 2
    size = min(SIZES, key=lambda name: abs(SIZES[name] - extent))
    centre = tuple(int((axis.min() + axis.max()) / 2 // CELL_SIZE) for axis in (rows, columns))
    place = next(name for name, position in PLACES.items() if position == centre)
    return Object(shape, colour, size, place)


@functools.cache
def _templates() -> dict[str, np.ndarray]:
    templates = {}
    for shape in SHAPES:
        mask = cell(shape, "red", "large").max(-1) >= _FOREGROUND
        rows, columns = np.nonzero(mask)
        templates[shape] = _resample(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    return templates


def _resample(box: np.ndarray) -> np.ndarray:
    """A region's bounding box stretched to a square, bool (24, 24)."""
    image = Image.fromarray(box.astype(np.uint8) * 255)
    return np.asarray(image.resize((_TEMPLATE_SIDE, _TEMPLATE_SIDE), Image.Resampling.BILINEAR)) >= 128


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


def verify(caption: Caption, scene: ParsedScene) -> Verdict:
    """Which facts of `caption` hold in `scene`.

    Objects are assigned to mentions so that as many facts as possible hold; an attribute or a relation of an object
    that is not there is false. "nothing else is there" is the last fact: additions are errors, as omissions are.
    """
    slots = [mention for mention in caption.mentions for _ in range(mention.count)]
    candidates: list[Object | None] = [*scene.objects, *[None] * len(slots)]
    best = max(
        (_truths(caption, slots, chosen) for chosen in itertools.permutations(candidates, len(slots))),
        key=lambda truths: sum(true for _, true in truths),
    )
    nothing_else = (Fact("object", "nothing else is there"), scene.count <= len(slots))
    return Verdict((*best, nothing_else))


def _truths(caption: Caption, slots: list[Mention], chosen: Iterable[Object | None]) -> list[tuple[Fact, bool]]:
    chosen = list(chosen)
    truths = []
    for mention, thing in zip(slots, chosen, strict=True):
        exists = thing is not None and thing.shape == mention.shape
        truths.append((Fact("object", f"there is a {mention.shape}"), exists))
        for value, name in ((mention.colour, "colour"), (mention.size, "size"), (mention.place, "place")):
            if value is not None:
                holds = exists and getattr(thing, name) == value
                truths.append((Fact("attribute", f"the {name} of the {mention.shape} is {value}"), holds))
    if caption.relation:
        places = [
            PLACES[thing.place]
            for mention, thing in zip(slots, chosen, strict=True)
            if thing is not None and thing.shape == mention.shape
        ]
        holds = len(places) == 2 and RELATIONS[caption.relation](*places)
        text = f"the {slots[0].shape} is {caption.relation} the {slots[1].shape}"
        truths.append((Fact("relation", text), holds))
    return truths
