"""From a scene to a picture: anti-aliased shapes on a dark ground, deterministic to the bit."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from mmalign.world.scene import BACKGROUND, CELL_SIZE, COLOURS, IMAGE_SIZE, PLACES, SIZES, Scene

_OVERSAMPLE = 8


def render(scene: Scene) -> Image.Image:
    """The 64 x 64 RGB picture of `scene`."""
    return Image.fromarray(render_array(scene))


def render_array(scene: Scene) -> np.ndarray:
    """The same picture as uint8, (64, 64, 3)."""
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    pixels[:] = BACKGROUND
    for thing in scene.objects:
        row, column = (index * CELL_SIZE for index in PLACES[thing.place])
        pixels[row : row + CELL_SIZE, column : column + CELL_SIZE] = cell(thing.shape, thing.colour, thing.size)
    return pixels


@functools.cache
def cell(shape: str, colour: str, size: str) -> np.ndarray:
    """One cell with its object, uint8 (32, 32, 3)."""
    side = CELL_SIZE * _OVERSAMPLE
    image = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(image)
    centre, radius = side / 2, SIZES[size] * _OVERSAMPLE
    if shape == "circle":
        draw.ellipse((centre - radius, centre - radius, centre + radius, centre + radius), fill=COLOURS[colour])
    else:
        outline = [(centre + radius * x, centre + radius * y) for x, y in _OUTLINES[shape]]
        draw.polygon(outline, fill=COLOURS[colour])
    return np.asarray(image.resize((CELL_SIZE, CELL_SIZE), Image.Resampling.BOX))


_ARM = 1 / 3
_HEIGHT = math.sqrt(3) / 2
# Outlines in units of the radius, y downwards.
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0.0, -_HEIGHT), (1.0, _HEIGHT), (-1.0, _HEIGHT)],
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
