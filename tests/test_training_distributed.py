"""Two processes give the loss curve of one with the same global batch, copied (DDP) and really sharded (FSDP2)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.data import DataSettings, Geometry, Manifest, RecordStream, preference_pair
from mmalign.training import TIMING, TrainingSettings, read_rows
from tests.tiny_modality import TinyNetwork, run, write_pairs
from tests.two_processes import run_on_two

SETTINGS = TrainingSettings(max_steps=6, batch_size=8, micro_batch_size=2, learning_rate=1e-2, trackers=())
# So many that a micro-batch is often empty on one process only, which must not wait for the other forever.
BAD = [index for index in range(96) if index % 5 < 3]
# Of the others, some that the modality cannot use, which only it knows.
REFUSED = [index for index in range(96) if index % 5 == 3]
# References that follow the policy, or have weights of their own: each under DDP and FSDP2.
MOVING = [("ema", "ddp", 0), ("uniform", "ddp", 2), ("ema", "fsdp2", 2), ("uniform", "fsdp2", 0), ("soup", "fsdp2", 0)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "shards", bad=BAD)


@pytest.fixture(scope="module")
def two_processes(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Several trainings in one launch, for starting processes is what takes time."""
    folder = tmp_path_factory.mktemp("two")
    trainings = [
        training(pairs, folder / "ddp"),
        training(pairs, folder / "fsdp2", sharding="fsdp2"),
        training(pairs, folder / "adapters", options={"rank": 2}),
        training(pairs, folder / "sharded-adapters", options={"rank": 2}, sharding="fsdp2"),
        training(pairs, folder / "resumed", sharding="fsdp2", max_steps=3),
        training(pairs, folder / "resumed", options={"resume": "latest"}),
        training(pairs, folder / "half", sharding="fsdp2", max_steps=3),
        training(pairs, folder / "samples", max_steps=2, sharding="fsdp2", sample_every=2, sample_prompts=("1",)),
        *(
            training(pairs, folder / f"{kind}-{sharding}-{rank}", {"reference": kind, "rank": rank}, sharding=sharding)
            for kind, sharding, rank in MOVING
        ),
        training(pairs, folder / "refused", {"refuse": REFUSED}),
        training(pairs, folder / "returned", {"reference": "uniform"}, sharding="fsdp2", max_steps=5),
        training(pairs, folder / "returned", {"reference": "uniform", "resume": "latest"}),
    ]
    printed = run_on_two("tests.tiny_modality", *trainings)
    return folder, [json.loads(line) for line in printed.splitlines()]


def training(pairs: Path, folder: Path, options: dict[str, Any] | None = None, **changed: Any) -> str:
    settings = dataclasses.asdict(dataclasses.replace(SETTINGS, **changed))
    arguments = {
        "shards": str(pairs),
        "folder": str(folder),
        "settings": settings,
        "dtype": "float64",
        "max_bad_share": 1.0,
    }
    return json.dumps({**arguments, **(options or {})})


def curve(folder: Path) -> list[dict[str, float]]:
    return [{key: row[key] for key in row if key not in TIMING} for row in read_rows(folder / "metrics.jsonl")]


def assert_same(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other)
    for row, twin in zip(one, other, strict=True):
        assert row == pytest.approx(twin, abs=1e-10)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_give_the_curve_of_one(pairs: Path, two_processes: Any, tmp_path: Path, name: str) -> None:
    result = run(pairs, tmp_path, SETTINGS, network=TinyNetwork().double(), max_bad_share=1.0)
    assert one_process_has_an_empty_micro_batch(pairs)
    assert sum(result.errors.values()) > 10
    assert_same(curve(tmp_path), curve(two_processes[0] / name))


def one_process_has_an_empty_micro_batch(pairs: Path) -> bool:
    settings = DataSettings(shards=str(pairs), window=2, max_bad_share=1.0)
    stream = RecordStream(Manifest.read(str(pairs)), settings, 0, frozenset(), preference_pair)
    batches = itertools.islice(stream.steps(Geometry(0, 1, 2, 4)), SETTINGS.max_steps)
    counts = [[len(rows) for rows in batch.micro_batches] for batch in batches]
    return any((a == 0) != (b == 0) for step in counts for a, b in (step[:2], step[2:]))


@pytest.mark.parametrize("name", ["adapters", "sharded-adapters"])
def test_adapters_with_the_reference_in_the_same_network(
    pairs: Path, two_processes: Any, tmp_path: Path, name: str
) -> None:
    run(pairs, tmp_path, SETTINGS, rank=2, network=TinyNetwork(rank=2).double(), max_bad_share=1.0)
    assert_same(curve(tmp_path), curve(two_processes[0] / name))


@pytest.mark.parametrize(("kind", "sharding", "rank"), MOVING)
def test_references_follow_the_policy_on_every_process(
    pairs: Path, two_processes: Any, tmp_path: Path, kind: str, sharding: str, rank: int
) -> None:
    run(pairs, tmp_path, SETTINGS, rank=rank, network=doubled(rank), max_bad_share=1.0, reference=kind)
    assert_same(curve(tmp_path), curve(two_processes[0] / f"{kind}-{sharding}-{rank}"))


def test_a_pool_returns_to_its_snapshots_with_other_sharding(pairs: Path, two_processes: Any) -> None:
    assert_same(curve(two_processes[0] / "returned"), curve(two_processes[0] / "uniform-fsdp2-0"))


def doubled(rank: int) -> TinyNetwork:
    return TinyNetwork(rank=rank).double()


def test_weights_are_sharded_under_fsdp2_and_whole_under_ddp(two_processes: Any) -> None:
    held = [report["held"] for report in two_processes[1]]
    assert held[0] == held[2] == 1.0
    assert held[1] < 0.7
    assert held[3] < 0.7


def test_errors_of_all_processes_are_counted_once(pairs: Path, two_processes: Any, tmp_path: Path) -> None:
    result = run(pairs, tmp_path, SETTINGS, network=TinyNetwork().double(), max_bad_share=1.0)
    assert two_processes[1][0]["errors"] == result.errors


def test_records_that_only_the_modality_refuses_are_left_out_on_every_process(
    pairs: Path, two_processes: Any, tmp_path: Path
) -> None:
    run(pairs, tmp_path, SETTINGS, network=TinyNetwork().double(), max_bad_share=1.0, refuse=REFUSED)
    assert curve(tmp_path)[-1]["skipped/overlong"] > 0
    assert_same(curve(tmp_path), curve(two_processes[0] / "refused"))


def test_a_resume_may_change_sharding_and_the_number_of_processes(
    pairs: Path, two_processes: Any, tmp_path: Path
) -> None:
    folder = two_processes[0]
    assert_same(curve(folder / "resumed"), curve(folder / "ddp"))
    run(pairs, folder / "half", SETTINGS, network=TinyNetwork().double(), max_bad_share=1.0, resume="latest")
    assert_same(curve(folder / "half"), curve(folder / "ddp"))


def test_the_export_and_the_samples_are_whole(two_processes: Any) -> None:
    folder = two_processes[0]
    assert (folder / "fsdp2" / "model" / "model.safetensors").stat().st_size == (
        folder / "ddp" / "model" / "model.safetensors"
    ).stat().st_size
    assert (folder / "samples" / "samples" / "step-2.png").is_file()
