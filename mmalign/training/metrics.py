"""Where the numbers of a run go: metrics.jsonl, trackers, and what the terminal shows.

A row of metrics.jsonl belongs to one step; `step` counts the updates made before its loss was measured, so the first
row is the untouched model. Every field but TIMING is a function of the seed, the settings and the records: after a kill
and a resume the file equals that of a run that was never interrupted. Numbers that are not finite are written as null.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# samples_per_second: samples (a pair has two) over all processes; data_wait: share of the time spent waiting for
# records; seconds: since this process began. All three cover the steps since the row before. Of a rollout: the seconds
# that drawing its samples, scoring them and measuring their log-probs took, and those since then.
TIMING = frozenset(
    {
        "samples_per_second",
        "data_wait",
        "seconds",
        "rollout/generate_seconds",
        "rollout/score_seconds",
        "rollout/measure_seconds",
        "rollout/train_seconds",
    }
)
PLAIN_SECONDS = 10.0

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a metrics.jsonl. A last line that a kill cut short is left out."""
    text = Path(path).read_text() if Path(path).is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


class MetricsFile:
    """metrics.jsonl, opened so that it holds the rows before `step` and nothing after them."""

    def __init__(self, path: Path, step: int):
        kept = [row for row in read_rows(path) if row["step"] < step] if step else []
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(_line(row) for row in kept))
        os.replace(partial, path)
        self.last: Row = kept[-1] if kept else {}
        self._file = path.open("a")

    def write(self, row: Row) -> None:
        self.last = row
        try:
            # Flushed line by line: what a killed process wrote is then on record.
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise ValueError(f"could not write {self._file.name}: {error}; free some space, then resume") from None

    def close(self) -> None:
        # Rows that could not be written were reported when they came.
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):
            self._file.close()


class Stopwatch:
    """Speed and waiting between two rows."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._since, self._waited, self._samples = time.perf_counter(), 0.0, 0

    def add(self, waited: float, samples: int) -> None:
        self._waited += waited
        self._samples += samples

    def lap(self) -> dict[str, float]:
        now = time.perf_counter()
        passed = max(now - self._since, 1e-9)
        timing = {
            "samples_per_second": self._samples / passed,
            "data_wait": self._waited / passed,
            "seconds": now - self._began,
        }
        self._reset()
        return timing


class TensorBoard:
    """All numbers of a row in one event. An event for each, as `add_scalar` writes them, costs ten times as much."""

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        values = [self._summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._writer._get_file_writer().add_summary(self._summary(value=values), step)

    def finish(self) -> None:
        self._writer.close()


class Trackers:
    """TensorBoard, and Weights & Biases through Accelerate's adapter. Only the first process has them."""

    def __init__(self, names: tuple[str, ...], folder: Path, settings: Mapping[str, Any]):
        self._open: list[Any] = []
        if "tensorboard" in names:
            self._open.append(TensorBoard(folder / "tensorboard"))
        if "wandb" in names:
            from accelerate.tracking import WandBTracker
            from accelerate.utils import is_wandb_available

            if not is_wandb_available():
                raise ValueError("training.trackers names wandb, which is not installed: pip install 'mmalign[wandb]'")
            # Accelerate's tracker passes these on to wandb.init.
            tracker = WandBTracker(folder.name, dir=str(folder), config=dict(settings))
            tracker.start()
            self._open.append(tracker)

    def write(self, row: Row) -> None:
        numbers = {key: value for key, value in row.items() if key != "step" and _finite(value)}
        for tracker in self._open:
            tracker.log(numbers, step=row["step"])

    def close(self) -> None:
        for tracker in self._open:
            tracker.finish()


class Display:
    """A live bar in a terminal, a plain line now and then elsewhere. Without a console it is silent."""

    def __init__(self, console: Console | None, start: int, max_steps: int):
        self._console, self._start, self._max_steps = console, start, max_steps
        self._printed = self._began = time.monotonic()
        self._progress: Progress | None = None
        if console is not None and console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                # Drawing takes a few milliseconds of the processor that the training needs.
                refresh_per_second=1,
            )
            self._task = self._progress.add_task("training", total=max_steps, completed=start, numbers="")
            self._progress.start()

    def show(self, row: Row, skipped: int) -> None:
        """After each row."""
        done = row["step"] + 1
        if self._progress is not None:
            self._progress.update(self._task, completed=done, numbers=summary(row, skipped))
        elif self._console is not None:
            now = time.monotonic()
            if now - self._printed >= PLAIN_SECONDS or done == self._max_steps or row["step"] == self._start:
                left = (now - self._began) / (done - self._start) * (self._max_steps - done)
                self._console.print(f"step {done}/{self._max_steps}  {summary(row, skipped)}  {left:.0f} s left")
                self._printed = now

    def say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def summary(row: Row, skipped: int) -> str:
    """The numbers of the progress line: loss, accuracy, speed, skipped records."""
    parts = [f"loss {row['loss']:.4f}" if _finite(row["loss"]) else "loss not finite"]
    if "rewards/accuracies" in row and _finite(row["rewards/accuracies"]):
        parts.append(f"accuracy {row['rewards/accuracies']:.2f}")
    parts.append(f"{row['samples_per_second']:.1f} samples/s")
    if skipped:
        parts.append(f"{skipped} records skipped")
    return "  ".join(parts)


def _line(row: Row) -> str:
    return json.dumps({key: value if _finite(value) else None for key, value in row.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
