"""Scenes: one to three objects, each with a shape, a colour, a size and a place.

A picture is 64 x 64 px, divided into four cells of 32 px (four VAE patches of 8 px a side). An object stands in the
middle of a cell and no two share one: free placement cannot be learnt in minutes on a laptop, a grid can.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

IMAGE_SIZE = 64
CELL_SIZE = 32

SHAPES = ("circle", "square", "triangle", "cross")
# The corners of the RGB cube without black, white and grey: anti-aliased edges then keep their hue.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 225, 40),
    "magenta": (225, 50, 215),
    "cyan": (40, 215, 225),
}
BACKGROUND = (16, 16, 24)
# Radius in px. Below about 7 px a circle and a square rasterize to blobs that no parser can tell apart.
SIZES: dict[str, float] = {"small": 8.0, "large": 13.0}
# name -> (row, column)
PLACES: dict[str, tuple[int, int]] = {
    "top left": (0, 0),
    "top right": (0, 1),
    "bottom left": (1, 0),
    "bottom right": (1, 1),
}


@dataclass(frozen=True, order=True)
class Object:
    """One thing in a scene; every field is a key of the tables above."""

    shape: str
    colour: str
    size: str
    place: str

    def __post_init__(self) -> None:
        for value, allowed, name in (
            (self.shape, SHAPES, "shape"),
            (self.colour, COLOURS, "colour"),
            (self.size, SIZES, "size"),
            (self.place, PLACES, "place"),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is not in this world; expected one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Scene:
    """The objects of a picture, in no particular order, at most one to a place."""

    objects: tuple[Object, ...]

    def __post_init__(self) -> None:
        places = [thing.place for thing in self.objects]
        if len(set(places)) != len(places):
            raise ValueError(f"two objects share a place: {places}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scene) and sorted(self.objects) == sorted(other.objects)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.objects)))


def random_scene(generator: random.Random, count: int) -> Scene:
    """`count` objects (1 to 4), each attribute uniform, places without replacement."""
    places = generator.sample(list(PLACES), count)
    return Scene(
        tuple(
            Object(generator.choice(SHAPES), generator.choice(list(COLOURS)), generator.choice(list(SIZES)), place)
            for place in places
        )
    )


def every_object() -> list[Object]:
    """All shape x colour x size x place combinations: 192 objects."""
    return [
        Object(shape, colour, size, place)
        for shape in SHAPES
        for colour in COLOURS
        for size in SIZES
        for place in PLACES
    ]
