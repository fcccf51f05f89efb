"""How fast one core reads preference pairs from tar shards: stored SD1.5 latents against JPEG pictures decoded by PIL.

  python scripts/benchmark_loader.py [--records 512] [--seconds 4] [--folder DIR] [--json FILE]

A record is a pair. Latents: mean and standard deviation of both candidates, 4 x 64 x 64, fp16, ready for training as
they come. JPEG: both candidates, quality 95, decoded to RGB; "ready" adds what training on pictures does next on the
CPU (resize to 512 where the picture is larger, float tensor in -1..1). 512 px is what SD1.5 generates, 1024 px what
public preference sets mostly store. All go through the same RecordStream, in one process, without workers, and take
turns, so that what else runs on the machine slows all of them. Files are in the page cache: this measures the reader,
not the disk. Goals: at least 4,000 latent records a second, and at least 50 times the 1024 px JPEG pairs.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from mmalign.data import (
    Candidate,
    DataSettings,
    Geometry,
    Manifest,
    Record,
    RecordStream,
    ShardWriter,
    Step,
    preference_pair,
)

GEOMETRY = Geometry(rank=0, ranks=1, micro_batch_size=8, accumulation=1)
ROUNDS = 5


def latent_records(count: int) -> Iterator[Record]:
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        stored = torch.randn(2, 2, 4, 64, 64, generator=generator).half()
        candidates = [Candidate(tensors={"mean": mean, "std": std.abs()}) for mean, std in stored]
        yield Record(f"{number:06d}", "a red circle left of a blue square", candidates, [(0, 1)])


def jpeg_records(count: int, side: int) -> Iterator[Record]:
    """Pictures with about the bytes per pixel of photographs: smoothed noise (97 KB at 512 px, 386 KB at 1024 px)."""
    random = np.random.default_rng(0)
    for number in range(count):
        candidates = []
        for _ in range(2):
            noise = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5)).save(buffer, "JPEG", quality=95)
            candidates.append(Candidate(image=buffer.getvalue()))
        yield Record(f"{number:06d}", "a red circle left of a blue square", candidates, [(0, 1)])


@dataclass(frozen=True)
class Contender:
    """One way to read a pair; `ready` says whether pictures are made into tensors."""

    records: Iterable[Record]
    need: str
    ready: bool


def contenders(records: int) -> dict[str, Contender]:
    pictures = max(16, records // 16)
    return {
        "latents": Contender(latent_records(records), "latent", ready=False),
        "jpeg_512_decoded": Contender(jpeg_records(pictures, 512), "image", ready=False),
        "jpeg_512_ready": Contender(jpeg_records(pictures, 512), "image", ready=True),
        "jpeg_1024_decoded": Contender(jpeg_records(pictures, 1024), "image", ready=False),
        "jpeg_1024_ready": Contender(jpeg_records(pictures, 1024), "image", ready=True),
    }


def steps_of(contender: Contender, folder: Path) -> Iterator[Step]:
    """The endless stream over shards written from the contender's records."""
    with ShardWriter(folder, records_per_shard=8) as writer:
        for record in contender.records:
            writer.write(record)
    settings = DataSettings(shards=str(folder), workers=0)
    stream = RecordStream(Manifest.read(folder), settings, 0, frozenset({contender.need}), preference_pair)
    return stream.steps(GEOMETRY)


def to_tensor(picture: Image.Image | None) -> torch.Tensor:
    """(3, 512, 512) in -1..1."""
    assert picture is not None
    if picture.width != 512:
        picture = picture.resize((512, 512), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def speed(steps: Iterator[Step], ready: bool, seconds: float) -> float:
    """Records per second."""
    rows, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step = next(steps)
        rows += step.rows
        if ready:
            for row in step.micro_batches[0]:
                torch.stack([to_tensor(sample.image) for sample in row])
    return rows / (time.perf_counter() - start)


def measure(folder: Path, records: int, seconds: float) -> dict[str, float]:
    """Records per second of each contender, and by what factor latents are faster: medians over the rounds."""
    table = contenders(records)
    steps = {name: steps_of(contender, folder / name) for name, contender in table.items()}
    for name in steps:
        speed(steps[name], table[name].ready, 0.2)
    rounds = [{name: speed(steps[name], table[name].ready, seconds / ROUNDS) for name in steps} for _ in range(ROUNDS)]
    numbers = {f"{name}_per_second": float(np.median([row[name] for row in rounds])) for name in steps}
    for name in list(steps)[1:]:
        numbers[f"latents_over_{name}"] = float(np.median([row["latents"] / row[name] for row in rounds]))
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=512, help="latent records; JPEG records are a sixteenth")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each contender")
    parser.add_argument("--folder", type=Path, default=None, help="where the shards go; a temporary folder by default")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        numbers = measure(Path(folder), arguments.records, arguments.seconds)
    for name, value in numbers.items():
        print(f"{name:36s} {value:10,.1f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
