"""Checkpoints: a folder that is either whole or not there. Tensors are safetensors, the rest JSON; nothing is pickled.

    checkpoint-500/model.safetensors       the trainable weights by name (all of them, or only the adapters)
    checkpoint-500/optimizer.safetensors   its tensors, as <weight>|<entry>
    checkpoint-500/reference.safetensors   what the reference must remember, if anything
    checkpoint-500/rollout.safetensors     samples that are still to be learned from, and their value model, if any
    checkpoint-500/state.json              step, stream position, settings, and what else must continue
    latest                                 the name of the newest one
    pool/step-30.safetensors               an earlier policy that the reference may return to

Weights are stored whole, so a run may resume on another number of processes or with other sharding. There is no state
of random numbers: every micro-batch is seeded anew from the seed and its place in the stream. Untouched weights and
buffers belong to the base model and are not repeated here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmalign.training.distributed import Processes, sharded_like, whole

LATEST = "latest"
FORMAT = 1
REFERENCE_FILE, ROLLOUT_FILE = "reference.safetensors", "rollout.safetensors"
POOL = "pool"


@dataclass(frozen=True)
class Checkpoint:
    """What `read` found: tensors on the CPU, whole."""

    path: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    reference: dict[str, Tensor]
    state: dict[str, Any]
    rollout: dict[str, Tensor]


def save(
    folder: Path,
    step: int,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    reference: Mapping[str, Tensor],
    state: Mapping[str, Any],
    processes: Processes,
    keep: int,
    rollout: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `checkpoint-<step>`, points `latest` at it and removes all but the newest `keep`.

    Every process must call it: gathering shards is a joint effort; the first one writes. Raises ValueError with advice
    where writing fails; earlier checkpoints are then as they were.
    """
    path = folder / f"checkpoint-{step}"
    tensors = {name: _portable(weight) for name, weight in weights.items()}
    entries, scalars = _optimizer_entries(weights, optimizer)
    extra = {
        file: {name: _portable(tensor) for name, tensor in (found or {}).items()}
        for file, found in ((REFERENCE_FILE, reference), (ROLLOUT_FILE, rollout))
    }
    problem = None
    if processes.main:
        document = {"format": FORMAT, "step": step, **state, "optimizer_scalars": scalars}
        problem = _attempt(path, lambda partial: _write(partial, tensors, entries, extra, document))
        if problem is None:
            replace_text(folder / LATEST, path.name + "\n")
            _remove_old(folder, keep)
    problem = processes.broadcast_object(problem, 0)
    if problem:
        raise ValueError(problem)
    return path


