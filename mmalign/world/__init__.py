"""The embedded world: small scenes whose pictures and captions have exact ground truth.

Everything here is deterministic by seed and depends on no other package of mmalign.
"""

from mmalign.world.language import Caption, Mention, corrupt, describe, parse_caption
from mmalign.world.oracle import Fact, Verdict, parse_image, verify
from mmalign.world.render import render
from mmalign.world.scene import Object, Scene, random_scene

__all__ = [
    "Caption",
    "Fact",
    "Mention",
    "Object",
    "Scene",
    "Verdict",
    "corrupt",
    "describe",
    "parse_caption",
    "parse_image",
    "random_scene",
    "render",
    "verify",
]
