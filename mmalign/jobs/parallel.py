"""Several jobs side by side, each in a process of its own with its share of the cores, and one progress display.

Small models do not profit from a second thread, but two of them run well beside each other. What a job prints goes to
its log file; where it fails, the error and the path of the log are shown.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mmalign.jobs.shards import progress_bar


@dataclass(frozen=True)
class Task:
    """`verb` with `settings`; `done()` of `total` says how far it is, from the files that it writes."""

    title: str
    verb: str
    settings: Any
    total: int
    done: Callable[[], int]


@dataclass
class Clock:
    """Seconds of each stage."""

    began: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)

    def mark(self, stage: str) -> None:
        self.stages[stage] = round(time.monotonic() - self.began - sum(self.stages.values()), 1)


class SideBySide:
    """`with SideBySide(2, folder) as run: run([task, ...])` returns what the jobs return, in order."""

    def __init__(self, processes: int, logs: Path, console: Console):
        self._processes, self._logs, self._console = processes, logs, console

    def __enter__(self) -> SideBySide:
        self._logs.mkdir(parents=True, exist_ok=True)
        threads = max((os.cpu_count() or 1) // self._processes, 1)
        # Spawned processes read it when they import torch; a fork would inherit threads in an unknown state.
        with _environment("OMP_NUM_THREADS", str(threads)):
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._processes, multiprocessing.get_context("spawn"), _start_worker, (threads,)
            )
            # All workers are started now, while the variable is set.
            concurrent.futures.wait([self._pool.submit(time.sleep, 0.2) for _ in range(self._processes)])
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, tasks: Sequence[Task]) -> list[Any]:
        began = time.monotonic()
        futures = [self._pool.submit(_work, task.verb, task.settings, self._log_of(task)) for task in tasks]
        with progress_bar(self._console) as progress:
            bars = [progress.add_task(task.title, total=task.total) for task in tasks]
            while not all(future.done() for future in futures):
                for task, bar in zip(tasks, bars, strict=True):
                    progress.update(bar, completed=min(task.done(), task.total))
                failed = next((future for future in futures if future.done() and future.exception()), None)
                if failed is not None:
                    break
                time.sleep(0.3)
            for task, bar in zip(tasks, bars, strict=True):
                progress.update(bar, completed=min(task.done(), task.total))
        results = [self._result(task, future) for task, future in zip(tasks, futures, strict=True)]
        if not self._console.is_terminal:
            self._console.print(f"{', '.join(task.title for task in tasks)}: {time.monotonic() - began:.0f} s")
        return results

    def _result(self, task: Task, future: concurrent.futures.Future) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise type(error)(f"{task.title} failed: {error}\n(its log: {self._log_of(task)})") from error

    def _log_of(self, task: Task) -> Path:
        return self._logs / f"{task.title.replace(' ', '-').replace(',', '')}.log"


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _work(verb: str, settings: Any, log: Path) -> Any:
    job = importlib.import_module(f"mmalign.jobs.{verb}")
    with log.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return job.run(settings)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
