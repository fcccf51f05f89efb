"""What the training loop costs per step beyond its mathematics, against a minimal loop written by hand.

    OMP_NUM_THREADS=1 python scripts/benchmark_overhead.py --steps 60 --rounds 7

Both train the same small diffusers UNet (from its configuration) by Diffusion-DPO with a frozen copy as reference, on
the same records of one folder of shards of latents. The hand-written loop reads its records beforehand, calls the same
`prepare` and `log_prob`, clips, steps AdamW and reads the loss each step; it writes nothing. The package's loop also
streams from tar, gathers metrics, checks health, writes metrics.jsonl and TensorBoard, and shows progress. Rounds
alternate in one process; process CPU time is compared, wall time is given too. The median of the paired ratios
counts; on a busy machine the ratio of the fastest rounds is the steadier number.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mmalign.core.objectives import bind_objective
from mmalign.core.reference import FrozenCopy
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
from mmalign.modalities import tiny
from mmalign.modalities.diffusion import DiffusionModality, DiffusionSettings, load
from mmalign.training import TrainingSettings, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--width", type=int, default=64, help="channels of the UNet's first level")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        settings = TrainingSettings(max_steps=args.steps, batch_size=args.batch_size, checkpoint_every=10**9)
        task = Task(work, settings, args.width)
        ratios = [task.round(number) for number in range(args.rounds + 1)][1:]
    print(
        json.dumps(
            {
                "ms_per_step_by_hand": round(1000 * statistics.median(hand for hand, _, _ in ratios) / args.steps, 2),
                "overhead_cpu": round(statistics.median(loop / hand - 1 for hand, loop, _ in ratios), 4),
                "overhead_cpu_of_the_fastest": round(min(r[1] for r in ratios) / min(r[0] for r in ratios) - 1, 4),
                "overhead_cpu_by_round": [round(loop / hand - 1, 4) for hand, loop, _ in ratios],
                "overhead_wall": round(statistics.median(wall for _, _, wall in ratios), 4),
                "steps": args.steps,
                "rounds": args.rounds,
            }
        )
    )


class Task:
    """One network, one set of records, two ways to train."""

    def __init__(self, work: Path, settings: TrainingSettings, width: int):
        self.work, self.settings = work, settings
        self.modality, self.network = small_unet(work / "base", width)
        self.shards = latent_pairs(work / "shards", 512)
        self.objective = bind_objective({"name": "dpo", "beta": 100})
        self.start = {name: weight.clone() for name, weight in self.network.state_dict().items()}

    def round(self, number: int) -> tuple[float, float, float]:
        """CPU seconds by hand and by the loop, and the ratio of wall times minus one. The order alternates."""
        ways: list[Callable[[int], tuple[float, float]]] = [self.by_hand, self.by_the_loop]
        order = ways if number % 2 == 0 else ways[::-1]
        measured = {}
        for way in order:
            self.network.load_state_dict(self.start)
            measured[way.__name__] = way(number)
        hand, loop = measured["by_hand"], measured["by_the_loop"]
        return hand[0], loop[0], loop[1] / hand[1] - 1

    def stream(self) -> RecordStream:
        settings = DataSettings(shards=str(self.shards))
        return RecordStream(Manifest.read(str(self.shards)), settings, 0, frozenset({"latent"}), preference_pair)

    def by_hand(self, number: int) -> tuple[float, float]:
        network, reference, modality = self.network, FrozenCopy(self.network).network, self.modality
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.settings.learning_rate, weight_decay=0.01)
        steps = self.stream().steps(Geometry(0, 1, self.settings.batch_size, 1))
        batches = [next(steps).micro_batches[0] for _ in range(self.settings.max_steps)]
        clock = Clock()
        for rows in batches:
            count = len(rows)
            inputs = modality.prepare([row[0] for row in rows] + [row[1] for row in rows])
            with torch.no_grad():
                anchor = modality.log_prob(reference, inputs).sum()
            ratio = modality.log_prob(network, inputs).sum() - anchor
            loss = -nn.functional.logsigmoid(100 * (ratio[:count] - ratio[count:])).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        return clock.read()

    def by_the_loop(self, number: int) -> tuple[float, float]:
        """From the request for the first record to the moment the loop asks for one step more than it is timed for:
        opening the files, the last checkpoint and the export are not part of a step."""
        source = TimedSource(self.stream(), self.settings.max_steps)
        train(
            self.modality,
            self.network,
            FrozenCopy(self.network),
            self.objective,
            source,
            dataclasses.replace(self.settings, max_steps=self.settings.max_steps + 1),
            self.work / f"run-{number}",
            console=Console(file=io.StringIO(), force_terminal=True),
        )
        return source.measured


class TimedSource:
    """A stream that reads the clock when its first step is asked for, and again `steps` steps later."""

    def __init__(self, stream: RecordStream, steps: int):
        self._stream, self._steps = stream, steps
        self.measured = (0.0, 0.0)

    @property
    def records_per_epoch(self) -> int:
        return self._stream.records_per_epoch

    def steps(self, geometry: Geometry) -> Iterator[Step]:
        clock = Clock()
        for done, step in enumerate(self._stream.steps(geometry), 1):
            yield step
            if done == self._steps:
                self.measured = clock.read()

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)


class Clock:
    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        return time.process_time() - self.cpu, time.perf_counter() - self.wall


def small_unet(folder: Path, width: int) -> tuple[DiffusionModality, nn.Module]:
    """A Stable Diffusion pipeline of the smallest real parts around a UNet of a size worth timing."""
    from diffusers import UNet2DConditionModel

    tiny.stable_diffusion(folder)
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=32,
        cross_attention_dim=16,
    ).save_pretrained(folder / "unet")
    return load(DiffusionSettings(path=str(folder)), torch.device("cpu"), need_vae=False)


def latent_pairs(folder: Path, count: int) -> Path:
    """Random latents of two candidates per record, as `mmalign encode` stores them."""
    generator = torch.Generator().manual_seed(0)

    def candidate() -> Candidate:
        mean = torch.randn(4, 8, 8, generator=generator)
        return Candidate(tensors={"mean": mean, "std": torch.full_like(mean, 0.1)})

    with ShardWriter(folder) as writer:
        for index in range(count):
            pair = [candidate(), candidate()]
            writer.write(Record(f"{index:06d}", f"picture {index}", candidates=pair, preferred=[(0, 1)]))
    return folder


if __name__ == "__main__":
    main()
