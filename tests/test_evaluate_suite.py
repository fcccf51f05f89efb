"""The result table, the world's judge, and the choice of pictures."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from mmalign.core.types import Sample
from mmalign.evaluate.comparison import compare
from mmalign.evaluate.diversity import diversity, diversity_gain, variety
from mmalign.evaluate.suite import Judged, Run, Truth, summarise
from mmalign.evaluate.world import judge, oracle_score
from mmalign.world import Object, Scene, render
from tests.evaluate_runs import known, world_run

LEFT_OF = Scene((Object("circle", "red", "large", "top left"), Object("square", "blue", "small", "top right")))


def run(name: str, scores: list[float], **about) -> Run:
    judged = [Judged(f"prompt {place}", "any", place, score) for place, score in enumerate(scores)]
    return Run(name, judged, **about)


def test_the_oracle_judges_every_fact():
    right = judge("a red circle left of a blue square", 5, render(LEFT_OF))
    assert right.correct
    assert (right.kind, right.seed, right.score) == ("relation", 5, 1.0)
    wrong = judge("a red circle below a blue square", 5, render(LEFT_OF))
    assert not wrong.correct
    assert [fact.text for fact in wrong.facts if not fact.holds] == ["the circle is below the square"]
    sample = Sample("k", "a red circle below a blue square", 0, 0, image=render(LEFT_OF))
    assert oracle_score([sample]) == [wrong.score]
    with pytest.raises(ValueError, match="sample k has no image"):
        oracle_score([dataclasses.replace(sample, image=None)])


def test_table_against_counting_by_hand():
    base, aligned = world_run("base", 0.4, 60), world_run("dpo", 0.0, 60, seed=0)
    first, second = summarise([base, aligned])
    assert first.gain is None
    assert known(second.accuracy).value == np.mean([bool(one.correct) for one in aligned.judged])
    assert known(second.gain).value == pytest.approx(known(second.accuracy).value - known(first.accuracy).value)
    assert known(second.gain).side == 1
    pairs = zip(aligned.judged, base.judged, strict=True)
    wins = [(new.score > old.score) + 0.5 * (new.score == old.score) for new, old in pairs]
    assert known(second.win_rate).value == pytest.approx(np.mean(wins))
    for kind, rate in first.by_kind.items():
        assert rate.value == pytest.approx(np.mean([bool(one.correct) for one in base.judged if one.kind == kind]))
    attributes = [fact.holds for one in base.judged for fact in one.facts if fact.kind == "attribute"]
    assert first.by_fact["attribute"].value == pytest.approx(np.mean(attributes))
    assert set(first.by_fact) == {"object", "attribute", "relation"}
    for name, gain in second.gain_by_fact.items():
        assert gain.value == pytest.approx(second.by_fact[name].value - first.by_fact[name].value)


def test_seeds_are_listed_and_pooled():
    runs = [run("base", [0.0, 1.0]), run("dpo", [1.0, 1.0], seed=0), run("dpo", [0.0, 1.0], seed=1)]
    rows = summarise(runs)
    assert [(row.name, row.seed, row.seeds, row.n) for row in rows] == [
        ("base", None, (), 2),
        ("dpo", 0, (0,), 2),
        ("dpo", 1, (1,), 2),
        ("dpo", None, (0, 1), 4),
    ]
    assert known(rows[-1].score_gain).value == pytest.approx(0.25)
    assert rows[-1].accuracy is None
    assert rows[-1].by_kind == {}


def test_seeds_are_pooled_in_whatever_order_they_come():
    def trained(name: str, seed: int) -> Run:
        return run(name, [0.5, 1.0 - seed], seed=seed)

    mixed = [run("base", [0.0, 1.0]), trained("dpo", 0), trained("sft", 0), trained("dpo", 1), trained("sft", 1)]
    assert [(row.name, row.seeds) for row in summarise(mixed)][1:4] == [("dpo", (0,)), ("dpo", (1,)), ("dpo", (0, 1))]


def test_each_guidance_has_its_own_base():
    runs = [run("base", [0.0, 0.2], guidance=1.0), run("dpo", [0.5, 0.5], guidance=1.0)]
    runs += [run("base", [0.4, 0.4], guidance=3.0), run("dpo", [0.5, 0.7], guidance=3.0)]
    assert [row.score_gain and round(row.score_gain.value, 6) for row in summarise(runs)] == [None, 0.4, None, 0.2]


def test_scores_without_bounds_get_no_invented_interval():
    _, row = summarise([run("base", [30.0, 31.0]), run("dpo", [31.0, 32.0])], bounds=None)
    assert (known(row.score_gain).low, known(row.score_gain).high) == (1.0, 1.0)


def test_variety_is_the_share_of_right_pairs_that_differ():
    def shown(*contents: str, correct=True) -> list[Judged]:
        return [Judged("p", "any", place, 1.0, correct, content=one) for place, one in enumerate(contents)]

    assert known(variety([shown("a", "a", "a")])).value == 0
    assert known(variety([shown("a", "b", "c")])).value == 1
    assert known(variety([shown("a", "a", "b")])).value == pytest.approx(2 / 3)
    assert known(variety([shown("a", "a"), shown("b", "b")])).value == 0
    assert variety([shown("a")]) is None
    assert variety([shown("a", "b", correct=False)]) is None
    assert known(summarise([world_run("base", 0.0, 5, each=4)])[0].variety).value > 0.5


def grey(prompt: str, *levels: int, side: int = 8) -> list[Judged]:
    """One even picture of each level, 0 to 255."""
    return [
        Judged(prompt, "any", place, 1.0, image=Image.new("RGB", (side, side), (level,) * 3))
        for place, level in enumerate(levels)
    ]


def test_diversity_is_the_mean_distance_between_pictures_of_one_prompt():
    """Levels 0, 51 and 255 of 255 differ by 0.2, 0.8 and 1.0: 2/3 on average."""
    assert known(diversity([grey("p", 0, 51, 255)])).value == pytest.approx(2 / 3)
    assert known(diversity([grey("p", 7, 7, 7)])).value == 0
    assert known(diversity([grey("p", 0, 51, side=128)])).value == pytest.approx(0.2)
    both = [grey("p", 0, 51) + grey("q", 0, 255), grey("p", 0, 0) + grey("r", 3)]
    assert known(diversity(both)).value == pytest.approx((0.2 + 1.0 + 0.0) / 3)
    assert diversity([grey("p", 3)]) is None
    assert diversity([[Judged("p", "any", 0, 1.0), Judged("p", "any", 1, 1.0)]]) is None
    gain = known(diversity_gain(both, grey("p", 0, 102) + grey("q", 0, 255)))
    assert gain.value == pytest.approx((0.2 - 0.4 + 1.0 - 1.0 + 0.0 - 0.4) / 3)
    assert diversity_gain([grey("p", 0, 51)], grey("p", 0)) is None


def test_repeated_samples_count_for_diversity_alone():
    base, aligned = grey("p", 0) + grey("q", 0), grey("p", 255) + grey("q", 255)
    runs = [
        Run("base", base, repeated=grey("p", 0, 102)),
        Run("dpo", aligned, seed=0, label="Diffusion-DPO", repeated=grey("p", 255, 204)),
    ]
    first, second = summarise(runs)
    assert (first.n, second.n) == (2, 2)
    assert known(first.diversity).value == pytest.approx(0.4)
    assert known(second.diversity).value == pytest.approx(0.2)
    assert known(second.diversity_gain).value == pytest.approx(-0.2)
    assert first.diversity_gain is None
    assert [(row.name, row.label) for row in (first, second)] == [("base", "base"), ("dpo", "Diffusion-DPO")]
    with pytest.raises(ValueError, match="prompts and seeds of 'base'"):
        summarise([runs[0], dataclasses.replace(runs[1], repeated=())])


def test_what_would_make_the_table_lie_is_refused():
    base = run("base", [0.0, 1.0])
    with pytest.raises(ValueError, match="prompts and seeds of 'base'"):
        summarise([base, run("dpo", [0.0])])
    with pytest.raises(ValueError, match="no run 'base' at guidance 3"):
        summarise([base, run("dpo", [0.0, 1.0], guidance=3.0)])
    with pytest.raises(ValueError, match="'prompt 1', seed 1, is nan"):
        summarise([run("base", [0.0, math.nan])])
    with pytest.raises(ValueError, match="no judged samples"):
        summarise([run("base", [])])
    with pytest.raises(ValueError, match="two runs are called 'base'"):
        summarise([base, base])
    mixed = [dataclasses.replace(base.judged[0], correct=True), base.judged[1]]
    with pytest.raises(ValueError, match="some samples have a verdict"):
        summarise([Run("base", mixed)])


def test_facts_of_one_kind_may_be_missing_from_some_prompts():
    facts = (Truth("relation", "left", True),)
    judged = [Judged("p", "any", 0, 1.0, True, facts), Judged("q", "any", 1, 1.0, True)]
    assert summarise([Run("base", judged)])[0].by_fact["relation"].value == 1.0


def test_pictures_are_chosen_in_proportion_and_reproducibly():
    base, aligned = world_run("base", 0.3), world_run("dpo", 0.1, seed=0)
    comparison = compare(base, aligned, count=8, each=2)
    assert sum(comparison.counts.values()) == comparison.n == 40
    assert len(comparison.sample) == 8
    assert comparison == compare(base, aligned, count=8, each=2)
    for name, pairs in comparison.by_outcome.items():
        assert 0 < len(pairs) <= 2
        share = 8 * comparison.counts[name] / 40
        outcome = (pairs[0][0].correct, pairs[0][1].correct)
        shown = sum((first.correct, second.correct) == outcome for first, second in comparison.sample)
        assert math.floor(share) <= shown <= math.ceil(share)
    assert len(compare(run("base", [0.0]), run("dpo", [1.0])).sample) == 1
    with pytest.raises(ValueError, match="same prompts and seeds"):
        compare(base, run("dpo", [1.0]))
