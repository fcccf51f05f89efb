"""Small data sets for the tests of mmalign.data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmalign.data import Candidate, Manifest, Record, ShardWriter

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"


def fixture(name: str) -> Path:
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def picture(number: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (number % 256, 255 - number % 256, 7 * number % 256))


def picture_bytes(number: int = 0, kind: str = "PNG", side: int = 8) -> bytes:
    buffer = io.BytesIO()
    picture(number, side).save(buffer, kind)
    return buffer.getvalue()


def pair(number: int) -> Record:
    """A pair with pictures and latents that tell its number; even ones prefer the first candidate."""
    candidates = [
        Candidate(
            image=picture_bytes(2 * number + place),
            tensors={"mean": torch.full((4, 2, 2), float(2 * number + place)), "std": torch.ones(4, 2, 2)},
        )
        for place in range(2)
    ]
    preferred = (0, 1) if number % 2 == 0 else (1, 0)
    return Record(f"{number:06d}", f"prompt {number}", candidates, [preferred])


def write_pairs(folder: Path, count: int, records_per_shard: int = 7) -> Manifest:
    with ShardWriter(folder, records_per_shard) as writer:
        for number in range(count):
            writer.write(pair(number))
    return Manifest.read(folder)


def native(**changes: object) -> bytes:
    """The json member of a good pair record, with changes."""
    entry = {
        "schema": 1,
        "prompt": "a red circle",
        "candidates": [{"image": "candidate0.png"}, {"image": "candidate1.png"}],
        "preferred": [[0, 1]],
        **changes,
    }
    return json.dumps(entry).encode()


def members(**changes: object) -> dict[str, bytes]:
    """The members of a good pair record, with changes in its json."""
    return {"json": native(**changes), "candidate0.png": picture_bytes(0), "candidate1.png": picture_bytes(1)}


def write_tar(path: Path, files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar with these files, in this order, by Python's tarfile."""
    rows = list(files.items()) if isinstance(files, Mapping) else list(files)
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, content in rows:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
