"""What inspect tells about a data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.data import Candidate, Manifest, Record, ShardWriter, decode, encode, picture_grid, read_shard, summarise
from tests.data_sets import members, pair, picture_bytes, write_pairs, write_tar


def test_a_summary_counts_what_is_there(tmp_path: Path):
    with ShardWriter(tmp_path / "set", 3, encoder={"vae": "abc"}) as writer:
        writer.write(pair(0))
        writer.write(Record("tie", "p", [Candidate(text="a", score=0.5), Candidate(text="b", score=0.5)]))
        writer.write(Record("scores", "prompt", [Candidate(text="a", score=0.1), Candidate(text="b", score=0.5)]))
        writer.write(Record("label", "p", [Candidate(text="a", desirable=False, source="human")]))
        writer.write(Record("bare", [{"role": "user", "content": "x"}]))
    summary = summarise(Manifest.read(tmp_path / "set"))
    assert (summary.shards, summary.records, summary.looked_at) == (2, 5, 5)
    assert summary.candidates == {0: 1, 1: 1, 2: 3}
    assert summary.feedback == {"preferred": 1, "tie": 1, "scores": 1, "desirable": 1, "none": 1}
    assert (summary.fields["image"], summary.fields["text"], summary.fields["score"]) == (2, 5, 4)
    assert summary.prompt_characters == (1, 8)
    text = "\n".join(summary.lines())
    assert "5 records in 2 shards" in text
    assert "bad records: none" in text
    assert "'vae': 'abc'" in text


def test_bad_records_are_counted_not_raised(tmp_path: Path):
    files = [(f"0.{name}", content) for name, content in members().items()]
    files += [(f"1.{name}", content) for name, content in {**members(), "candidate0.png": b"?"}.items()]
    summary = summarise(Manifest.read(write_tar(tmp_path / "0.tar", files)))
    assert summary.errors.counts == {"broken_image": 1}
    assert "1 broken_image (first: 0.tar/1" in "\n".join(summary.lines())


@pytest.mark.parametrize(("limit", "looked"), [(1, 1), (5, 5), (100, 20)])
def test_a_limit_is_spread_over_the_shards(tmp_path: Path, limit: int, looked: int):
    assert summarise(write_pairs(tmp_path / "set", 20), limit=limit).looked_at == looked


def test_the_grid_frames_chosen_and_rejected(tmp_path: Path):
    shard = write_pairs(tmp_path / "set", 2).shards[0]
    records = [record for record in read_shard(shard, frozenset({"raw"})) if isinstance(record, Record)]
    records.append(Record("text", "a long prompt " * 20, [Candidate(text="an answer " * 30)]))
    grid = picture_grid(records, side=100)
    assert grid.size == (200, 3 * 130)
    # The first record prefers its first candidate, the second one its second.
    frames = [grid.getpixel((x, y)) for y in (31, 161) for x in (50, 150)]
    green, red = (35, 140, 70), (190, 60, 50)
    assert frames == [green, red, red, green]
    assert grid.getpixel((50, 291)) == (150, 150, 150)
    with pytest.raises(ValueError, match="no records"):
        picture_grid([])


def test_a_chat_prompt_shows_its_last_message():
    chat = Record("c", [{"role": "user", "content": "hi"}], [Candidate(image=picture_bytes(0))])
    assert picture_grid([decode(encode(chat), "c", "s")]).size == (160, 190)
