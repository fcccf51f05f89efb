"""Checkpoints: whole or absent, and a run that is killed and resumed equals one that never was."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmalign.training import TIMING, TrainingSettings, load_weights, read_rows
from mmalign.training.checkpoint import find
from tests.tiny_modality import TinyNetwork, run, write_pairs

SETTINGS = TrainingSettings(
    max_steps=12, batch_size=8, micro_batch_size=4, learning_rate=1e-2, checkpoint_every=5, warmup_steps=4, trackers=()
)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "shards", bad=[3, 50])


def curve(folder: Path) -> list[dict[str, float]]:
    return [{key: row[key] for key in row if key not in TIMING} for row in read_rows(folder / "metrics.jsonl")]


def command(shards: Path, folder: Path, settings: TrainingSettings, **options: object) -> list[str]:
    arguments = {"shards": str(shards), "folder": str(folder), "settings": dataclasses.asdict(settings), **options}
    return [sys.executable, "-m", "tests.tiny_modality", json.dumps(arguments)]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(folder: Path, count: int) -> None:
    while len(read_rows(folder / "metrics.jsonl")) < count:
        time.sleep(0.01)


def same_tensors(one: Path, other: Path) -> bool:
    return all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_resume_is_exact(pairs: Path, tmp_path: Path, workers: int, optimizer: str) -> None:
    """Weights, moments, dropout, learning rate, order of the records and counts of bad ones: all to the bit."""
    if workers and optimizer != "adamw":
        pytest.skip("the optimizer does not meet the workers")
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer)
    whole = run(pairs, tmp_path / "whole", settings, network=TinyNetwork(dropout=0.2), workers=workers)
    first = dataclasses.replace(settings, max_steps=7)
    run(pairs, tmp_path / "parts", first, network=TinyNetwork(dropout=0.2))
    torch.manual_seed(99)
    parts = run(pairs, tmp_path / "parts", settings, network=TinyNetwork(dropout=0.2), resume="latest", workers=workers)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same_tensors(whole.checkpoint, parts.checkpoint)
    assert parts.errors == whole.errors


def test_kill_9_at_random_points(pairs: Path, tmp_path: Path) -> None:
    """One run, killed again and again by the operating system and started anew by the same command."""
    run(pairs, tmp_path / "whole", SETTINGS, network=TinyNetwork(dropout=0.2))
    arguments = command(pairs, tmp_path / "killed", SETTINGS, dropout=0.2, resume="latest", pause=0.02)
    chance = random.Random(0)
    for rows in (3, 8):
        process = start(arguments)
        wait_for_rows(tmp_path / "killed", rows)
        time.sleep(0.04 * chance.random())
        process.kill()
        process.communicate()
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert same_tensors(tmp_path / "killed" / "checkpoint-12", tmp_path / "whole" / "checkpoint-12")


def test_sigterm_saves_and_ends_cleanly(pairs: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=5000, checkpoint_every=5000)
    process = start(command(pairs, tmp_path, settings, pause=0.01))
    wait_for_rows(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    report = json.loads(printed)
    assert process.returncode == 0
    assert report["stopped"]
    assert (tmp_path / "latest").read_text() == f"checkpoint-{report['steps']}\n"
    assert len(read_rows(tmp_path / "metrics.jsonl")) == report["steps"]
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_holds_everything_without_pickle(pairs: Path, tmp_path: Path) -> None:
    network = TinyNetwork()
    result = run(pairs, tmp_path, SETTINGS, network=network)
    assert sorted(path.name for path in result.checkpoint.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    state = json.loads((result.checkpoint / "state.json").read_text())
    assert state["step"] == 12
    assert state["stream"]["position"] == 96
    assert state["settings"]["learning_rate"] == 1e-2
    fresh = TinyNetwork(seed=5)
    load_weights(fresh, result.checkpoint)
    for name, weight in network.named_parameters():
        assert torch.equal(weight, fresh.get_parameter(name))


def test_only_the_newest_stay_and_latest_names_the_last(pairs: Path, tmp_path: Path) -> None:
    run(pairs, tmp_path, dataclasses.replace(SETTINGS, checkpoint_every=2, keep_checkpoints=3))
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-8", "checkpoint-10", "checkpoint-12"}
    assert (tmp_path / "latest").read_text() == "checkpoint-12\n"
    assert not list(tmp_path.glob(".*"))


def test_going_back_to_an_older_checkpoint(pairs: Path, tmp_path: Path) -> None:
    """What is written after going back is the newest, though its step is lower."""
    settings = dataclasses.replace(SETTINGS, keep_checkpoints=2)
    run(pairs, tmp_path, settings)
    again = dataclasses.replace(settings, max_steps=11)
    result = run(pairs, tmp_path, again, resume=tmp_path / "checkpoint-10")
    assert result.checkpoint.is_dir()
    assert [row["step"] for row in curve(tmp_path)] == list(range(11))
    assert find(tmp_path, "latest") == tmp_path / "checkpoint-11"


def test_a_folder_of_another_run_is_refused(pairs: Path, tmp_path: Path) -> None:
    run(pairs, tmp_path, dataclasses.replace(SETTINGS, max_steps=1))
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run; set resume: latest"):
        run(pairs, tmp_path, SETTINGS)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        run(pairs, tmp_path, SETTINGS, resume=tmp_path / "checkpoint-77")
    with pytest.raises(ValueError, match=r"trained with training\.seed 0, this run has 1"):
        run(pairs, tmp_path, dataclasses.replace(SETTINGS, seed=1), resume="latest")
    with pytest.raises(ValueError, match="does not fit this network"):
        run(pairs, tmp_path, SETTINGS, resume="latest", network=TinyNetwork(width=8))
    with pytest.raises(ValueError, match="trained with objective dpo, this run has ipo"):
        run(pairs, tmp_path, SETTINGS, resume="latest", objective="ipo")


def test_a_full_disk_leaves_the_earlier_checkpoint(pairs: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the same system calls fail in the same place."""
    run(pairs, tmp_path, dataclasses.replace(SETTINGS, max_steps=5), network=TinyNetwork(width=64))
    before = (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes()
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="could not write .*checkpoint-10.*Earlier checkpoints are untouched"):
            run(pairs, tmp_path, SETTINGS, resume="latest", network=TinyNetwork(width=64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes() == before
    assert find(tmp_path, "latest") == tmp_path / "checkpoint-5"
    assert not list(tmp_path.glob(".partial*"))
    run(pairs, tmp_path, SETTINGS, resume="latest", network=TinyNetwork(width=64))
    assert len(curve(tmp_path)) == 12
