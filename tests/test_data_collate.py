"""From records to samples: which candidate is chosen, and what refuses to be guessed."""

from __future__ import annotations

import pytest
import torch

from mmalign.data import Candidate, Record, RecordError, bare, collate_for, labelled, liked, preference_pair, ranked
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


def test_chosen_and_rejected_say_so_and_carry_score_and_numbers():
    chosen, rejected = preference_pair(record(*scored(0.1, 0.9), meta={"weight": 2, "consistency": 0.5}), 0, 0)
    assert (chosen.desirable, rejected.desirable) == (True, False)
    assert (chosen.score, rejected.score) == (0.9, 0.1)
    assert chosen.numbers == {"weight": 2.0, "consistency": 0.5}
    assert liked(record(*scored(0.1, 0.9)), 0, 0)[0].desirable
    assert bare(record(), 0, 0)[0].desirable is None


@pytest.mark.parametrize("value", [-1, "much", True, float("inf")])
def test_a_weight_that_is_no_weight_is_a_bad_record(value):
    with pytest.raises(RecordError, match=r"meta\.weight"):
        preference_pair(record(*scored(0.1, 0.9), meta={"weight": value}), 0, 0)


def test_labelled_takes_every_label_and_falls_back_on_the_pair():
    candidates = [Candidate(text="0", desirable=False), Candidate(text="1"), Candidate(text="2", desirable=True)]
    samples = labelled(record(*candidates), 0, 0)
    assert [(sample.text, sample.desirable) for sample in samples] == [("0", False), ("2", True)]
    samples = labelled(record(*scored(0.1, 0.5, 0.9)), 0, 0)
    assert [(sample.text, sample.desirable) for sample in samples] == [("2", True), ("0", False)]
    with pytest.raises(RecordError):
        labelled(record(*scored(None)), 0, 0)


def test_ranked_takes_every_score_and_falls_back_on_the_pair():
    samples = ranked(record(*scored(0.5, None, -1.0)), 0, 0)
    assert [(sample.text, sample.score) for sample in samples] == [("0", 0.5), ("2", -1.0)]
    samples = ranked(record(*scored(None, None), preferred=[(1, 0)]), 0, 0)
    assert [(sample.text, sample.score) for sample in samples] == [("1", 1.0), ("0", 0.0)]
    with pytest.raises(RecordError):
        ranked(record(*scored(0.5)), 0, 0)


def test_a_curriculum_goes_from_the_widest_gap_to_the_narrowest():
    """Scores 0, 1, 3, 3: gaps 3, 3, 2, 2, 1; a group is a slot, and ten records make an epoch."""
    collate = collate_for("pair", 10, curriculum=True)
    shown = [collate(record(*scored(0.0, 1.0, 3.0, 3.0)), 0, group) for group in (0, 9, 10, 25, 35, 45, 999)]
    gaps = [(chosen.score or 0.0) - (rejected.score or 0.0) for chosen, rejected in shown]
    assert gaps == [3, 3, 3, 2, 2, 1, 1]
    assert all(chosen.desirable and not rejected.desirable for chosen, rejected in shown)
    with pytest.raises(RecordError):
        collate(record(*scored(1.0, 1.0)), 0, 0)


def test_a_reward_prompt_asks_for_the_score_of_either_candidate():
    collate = collate_for("pair", 10, reward_prompt="score {score:.1f}: {prompt}")
    best = collate(record(*scored(0.0, 1.0)), 0, 0)
    assert [(sample.prompt, sample.text, sample.desirable) for sample in best] == [
        ("score 1.0: a prompt", "1", True),
        ("score 1.0: a prompt", "0", False),
    ]
    worst = collate(record(*scored(0.0, 1.0)), 1, 0)
    assert [(sample.prompt, sample.text, sample.desirable) for sample in worst] == [
        ("score 0.0: a prompt", "0", True),
        ("score 0.0: a prompt", "1", False),
    ]
    with pytest.raises(RecordError, match="needs scores"):
        collate(record(*scored(None, None), preferred=[(0, 1)]), 0, 0)


def test_orders_of_pairs_are_refused_for_other_rows():
    with pytest.raises(ValueError, match=r"data\.curriculum orders pairs"):
        collate_for("ranked", 10, curriculum=True)
    with pytest.raises(ValueError, match=r"data\.reward_prompt orders pairs"):
        collate_for("liked", 10, reward_prompt="{prompt} {score}")