def find(folder: Path, resume: str | Path | None) -> Path | None:
    """The checkpoint that `resume` means: a path, "latest" (None where there is none yet), or None for a fresh start.

    A fresh start in a folder that holds checkpoints raises ValueError rather than mixing two runs.
    """
    if resume is None:
        if (folder / LATEST).is_file():
            raise ValueError(f"{folder} holds checkpoints of an earlier run; set resume: latest, or another output")
        return None
    if resume != LATEST:
        path = Path(resume)
        if not (path / "state.json").is_file():
            raise FileNotFoundError(f"no checkpoint at {path} (it has no state.json); check resume")
        return path
    if not (folder / LATEST).is_file():
        return None
    return find(folder, folder / (folder / LATEST).read_text().strip())


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`, on the CPU. Raises ValueError for one of another format."""
    state = json.loads((path / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {state.get('format')}; expected {FORMAT}")
    weights, optimizer = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    reference, rollout = (
        load_file(path / file) if (path / file).is_file() else {} for file in (REFERENCE_FILE, ROLLOUT_FILE)
    )
    return Checkpoint(path, weights, optimizer, reference, state, rollout)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Puts the trained weights of a checkpoint into a network, in place. Raises ValueError where they do not fit it."""
    put_weights(dict(network.named_parameters()), load_file(Path(path) / "model.safetensors"), Path(path))


@torch.no_grad()
def put_weights(weights: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if name not in weights or weights[name].shape != tensor.shape:
            shape = tuple(weights[name].shape) if name in weights else "no such parameter"
            raise ValueError(
                f"{path} does not fit this network: {name} is {tuple(tensor.shape)} there, here {shape}; check model"
            )
        weights[name].copy_(sharded_like(tensor, weights[name]))


def restore(checkpoint: Checkpoint, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimizer as they were. `weights` are the trainable ones, sharded or not."""
    missing = weights.keys() - checkpoint.weights.keys()
    if missing:
        raise ValueError(f"{checkpoint.path} has no trained {sorted(missing)[0]} ({len(missing)} missing); check model")
    put_weights(weights, checkpoint.weights, checkpoint.path)
    optimizer.state.clear()
    scalars = checkpoint.state["optimizer_scalars"]
    for name, weight in weights.items():
        optimizer.state[weight].update(scalars.get(name, {}))
    for key, tensor in checkpoint.optimizer.items():
        name, _, entry = key.rpartition("|")
        weight = weights[name]
        # Step counters stay on the CPU, where the optimizers of torch keep them.
        fitted = sharded_like(tensor, weight) if tensor.shape == weight.shape else tensor
        optimizer.state[weight][entry] = fitted.to(weight.device) if tensor.dim() else tensor


def restored_reference(checkpoint: Checkpoint, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The reference's tensors where it wants them: those with the name of a weight are divided as it is."""
    found = checkpoint.reference.items()
    return {name: sharded_like(tensor, weights[name]) if name in weights else tensor for name, tensor in found}


@final
class Snapshots:
    """Earlier states of the trained weights, whole, in `pool/` of a run: the shelf of a reference pool.

    Every process must call `put`; the first one writes. They are never removed, so that any checkpoint can be resumed.
    """

    def __init__(self, folder: Path, processes: Processes):
        self._folder, self._processes = folder / POOL, processes

    def put(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the disk is full; an earlier snapshot is then as it was."""
        tensors = {name: _portable(weight) for name, weight in weights.items()}
        problem = self._write(self._path(step), tensors) if self._processes.main else None
        problem = self._processes.broadcast_object(problem, 0)
        if problem:
            raise ValueError(problem)

    def get(self, step: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = load_file(self._path(step))
        return {name: sharded_like(tensors[name], weight) for name, weight in like.items()}

    def missing(self, steps: Sequence[int]) -> str | None:
        """None, or in words the first one that is not there."""
        for step in steps:
            if not self._path(step).is_file():
                return f"no {self._path(step)}; copy {POOL}/ from the folder of the run that wrote the checkpoint"
        return None

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}.safetensors"

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> str | None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial)
            _sync(partial)
            os.replace(partial, path)
            _sync(self._folder)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            return f"could not write {path}: {error}; free some space, or raise reference.every, then resume"
        return None


@contextlib.contextmanager
def whole_folder(path: Path, processes: Processes) -> Iterator[Path]:
    """Yields an empty folder, the same on every process, that becomes `path` once the block has filled it."""
    partial = path.with_name(f".partial-{path.name}")
    if processes.main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.wait()
    yield partial
    processes.wait()
    if processes.main:
        for file in partial.rglob("*"):
            _sync(file)
        if path.exists():
            _remove(path)
        os.rename(partial, path)
        _sync(path.parent)


class StopSignal:
    """Remembers SIGTERM, so that the loop saves at the next step boundary. Outside the main thread it never fires."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self._listening = threading.current_thread() is threading.main_thread()
        if self._listening:
            self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self._listening:
            signal.signal(signal.SIGTERM, self._previous)

    def _remember(self, number: int, frame: object) -> None:
        self.received = True


def replace_text(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def _portable(value: Tensor) -> Tensor:
    return whole(value.detach()).cpu().contiguous()


def _optimizer_entries(
    weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    entries: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        for entry, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                entries[f"{name}|{entry}"] = _portable(value)
            else:
                scalars.setdefault(name, {})[entry] = value
    return entries, scalars


def _attempt(path: Path, write: Callable[[Path], None]) -> str | None:
    """None, or in words why nothing was written."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        for leftover in path.parent.glob(".partial-*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        write(partial)
        _sync(partial)
        if path.exists():
            # Left by a run that went on from here before; a later resume chose to repeat these steps.
            _remove(path)
        os.rename(partial, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        return (
            f"could not write {path}: {error}. Earlier checkpoints are untouched; free some space or lower "
            "training.keep_checkpoints, then resume"
        )
    return None


def _write(
    partial: Path,
    weights: dict[str, Tensor],
    entries: dict[str, Tensor],
    extra: Mapping[str, dict[str, Tensor]],
    document: dict[str, Any],
) -> None:
    save_file(weights, partial / "model.safetensors")
    save_file(entries, partial / "optimizer.safetensors")
    for file, found in extra.items():
        if found:
            save_file(found, partial / file)
    (partial / "state.json").write_text(json.dumps(document, indent=1))
    for file in partial.iterdir():
        _sync(file)


def _remove_old(folder: Path, keep: int) -> None:
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    # By age, not by step: after a resume from an older one, higher steps are the stale ones.
    for path in sorted(found, key=lambda path: (path / "state.json").stat().st_mtime_ns)[:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    # Renamed first: a half-removed folder must not look like a checkpoint.
    condemned = path.with_name(f".partial-removed-{path.name}")
    os.rename(path, condemned)
    shutil.rmtree(condemned)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
