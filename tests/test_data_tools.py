"""Converters: rows of public data sets become records that the stream reads, ties and gaps counted."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_tools import pickapic, preference_jsonl
from data_tools.rows import Row, convert, read_rows
from mmalign.data import Manifest, Record, ShardWriter, read_shard
from tests.data_sets import picture_bytes

RAW = frozenset({"raw"})


def written(rows: list[Row], converter, folder: Path) -> tuple[list[Record], dict[str, int]]:
    with ShardWriter(folder / "set") as writer:
        counts = convert(rows, converter.in_folder(folder), writer)
    shard = Manifest.read(folder / "set").shards[0]
    return [record for record in read_shard(shard, RAW) if isinstance(record, Record)], dict(counts)


def pick(label: object, **more: object) -> Row:
    pictures = {"jpg_0": picture_bytes(0, "JPEG"), "jpg_1": picture_bytes(1, "JPEG")}
    return {**pictures, "label_0": label, "caption": " a fox ", "model_0": "sdxl", "ranking_id": 7, **more}


def test_pick_a_pic_rows(tmp_path: Path):
    rows = [
        pick(1.0),
        pick(0.0),
        pick("0.0"),
        pick(0.5),
        pick(1.0, has_label=False),
        pick(None),
        pick(float("nan")),
        pick(1, jpg_1=None),
        pick(1, caption=""),
        pick(1, jpg_0=b"not a picture"),
        pick(1, jpg_0=base64.b64encode(picture_bytes(5, "PNG")).decode()),
        pick(1, jpg_0={"bytes": picture_bytes(0, "JPEG"), "path": None}),
    ]
    records, counts = written(rows, pickapic, tmp_path)
    assert [record.preferred for record in records] == [[(0, 1)], [(1, 0)], [(1, 0)], [(0, 1)], [(0, 1)]]
    assert records[0].prompt == "a fox"
    assert records[0].candidates[0].image == rows[0]["jpg_0"]
    assert records[0].candidates[0].source == "sdxl"
    assert records[0].meta == {"ranking_id": 7}
    assert counts == {
        "written": 5,
        "tie": 1,
        "without label": 1,
        "with a label that is no number": 1,
        "with a label other than 0, 0.5 and 1": 1,
        "no picture": 1,
        "without caption": 1,
        "broken_image": 1,
    }
    with pytest.raises(ValueError, match="no column label_0"):
        pickapic.record_of({"jpg_0": b"", "jpg_1": b"", "caption": ""}, "0", tmp_path)


def test_prompt_chosen_rejected_rows(tmp_path: Path):
    (tmp_path / "p.png").write_bytes(picture_bytes(3))
    chat = [{"role": "user", "content": "What?"}]
    rows: list[Row] = [
        {"prompt": "What is it?", "chosen": "a cat", "rejected": "a dog", "images": ["p.png"]},
        {"question": "What?", "chosen": "a", "rejected": "b", "image": {"bytes": picture_bytes(4), "path": "x"}},
        {
            "prompt": chat,
            "chosen": [*chat, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": "", "rejected": "b"},
        {"prompt": "p", "chosen": chat, "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "images": ["../../etc/passwd"]},
    ]
    records, counts = written(rows, preference_jsonl, tmp_path)
    assert [[candidate.text for candidate in record.candidates] for record in records] == [
        ["a cat", "a dog"],
        ["a", "b"],
        ["yes", "no"],
    ]
    assert records[0].prompt_images == [picture_bytes(3)]
    assert records[1].prompt_images == [picture_bytes(4)]
    assert records[2].prompt == chat
    assert counts == {
        "written": 3,
        "tie": 1,
        "without an answer": 1,
        "without an answer of the assistant": 1,
        "no picture at its path": 1,
    }
    with pytest.raises(ValueError, match="expected the columns"):
        preference_jsonl.record_of({"text": "x"}, "0", tmp_path)


def test_from_the_command_line(tmp_path: Path):
    for name, answers in {"a.jsonl": "xy", "b.jsonl": "z"}.items():
        lines = [json.dumps({"prompt": "p", "chosen": answer, "rejected": "n"}) for answer in answers]
        (tmp_path / name).write_text("\n".join(lines) + "\n\n")
    command = [sys.executable, "-m", "data_tools.preference_jsonl", "--folder", str(tmp_path / "set")]
    command += [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (0, "3 written\n"), done.stderr
    assert Manifest.read(tmp_path / "set").records == 3
    again = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert again.returncode == 2
    assert "already holds a data set" in again.stderr
    assert "Traceback" not in again.stderr


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{')
    (tmp_path / "list.jsonl").write_text("[]\n")
    (tmp_path / "x.csv").write_text("")
    for name, says in [("bad.jsonl", "line 2"), ("list.jsonl", "one object per line"), ("x.csv", "neither")]:
        with pytest.raises(ValueError, match=says):
            list(read_rows(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no file"):
        list(read_rows(tmp_path / "nowhere.jsonl"))


def write_parquet(rows: list[Row], path: Path, row_group_size: int | None = None) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path, row_group_size)
    return path


def test_parquet_in_the_pickapic_layout_from_the_command_line(tmp_path: Path):
    """Seventy rows in groups of twenty, so that batches and groups end at different rows; every tenth is a tie."""
    rows = [pick(0.5 if number % 10 == 0 else float(number % 2)) for number in range(70)]
    path = write_parquet(rows, tmp_path / "train-00000.parquet", row_group_size=20)
    assert list(read_rows(path)) == rows
    command = [sys.executable, "-m", "data_tools.pickapic", str(path), "--folder", str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (0, "63 written, 7 tie\n"), done.stderr
    (shard,) = Manifest.read(tmp_path / "set").shards
    records = [record for record in read_shard(shard, RAW) if isinstance(record, Record)]
    assert [record.preferred for record in records[:4]] == [[(0, 1)], [(1, 0)], [(0, 1)], [(1, 0)]]
    assert records[0].candidates[1].image == rows[1]["jpg_1"]
    assert records[0].prompt == "a fox"


def test_parquet_with_pictures_as_structs(tmp_path: Path):
    rows: list[Row] = [
        {
            "question": f"What is in picture {number}?",
            "chosen": "a cat",
            "rejected": "a dog",
            "image": {"bytes": picture_bytes(number), "path": None},
        }
        for number in range(3)
    ]
    path = write_parquet(rows, tmp_path / "rlaif.parquet")
    records, counts = written(list(read_rows(path)), preference_jsonl, tmp_path)
    assert counts == {"written": 3}
    assert [record.prompt_images for record in records] == [[picture_bytes(number)] for number in range(3)]


def test_parquet_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="rows.parquet is not a parquet file"):
        list(read_rows(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'mmalign\[data\]'"):
        list(read_rows(path))
