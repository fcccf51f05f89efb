"""`mmalign evaluate` from models to the page: labels, diversity, prompts that CLIP cuts, nothing drawn twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mmalign
from mmalign.config import build
from mmalign.data import Manifest, Record, read_shard
from mmalign.jobs import evaluate, models
from mmalign.modalities import tiny
from tests.evaluate_runs import known
from tests.test_feedback_clip import write_clip

# The first prompt is longer than the twelve tokens of the tiny CLIP.
PROMPTS = ("a very long prompt " * 3, "a hare", "an owl", "a bee", "an ant")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    """Two tiny pipelines, five prompts, of which the first two are answered three times."""
    folder = tmp_path_factory.mktemp("evaluation")
    weights, architecture = write_clip(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return {
        "output": str(folder / "run"),
        "models": [
            {"name": "base", "path": str(tiny.stable_diffusion(folder / "base"))},
            {"name": "dpo", "path": str(tiny.stable_diffusion(folder / "dpo", seed=1)), "label": "A <new> method"},
        ],
        "prompts": str(folder / "prompts.txt"),
        "count": None,
        "diversity": [2, 3],
        "guidance": [1.0],
        "sampling": {"inference_steps": 1},
        "scorer": {"name": "clip", "weights": str(weights), "architecture": architecture},
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def rows(settings) -> list[Any]:
    return mmalign.evaluate(settings)


def test_a_few_prompts_are_answered_more_often_and_count_once(settings, rows):
    (shard,) = Manifest.read(Path(settings["output"]) / "samples" / "dpo-guidance1").shards
    records = [record for record in read_shard(shard, frozenset({"raw"})) if isinstance(record, Record)]
    assert [len(record.candidates) for record in records] == [3, 3, 1, 1, 1]
    assert [(row.name, row.n, row.prompts) for row in rows] == [("base", 5, 5), ("dpo", 5, 5)]
    assert all(0 < known(row.diversity).value < 1 for row in rows)
    assert known(rows[1].diversity_gain).value == pytest.approx(
        known(rows[1].diversity).value - known(rows[0].diversity).value
    )


def test_the_page_shows_labels_diversity_and_cut_prompts(settings, rows):
    page = (Path(settings["output"]) / "report.html").read_text()
    assert "A &lt;new&gt; method" in page
    assert '<th class="n">diversity</th>' in page
    # The long prompt has three pictures by each of the two models.
    assert "CLIP read only the beginning of the prompt of 6 pictures" in page
    table = json.loads((Path(settings["output"]) / "results.json").read_text())
    assert [(row["name"], row["label"]) for row in table] == [("base", "base"), ("dpo", "A <new> method")]


def test_a_second_call_draws_and_loads_nothing(settings, rows, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *given, **named: pytest.fail("a model was loaded"))
    assert mmalign.evaluate(settings) == rows


def test_pictures_of_other_prompts_are_refused(settings, rows):
    for changes in ({"count": 3}, {"diversity": None}, {"images_per_prompt": 2}):
        with pytest.raises(ValueError, match="base-guidance1 holds pictures of other prompts, or another number"):
            evaluate.report(build(evaluate.Settings, {**settings, **changes}), evaluate.Story())


def test_skipped_records_are_named_on_the_page(settings, rows):
    story = evaluate.Story(
        health=["step 3: skipped"],
        skipped={"broken_image": 1},
        examples=["broken_image: 000001.tar, record 000017: truncated"],
    )
    evaluate.report(build(evaluate.Settings, settings), story)
    page = (Path(settings["output"]) / "report.html").read_text()
    assert "record 000017: truncated" in page
