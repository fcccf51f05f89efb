"""Real files: the test shards of webdataset and a few photographs of COCO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.data import (
    Candidate,
    Columns,
    DataSettings,
    Geometry,
    Manifest,
    Record,
    RecordError,
    RecordStream,
    ShardWriter,
    index_shards,
    liked,
    preference_pair,
    read_shard,
)
from tests.data_sets import fixture, write_tar

IMAGE = frozenset({"image"})


def test_ninety_digits_from_a_compressed_tar(tmp_path: Path):
    source = fixture("webdataset_tars") / "sample.tgz"
    manifest = Manifest.read(source, tmp_path / "cache")
    assert manifest.records == 90
    columns = Columns(prompt="cls", candidates=("png",))
    settings = DataSettings(shards=str(source), columns=columns, cache=str(tmp_path / "cache"))
    step = next(RecordStream(manifest, settings, 0, IMAGE, liked).steps(Geometry(0, 1, 90, 1)))
    assert step.rows == 90
    samples = [row[0] for row in step.micro_batches[0]]
    assert {sample.prompt for sample in samples} <= set("0123456789")
    assert {sample.image.size for sample in samples if sample.image is not None} == {(28, 28)}


@pytest.mark.parametrize(("name", "records"), [("mpdata.tar", 100), ("compressed.tar", 3)])
def test_members_of_other_kinds_are_left_alone(name: str, records: int, tmp_path: Path):
    manifest = Manifest.read(fixture("webdataset_tars") / name, tmp_path / "cache")
    assert manifest.records == records
    found = list(read_shard(manifest.shards[0], IMAGE))
    assert {error.kind for error in found if isinstance(error, RecordError)} == {"missing_member"}
    assert len(found) == records


def coco() -> list[dict]:
    rows = [json.loads(line) for line in (fixture("coco_mini") / "captions_selected.jsonl").read_text().splitlines()]
    assert rows
    return rows


def photographs() -> list[Path]:
    return sorted((fixture("coco_mini") / "images").glob("*.jpg"))


def test_photographs_in_the_img2dataset_layout(tmp_path: Path):
    files = []
    for number, path in enumerate(photographs()):
        content = {"jpg": path.read_bytes(), "txt": path.stem.encode(), "json": b'{"width": 640}'}
        files += [(f"{number:09d}.{name}", part) for name, part in content.items()]
    write_tar(tmp_path / "00000.tar", files)
    manifest = index_shards([tmp_path])
    assert manifest.records == 12
    settings = DataSettings(shards=str(tmp_path), columns=Columns())
    step = next(RecordStream(manifest, settings, 0, IMAGE, liked).steps(Geometry(0, 1, 4, 3)))
    assert step.rows == 12
    assert all(row[0].image is not None and row[0].image.mode == "RGB" for batch in step.micro_batches for row in batch)


def test_photographs_survive_without_re_encoding(tmp_path: Path):
    captions = coco()
    paths = photographs()
    with ShardWriter(tmp_path / "set", records_per_shard=4) as writer:
        for number, (path, other) in enumerate(zip(paths, paths[1:] + paths[:1], strict=True)):
            candidates = [Candidate(image=path.read_bytes()), Candidate(image=other.read_bytes())]
            writer.write(Record(path.stem, str(captions[number % len(captions)]), candidates, [(0, 1)]))
    manifest = Manifest.read(tmp_path / "set")
    stored = [record for shard in manifest.shards for record in read_shard(shard, frozenset({"raw"}))]
    assert [record.candidates[0].image for record in stored if isinstance(record, Record)] == [
        path.read_bytes() for path in paths
    ]
    stream = RecordStream(manifest, DataSettings(), 0, IMAGE, preference_pair)
    step = next(stream.steps(Geometry(0, 1, 12, 1)))
    assert step.rows == 12
    assert not stream.errors.total
