"""A config that asks for feedback which the records lack fails when it is read, and says what would work."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.core.objectives import bind_objective
from mmalign.data import Candidate, DataSettings, Manifest, Record, ShardWriter
from mmalign.jobs.feedback import check_feedback


def check(folder: Path, section, *candidates: Candidate, **fields) -> None:
    with ShardWriter(folder) as writer:
        for index in range(4):
            writer.write(Record(f"{index}", "a prompt", candidates, **fields))
    settings = DataSettings(shards=str(folder))
    check_feedback(bind_objective(section), Manifest.read(str(folder)), settings, seed=0)


PAIR = (Candidate(text="a", score=1.0), Candidate(text="b", score=0.0))


@pytest.mark.parametrize("name", ["dpo", "sft", "kto", "cca", "lipo_lambda", "mm_dpo"])
def test_scored_candidates_serve_everything(tmp_path, name):
    check(tmp_path, {"name": name}, *PAIR)


def test_liked_answers_alone_serve_sft_and_cca_but_not_dpo(tmp_path):
    check(tmp_path / "sft", {"name": "sft"}, Candidate(text="a", desirable=True))
    with pytest.raises(ValueError, match=r"objective dpo reads pairs .* these objectives would work: .*sft.*kto.*cca"):
        check(tmp_path / "dpo", {"name": "dpo"}, Candidate(text="a", desirable=True))


def test_bare_prompts_serve_nothing(tmp_path):
    with pytest.raises(ValueError, match="mmalign judge"):
        check(tmp_path, {"name": "kto"})


def test_margins_and_consistency_must_be_on_record(tmp_path):
    unscored = Candidate(text="a"), Candidate(text="b")
    with pytest.raises(ValueError, match="mm_dpo reads a score on both candidates"):
        check(tmp_path / "a", {"name": "mm_dpo"}, *unscored, preferred=[(0, 1)])
    with pytest.raises(ValueError, match=r"cream reads meta\.consistency"):
        check(tmp_path / "b", {"name": "cream"}, *PAIR)
    check(tmp_path / "c", {"name": "cream"}, *PAIR, meta={"consistency": 0.9})
