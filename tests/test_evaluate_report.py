"""The page and the table on disk."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.evaluate.comparison import compare
from mmalign.evaluate.curves import draw_curves
from mmalign.evaluate.report import Report, installed_versions, write_report, write_results
from mmalign.evaluate.suite import Judged, Run, summarise
from tests.evaluate_runs import known, world_run

VOID = {"meta", "img", "br", "link", "input", "hr", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what the page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open_tags: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script" or any(name.startswith("on") for name, _ in attrs)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open_tags.pop() == tag


def write_metrics(path: Path, steps: int = 60, **extra: float | None) -> Path:
    rows = [
        {"step": step, "loss": math.log(2) - 0.001 * step, "rewards/accuracies": 0.5, "learning_rate": 1e-4, **extra}
        for step in range(steps)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs():
    return [world_run("base", 0.4), *(world_run("dpo", 0.1, seed=seed) for seed in range(2))]


def test_the_page_is_complete_and_stands_alone(tmp_path, runs):
    report = Report(
        "a demo",
        summarise(runs),
        comparison=compare(runs[0], runs[1]),
        metrics={"dpo": [write_metrics(tmp_path / "a.jsonl"), write_metrics(tmp_path / "b.jsonl")]},
        health=["step 3: skipped, the loss is not finite"],
        skipped={"tie": 1131, "broken_image": 2},
        examples=["broken_image: pairs-00003.tar, record 000017"],
        config="objective:\n  name: dpo\n",
        command="mmalign demo diffusion",
        versions=installed_versions(),
        notes=["Measured on the tune split."],
    )
    text = write_report(tmp_path / "run", report).read_text()
    page = Page(text)
    assert page.scripts == 0
    assert all(address.startswith(("data:image/", "#")) for address in page.fetched)
    assert sum(address.startswith("data:image/png") for address in page.fetched) > 12
    for expected in ("2 of 2 training seeds", "Loss", "step 3: skipped", "1,131", "record 000017", "Every seed"):
        assert expected in text
    row = summarise(runs)[-1]
    asked = "40 held-out prompts" if row.prompts == 40 else f"40 samples for {row.prompts} different held-out prompts"
    assert f"dpo gets {100 * known(row.accuracy).value:.1f}% of {asked} right" in text
    assert str(tmp_path) not in text


def test_repeated_prompts_are_not_counted_as_different_ones(tmp_path):
    rows = summarise([world_run("base", 0.0, 5, each=3)])
    assert (
        "of 15 samples for 5 different held-out prompts right" in write_report(tmp_path, Report("a", rows)).read_text()
    )


def test_results_hold_the_same_table(tmp_path, runs):
    rows = summarise(runs)
    write_report(tmp_path, Report("a demo", rows))
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in saved] == ["base", "dpo", "dpo", "dpo"]
    assert saved[1]["seed"] == 0
    assert saved[1]["accuracy"] == rows[1].to_dict()["accuracy"]
    assert saved[0]["gain"] is None
    assert set(saved[3]["gain_by_fact"]) == {"object", "attribute", "relation"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_prompts_and_configs_cannot_inject_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    judged = [Judged(evil, evil, 0, 0.5, image=Image.new("RGB", (8, 8)))]
    runs = [Run("base", judged), Run(evil, judged)]
    report = Report(
        evil, summarise(runs), comparison=compare(runs[0], runs[1]), config=evil, command=evil, health=[evil]
    )
    metrics = {evil: [write_metrics(tmp_path / "m.jsonl")], "other": [tmp_path / "m.jsonl"]}
    text = write_report(tmp_path, dataclasses.replace(report, metrics=metrics)).read_text()
    assert Page(text).scripts == 0
    assert evil not in text


@pytest.mark.parametrize("shift", [0.0, -0.2, 0.2])
def test_the_headline_says_what_the_interval_says(tmp_path, shift):
    scores = np.random.default_rng(0).random(30)
    noise = np.random.default_rng(1).normal(0, 0.05, 30)
    runs = [
        Run(name, [Judged(f"p{place}", "any", place, float(score)) for place, score in enumerate(values)])
        for name, values in (("base", scores), ("dpo", scores + shift + noise - noise.mean()))
    ]
    text = write_report(tmp_path, Report("scores", summarise(runs, bounds=None))).read_text()
    assert ("no difference is shown" in text) == (shift == 0)
    assert "On 30 held-out prompts, dpo scores" in text
    assert "health checks" not in text
    assert "different prompt" not in text


def test_one_model_alone_and_large_pictures(tmp_path):
    picture = tmp_path / "large.png"
    Image.new("RGB", (900, 600), (200, 30, 30)).save(picture)
    judged = [Judged("a red wall", "any", 0, 31.0, image=picture)]
    alone = summarise([Run("base", judged)], bounds=None)
    text = write_report(tmp_path / "a", Report("one", alone)).read_text()
    assert "base scores 31 on 1 held-out prompts" in text
    assert "Only 1 different prompt:" in text
    runs = [Run("base", judged, guidance=5.0), Run("dpo", judged, guidance=5.0)]
    both = Report("two", summarise(runs, bounds=None), comparison=compare(runs[0], runs[1]))
    text = write_report(tmp_path / "b", both).read_text()
    assert text.count("data:image/jpeg") == 2
    assert len(text) < 60_000


def test_readers_see_labels_and_programs_see_names(tmp_path):
    runs = [
        dataclasses.replace(world_run("base", 0.4, 12), label="before", repeated=world_run("base", 0.4, 3, 4).judged),
        dataclasses.replace(
            world_run("dpo", 0.1, 12, seed=0), label="Method & Co", repeated=world_run("a", 0.1, 3, 4).judged
        ),
    ]
    report = Report(
        "labels",
        summarise(runs),
        comparison=compare(runs[0], runs[1]),
        metrics={"Method & Co": [write_metrics(tmp_path / "m.jsonl")]},
        cautions=["CLIP read only the beginning of the prompt of 3 pictures."],
    )
    text = write_report(tmp_path / "page", report).read_text()
    Page(text)
    assert "Method &amp; Co gets" in text
    assert "dpo" not in re.sub(r"<style>.*?</style>|data:image[^\"]*", "", text, flags=re.S)
    assert "the beginning of the prompt of 3 pictures" in text
    assert "Two pictures of one prompt differ by" in text
    assert '<th class="n">diversity</th>' in text
    saved = json.loads((tmp_path / "page" / "results.json").read_text())
    assert [(row["name"], row["label"]) for row in saved] == [("base", "before"), ("dpo", "Method & Co")]
    assert saved[1]["diversity_gain"]["value"] == pytest.approx(
        saved[1]["diversity"]["value"] - saved[0]["diversity"]["value"]
    )


def test_curves_survive_gaps_and_take_colours_from_the_page(tmp_path):
    path = write_metrics(
        tmp_path / "m.jsonl", model_w_err=0.2, ref_w_err=0.2, model_l_err=0.3, ref_l_err=0.2, grad_norm=None
    )
    with path.open("a") as file:
        file.write('{"step": 60, "loss": null}\n{"step": 61, "lo')
    panels = draw_curves({"dpo": [path], "sft": [write_metrics(tmp_path / "s.jsonl", steps=900)]})
    assert [panel.title for panel in panels][:3] == ["Loss, dpo", "Loss, sft", "Pairs ranked right"]
    assert [panel.has_dashes for panel in panels].count(True) == 1
    assert "Gradient norm" not in [panel.title for panel in panels]
    for panel in panels:
        assert "var(--series-1)" in panel.svg or "var(--series-2)" in panel.svg
        assert not re.search(r"#0[1-6]0[1-6]0[1-6]", panel.svg)
        assert len(panel.svg) < 60_000
    with pytest.raises(FileNotFoundError, match="no metrics"):
        draw_curves({"dpo": [tmp_path / "absent.jsonl"]})


def test_nothing_half_written_and_clear_errors(tmp_path, runs):
    rows = summarise(runs[:1])
    with pytest.raises(ValueError, match="at least one row"):
        write_report(tmp_path, Report("none", []))
    with pytest.raises(ValueError, match="no row of results"):
        write_report(tmp_path, Report("other", rows, comparison=compare(runs[0], runs[1])))
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "results.json").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*results\.json"):
        write_results(tmp_path / "results.json", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
