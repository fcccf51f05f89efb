"""From records to samples: which candidate is chosen, and what refuses to be guessed."""

from __future__ import annotations

import pytest
import torch

from mmalign.data import Candidate, Record, RecordError, bare, liked, preference_pair
from tests.data_sets import picture, picture_bytes


def record(*candidates: Candidate, preferred=(), **fields) -> Record:
    return Record("k", "a prompt", candidates, preferred, shard="s.tar", **fields)


def scored(*scores: float | None) -> tuple[Candidate, ...]:
    return tuple(Candidate(text=str(place), score=score) for place, score in enumerate(scores))


def texts(*samples) -> list[str]:
    return [sample.text for sample in samples]


def test_a_pair_shares_prompt_draw_and_group():
    latents = {"mean": torch.ones(1)}
    candidates = Candidate(image=picture(0), tensors=latents), Candidate(text="b")
    chosen, rejected = preference_pair(
        record(*candidates, preferred=[(1, 0)], prompt_images=[picture(2)], tensors={"text.hidden": torch.ones(2)}),
        9,
        4,
    )
    assert texts(chosen, rejected) == ["b", None]
    for sample in (chosen, rejected):
        assert (sample.key, sample.prompt, sample.draw, sample.group) == ("s.tar/k", "a prompt", 9, 4)
        assert len(sample.prompt_images) == 1
    assert sorted(rejected.tensors) == ["mean", "text.hidden"]
    assert rejected.image is not None


def test_several_pairs_are_all_drawn():
    several = record(*scored(None, None, None), preferred=[(0, 1), (2, 1), (2, 0)])
    seen = {tuple(texts(*preference_pair(several, draw, 0))) for draw in range(9)}
    assert seen == {("0", "1"), ("2", "1"), ("2", "0")}
    assert {texts(*liked(several, draw, 0))[0] for draw in range(9)} == {"0", "2"}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.1, 0.9), ["1", "0"]),
        ((0.5, -2.0, 0.7, None), ["2", "1"]),
        ((1.0, 1.0, 0.0), ["0", "2"]),
        ((0.0, 0.0, 1.0), ["2", "0"]),
    ],
)
def test_best_against_worst(scores: tuple, expected: list[str]):
    for draw in range(3):
        assert texts(*preference_pair(record(*scored(*scores)), draw, 0)) == expected
        assert texts(*liked(record(*scored(*scores)), draw, 0)) == expected[:1]


@pytest.mark.parametrize(
    ("candidates", "kind"),
    [
        (scored(0.5, 0.5), "tie"),
        (scored(None, None), "no_feedback"),
        (scored(0.5, None), "no_feedback"),
        (scored(0.5), "no_feedback"),
        ((), "no_feedback"),
    ],
)
def test_a_preference_is_never_made_up(candidates: tuple[Candidate, ...], kind: str):
    with pytest.raises(RecordError) as caught:
        preference_pair(record(*candidates), 0, 0)
    assert (caught.value.kind, caught.value.shard, caught.value.key) == (kind, "s.tar", "k")


def test_liked_reads_labels_and_single_candidates():
    labelled = [Candidate(text="0", desirable=False), Candidate(text="1", desirable=True)]
    assert texts(*liked(record(*labelled), 3, 0)) == ["1"]
    assert texts(*liked(record(Candidate(text="0")), 3, 0)) == ["0"]
    assert texts(*liked(record(*labelled, preferred=[(0, 1)]), 3, 0)) == ["0"]
    for refused in (record(labelled[0]), record(Candidate(text="0"), Candidate(text="1")), record()):
        with pytest.raises(RecordError, match="no_feedback"):
            liked(refused, 0, 0)


def test_a_bare_prompt_needs_no_candidate():
    (sample,) = bare(record(), 1, 2)
    assert (sample.prompt, sample.draw, sample.group, sample.image, sample.text) == ("a prompt", 1, 2, None, None)


def test_raw_bytes_are_not_a_picture():
    with pytest.raises(TypeError, match="need="):
        liked(record(Candidate(image=picture_bytes(0))), 0, 0)
