"""The stream: the same rows whatever the ranks, workers and interruptions, and no bad record moves another."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmalign.core.types import Sample
from mmalign.data import (
    Columns,
    DataSettings,
    Geometry,
    Manifest,
    RecordError,
    RecordStream,
    Step,
    preference_pair,
    write_manifest,
)
from mmalign.data.reader import _MicroBatches
from mmalign.data.transport import pack, unpack
from tests.data_sets import members, picture_bytes, write_pairs, write_tar

BOTH = frozenset({"image", "latent"})
Row = tuple[str, str, int, int, float]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "set", 50)


def stream(manifest: Manifest, workers: int = 0, need: frozenset[str] = BOTH, **settings) -> RecordStream:
    chosen = DataSettings(**{"window": 3, "workers": workers, **settings})
    return RecordStream(manifest, chosen, 5, need, preference_pair)


def row(samples: tuple[Sample, ...]) -> Row:
    chosen, rejected = samples
    assert (chosen.key, chosen.draw, chosen.group) == (rejected.key, rejected.draw, rejected.group)
    assert chosen.image is not None
    picture = chosen.image.getpixel((0, 0))
    return (chosen.key, f"{chosen.prompt} {picture}", chosen.draw, chosen.group, float(chosen.tensors["mean"][0, 0, 0]))


def run(streams: list[RecordStream], micro: int, accumulation: int, steps: int) -> list[list[Row]]:
    """The rows of each step in the order of their slots, over all ranks."""
    geometries = [Geometry(rank, len(streams), micro, accumulation) for rank in range(len(streams))]
    iterators = [one.steps(geometry) for one, geometry in zip(streams, geometries, strict=True)]
    found = []
    for _ in range(steps):
        parts: list[Step] = [next(iterator) for iterator in iterators]
        assert len({(part.position, part.slots, part.epoch) for part in parts}) == 1
        found.append([row(pair) for m in range(accumulation) for part in parts for pair in part.micro_batches[m]])
    return found


def test_every_record_once_per_epoch_and_nothing_dropped(manifest: Manifest):
    one = stream(manifest)
    rows = [item for step in run([one], 12, 1, 25) for item in step]
    assert one.records_per_epoch == 50
    for epoch in range(6):
        part = rows[epoch * 50 : (epoch + 1) * 50]
        assert len({key for key, *_ in part}) == 50
    assert len({draw for _, _, draw, _, _ in rows}) == len(rows)
    assert [slot for *_, slot, _ in rows] == list(range(300))
    assert [key for key, *_ in rows[:50]] != [key for key, *_ in rows[50:100]]


def test_preferences_reach_the_samples(manifest: Manifest):
    for key, _, _, _, mean in run([stream(manifest)], 25, 1, 2)[0]:
        number = int(key.rpartition("/")[2])
        assert mean == (2 * number if number % 2 == 0 else 2 * number + 1)


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(1, 1, 12), (2, 3, 2), (3, 4, 1), (4, 1, 3)])
def test_a_step_is_the_same_on_any_number_of_ranks(manifest: Manifest, ranks: int, micro: int, accumulation: int):
    expected = run([stream(manifest)], 12, 1, 9)
    assert run([stream(manifest) for _ in range(ranks)], micro, accumulation, 9) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(manifest: Manifest, workers: int):
    assert run([stream(manifest, workers)], 4, 3, 9) == run([stream(manifest)], 12, 1, 9)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([(1, 12, 1), (1, 2, 6), (2, 3, 2), (3, 4, 1), (6, 1, 2)])),
        min_size=1,
        max_size=4,
    )
)
def test_any_chain_of_interruptions_equals_the_uninterrupted_run(
    manifest: Manifest, parts: list[tuple[int, tuple[int, int, int]]]
):
    found, state = [], None
    for steps, (ranks, micro, accumulation) in parts:
        streams = [stream(manifest) for _ in range(ranks)]
        for one in streams:
            if state is not None:
                one.load_state_dict(state)
        found += run(streams, micro, accumulation, steps)
        # Through JSON, as a checkpoint would keep it; rank 0 speaks for all.
        state = json.loads(json.dumps(streams[0].state_dict()))
        assert all(one.state_dict() == state for one in streams)
    assert found == run([stream(manifest)], 12, 1, len(found))


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 1)])
def test_prefetched_steps_are_not_lost_on_resume(manifest: Manifest, before: int, after: int):
    expected = run([stream(manifest)], 4, 3, 8)
    first = stream(manifest, before)
    found = run([first], 6, 2, 3)
    assert first.position == 36
    second = [stream(manifest, after), stream(manifest, after)]
    for one in second:
        one.load_state_dict(first.state_dict())
    assert found + run(second, 2, 3, 5) == expected


def test_a_batch_size_may_change_on_resume(manifest: Manifest):
    expected = [item for step in run([stream(manifest)], 10, 1, 6) for item in step]
    first = stream(manifest)
    found = [item for step in run([first], 4, 1, 5) for item in step]
    second = stream(manifest)
    second.load_state_dict(first.state_dict())
    assert found + [item for step in run([second], 8, 1, 5) for item in step] == expected


def test_spawned_workers_read_the_same(manifest: Manifest):
    one = stream(manifest)
    geometry = Geometry(0, 1, 5, 1)
    loader = DataLoader(
        pickle.loads(pickle.dumps(one._slots)),
        batch_sampler=_MicroBatches(0, geometry),
        num_workers=1,
        collate_fn=pack,
        multiprocessing_context="spawn",
    )
    batches = [unpack(packed) for packed in itertools.islice(loader, 3)]
    rows = [[row(samples) for samples in batch if isinstance(samples, tuple)] for batch in batches]
    assert rows == run([stream(manifest)], 5, 1, 3)


def test_no_global_randomness_is_touched(manifest: Manifest):
    before = torch.get_rng_state()
    run([stream(manifest, workers=1)], 5, 1, 2)
    run([stream(manifest)], 5, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_data_set_seed_or_window_is_refused(manifest: Manifest, tmp_path: Path):
    state = stream(manifest).state_dict()
    with pytest.raises(ValueError, match="data.shards is another data set"):
        stream(write_pairs(tmp_path / "other", 49)).load_state_dict(state)
    with pytest.raises(ValueError, match="data.window"):
        stream(manifest, window=4).load_state_dict(state)
    with pytest.raises(ValueError, match="training.seed"):
        RecordStream(manifest, DataSettings(window=3), 6, BOTH, preference_pair).load_state_dict(state)
    moved = write_pairs(tmp_path / "moved", 50)
    stream(moved).load_state_dict(state)


BAD = {
    3: ("broken_image", {**members(), "candidate1.png": picture_bytes(1)[:30]}),
    8: ("invalid_json", {**members(), "json": b"{"}),
    9: ("tie", members(candidates=[{"image": f"candidate{n}.png", "score": 1} for n in range(2)], preferred=[])),
    11: ("no_feedback", members(preferred=[])),
    12: ("nan_score", members(candidates=[{"image": "candidate0.png", "score": float("nan")}], preferred=[])),
    13: ("missing_member", {name: content for name, content in members().items() if name != "candidate0.png"}),
    20: ("unknown_schema", members(schema=9)),
}


def bad_set(folder: Path, bad: dict[int, tuple[str, dict[str, bytes]]], count: int = 40) -> Manifest:
    folder.mkdir()
    for shard in range(2):
        files = []
        for number in range(shard, count, 2):
            _, record = bad.get(number, ("", members()))
            files += [(f"{number:06d}.{name}", content) for name, content in record.items()]
        write_tar(folder / f"{shard}.tar", files)
    return Manifest.read([folder / "0.tar", folder / "1.tar"])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_leave_their_slots_empty_and_are_named(tmp_path: Path, workers: int):
    good = bad_set(tmp_path / "good", {})
    bad = bad_set(tmp_path / "bad", BAD)
    expected = [
        sample[0] for step in first_steps(stream(good, need=frozenset({"image"})), 10) for sample in rows_of(step)
    ]
    one = stream(bad, workers, need=frozenset({"image"}), max_bad_share=0.5)
    steps = first_steps(one, 10)
    found = [sample[0] for step in steps for sample in rows_of(step)]
    bad_keys = {f"{number % 2}.tar/{number:06d}" for number in BAD}
    assert [sample.key for sample in found] == [sample.key for sample in expected if sample.key not in bad_keys]
    assert [sample.group for sample in found] == [sample.group for sample in expected if sample.key not in bad_keys]
    assert one.errors.counts == Counter(kind for kind, _ in BAD.values())
    assert {f"{error.shard}/{error.key}" for error in one.errors.named} == bad_keys
    assert sum(step.rows for step in steps) == 40 - len(BAD)
    assert all(step.slots == 4 for step in steps)
    assert [error for step in steps for error in step.errors] == one.errors.named
    assert "1 tie (first: 1.tar/000009" in one.errors.summary()
    assert all(error.__traceback__ is None and error.__context__ is None for error in one.errors.named)


def first_steps(one: RecordStream, count: int) -> list[Step]:
    return list(itertools.islice(one.steps(Geometry(0, 1, 2, 2)), count))


def rows_of(step: Step) -> list[tuple[Sample, ...]]:
    return [pair for batch in step.micro_batches for pair in batch]


def test_too_many_bad_records_stop_the_run(tmp_path: Path):
    bad = bad_set(tmp_path / "bad", BAD)
    one = stream(bad, need=frozenset({"image"}), max_bad_share=0.01)
    with pytest.raises(ValueError, match=r"data.max_bad_share=0.01 allows: 1 \w+ \(first: \d.tar/0000\d\d"):
        first_steps(one, 20)
    assert one.position >= 40 - 4
    all_bad = bad_set(tmp_path / "all", {number: BAD[8] for number in range(4)}, 4)
    with pytest.raises(ValueError, match="4 of 4 records cannot be used.*4 invalid_json"):
        first_steps(stream(all_bad, need=frozenset({"image"}), max_bad_share=0.2), 20)


def test_a_few_bad_records_under_the_limit_do_not(tmp_path: Path):
    bad = bad_set(tmp_path / "bad", {3: BAD[3]}, 100)
    one = stream(bad, need=frozenset({"image"}), max_bad_share=0.02)
    first_steps(one, 100)
    assert one.errors.total == 4
    strict = stream(bad, need=frozenset({"image"}), max_bad_share=0.0)
    with pytest.raises(ValueError, match="1 of 100 records"):
        first_steps(strict, 26)


def test_a_shard_that_is_damaged_or_gone_is_counted(tmp_path: Path):
    manifest = write_pairs(tmp_path / "set", 14)
    path = Path(manifest.shards[0].location)
    path.write_bytes(path.read_bytes()[:15_000])
    one = stream(manifest, max_bad_share=1.0)
    keys = {pair[0].key for step in first_steps(one, 7) for pair in rows_of(step)}
    assert {key for key in keys if key.startswith("000001.tar")} == {f"000001.tar/{n:06d}" for n in range(7, 14)}
    assert one.errors.counts.keys() == {"broken_tar"}
    assert len(keys) == 14 - sum(
        error.shard == "000000.tar" for error in {(e.shard, e.key): e for e in one.errors.named}.values()
    )
    path.unlink()
    again = stream(manifest, max_bad_share=1.0)
    first_steps(again, 7)
    assert again.errors.counts["broken_tar"] >= 7
    assert "000000.tar" in again.errors.summary()


def test_remote_shards_stream_through_the_cache(tmp_path: Path):
    local = write_pairs(tmp_path / "set", 50)
    sources = [f"pipe:cat {shard.location}" for shard in local.shards]
    cache = str(tmp_path / "cache")
    remote = Manifest.read(sources, cache)
    assert remote.records == 50
    one = stream(remote, workers=2, window=2, cache=cache)
    keys = [key.rpartition("/")[2] for step in run([one], 5, 2, 5) for key, *_ in step]
    assert sorted(keys) == [f"{number:06d}" for number in range(50)]
    assert len(list((tmp_path / "cache").glob("*.tar"))) <= 4
    broken = Manifest((remote.shards[0].__class__("pipe:false", remote.shards[0].row),))
    one = stream(broken, window=2, cache=cache, max_bad_share=0.5)
    with pytest.raises(ValueError, match="broken_tar.*cannot open pipe:false"):
        first_steps(one, 9)


def test_columns_reach_the_reader(tmp_path: Path):
    files = [
        (f"{number}.{name}", content)
        for number in range(4)
        for name, content in {
            "original_prompt.txt": b"a fox",
            "jpg_0.jpg": picture_bytes(0, "JPEG"),
            "jpg_1.jpg": picture_bytes(200, "JPEG"),
            "label_0.txt": b"0.0",
        }.items()
    ]
    write_tar(tmp_path / "0.tar", files)
    columns = Columns("original_prompt.txt", ("jpg_0.jpg", "jpg_1.jpg"), "label_0.txt")
    one = stream(Manifest.read(tmp_path / "0.tar"), need=frozenset({"image"}), columns=columns)
    chosen, rejected = rows_of(first_steps(one, 1)[0])[0]
    assert chosen.image is not None
    assert rejected.image is not None
    red = [sample.image.getpixel((0, 0))[0] for sample in (chosen, rejected)]  # pyright: ignore
    assert red[0] > red[1]


def test_packed_rows_are_the_same_rows():
    shared = torch.arange(5)
    tensors = {
        "half": torch.randn(3, 2).half(),
        "double": torch.randn(2, 2, dtype=torch.float64).T,
        "scalar": torch.tensor(True),
        "none": torch.zeros(0, 3),
        "shared": shared,
    }
    rows = [
        (Sample("a", "p", 0, 1, tensors=tensors), Sample("b", "p", 0, 1, text="x", tensors={"shared": shared})),
        RecordError("tie", "s", "k", "m"),
        (Sample("c", "p", 1, 2),),
    ]
    packed = pack(rows)
    found = unpack(pickle.loads(pickle.dumps(packed)))
    first, error, last = found
    assert isinstance(first, tuple)
    assert isinstance(error, RecordError)
    assert isinstance(last, tuple)
    assert (first[1].text, error.kind, last[0].key) == ("x", "tie", "c")
    for name, tensor in tensors.items():
        assert first[0].tensors[name].dtype == tensor.dtype
        assert torch.equal(first[0].tensors[name], tensor)
    assert torch.equal(first[1].tensors["shared"], shared)
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(packed.buffer) <= 16 * 8
    assert unpack(pack([])) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"window": 0}, "data.window"), ({"workers": -1}, "data.workers"), ({"max_bad_share": 2.0}, "data.max_bad_share")],
)
def test_wrong_settings_are_refused_at_once(arguments: dict, says: str):
    with pytest.raises(ValueError, match=says):
        DataSettings(**arguments)


@pytest.mark.parametrize("arguments", [(0, 0, 1, 1), (1, 1, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)])
def test_impossible_geometries_are_refused(arguments: tuple[int, int, int, int]):
    with pytest.raises(ValueError, match="geometry"):
        Geometry(*arguments)


def test_a_manifest_is_all_it_takes_to_be_the_same_data_set(manifest: Manifest):
    """Written again with the same rows, a manifest has the same digest: paths and times are not part of it."""
    folder = Path(manifest.shards[0].location).parent
    assert write_manifest(folder, [shard.row for shard in manifest.shards]).digest == manifest.digest
