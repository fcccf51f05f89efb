"""`mmalign evaluate` on benchmarks: files of answers, a tiny model that answers, a judge that is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import mmalign
from mmalign.cli import main
from mmalign.modalities import tiny_lvlm
from tests.test_evaluate_hallucination import FIXTURES, LABELS, fixture, lines, write
from tests.tiny_chat_server import TinyModel, serving


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return tiny_lvlm.FAMILIES["llava"](tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def pope(tmp_path) -> Path:
    """Labels, two pictures, and the answers of two models."""
    lines(tmp_path / "coco_pope_random.json", LABELS)
    for name, colour in (("a.jpg", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    lines(tmp_path / "base.jsonl", [{"question_id": n, "text": "Yes"} for n in (1, 2, 3)])
    lines(tmp_path / "dpo.jsonl", [{"question_id": n, "text": text} for n, text in ((1, "Yes"), (2, "No"), (3, "No"))])
    return tmp_path


def test_two_files_of_answers_become_one_table(pope, capsys):
    main(
        [
            "evaluate",
            f"output={pope}/run",
            "benchmark.name=pope",
            f"benchmark.answers={{base: {pope}/base.jsonl, dpo: {pope}/dpo.jsonl}}",
            f"benchmark.annotations={pope}/coco_pope_random.json",
        ]
    )
    printed = " ".join(capsys.readouterr().out.split())
    rows = json.loads((pope / "run" / "results.json").read_text())
    # base: TP 2, FP 1 -> F1 4/5; dpo: TP 1, FN 1 -> F1 2/3
    assert [(row["model"], round(row["numbers"]["F1"]["value"], 1)) for row in rows] == [("base", 80.0), ("dpo", 66.7)]
    assert rows[0]["numbers"]["F1"]["low"] < 80 < rows[0]["numbers"]["F1"]["high"]
    assert rows[0]["rule"].startswith("POPE's own rule: an answer is cut at its first full stop")
    for text in (printed, " ".join((pope / "run" / "table.md").read_text().split())):
        assert "POPE's own rule" in text
        assert "80.0" in text
        assert "66.7" in text
    page = (pope / "run" / "report.html").read_text()
    assert "own rule: an answer is cut" in page
    assert "<script" not in page


def test_published_numbers_from_the_command_line(tmp_path, capsys):
    answers, labels, questions = fixture(
        "pope_llava15_13b/llava-v1.5-13b.jsonl", "pope_coco/e3e3926", "pope_coco/llava_pope_test.jsonl"
    )
    main(
        [
            "evaluate",
            f"output={tmp_path}",
            "benchmark.name=pope",
            f"benchmark.answers={answers}",
            f"benchmark.annotations={labels}",
            f"benchmark.questions={questions}",
        ]
    )
    rows = {row["part"]: row["numbers"]["F1"]["value"] for row in json.loads((tmp_path / "results.json").read_text())}
    assert {part: round(value, 1) for part, value in rows.items()} == {
        "random": 87.1,
        "popular": 86.2,
        "adversarial": 84.5,
        "mean": 85.9,
    }
    assert "85.9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["benchmark.name=pape"], "benchmark.name is 'pape'"),
        (["benchmark.name=pope"], "nothing to score: set benchmark.answers"),
        (["benchmark.name=pope", "benchmark.answers=gone.jsonl"], "benchmark.annotations is empty"),
        (["benchmark.name=pope", "benchmark.annotation=x"], "did you mean benchmark.annotations?"),
        (["benchmark.name=pope", "benchmark.answers={pope}/gone.jsonl", "benchmark.annotations={pope}"], "no file"),
        (["benchmark.name=pope", "benchmark.answers={pope}/a.jpg", "benchmark.annotations={pope}"], "is not text"),
        (["benchmark.name=chair", "benchmark.answers=x", "benchmark.annotations={pope}"], "synonyms is not set"),
        (["benchmark.name=mmhal", "benchmark.answers={pope}/base.jsonl"], "benchmark.judge is not set"),
        (["benchmark.name=pope", "benchmark.answers=x", "benchmark.judge={name: a, date: b}"], "needs no judge"),
        (["benchmark.name=pope", "models=[{name: a, path: b}]", "benchmark.annotations={pope}"], "images is not set"),
        (
            [
                "benchmark.name=pope",
                "models=[{name: a, path: b}]",
                "benchmark.annotations={pope}",
                "benchmark.images={pope}/x",
            ],
            "2 pictures are not there",
        ),
        (
            [
                "benchmark.name=pope",
                "models=[{name: a, path: b}]",
                "benchmark.annotations={pope}",
                "benchmark.images={pope}",
            ],
            "model.kind=lvlm",
        ),
    ],
)
def test_mistakes_are_told_in_one_message(pope, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", f"output={pope}/run", *(word.replace("{pope}", str(pope)) for word in words)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_teaches_the_benchmarks(capsys):
    main(["evaluate", "--help"])
    printed = capsys.readouterr().out
    assert "benchmark.annotations=pope/coco" in printed
    assert "pope | chair | amber | mmhal | object_halbench | hallusionbench" in printed


def config(pope: Path, llava: Path, output: str) -> dict:
    return {
        "output": str(pope / output),
        "models": [{"name": "tiny", "path": str(llava)}],
        "model": {"kind": "lvlm"},
        "sampling": {"max_new_tokens": 4, "batch_size": 2},
        "device": "cpu",
        "benchmark": {
            "name": "pope",
            "annotations": str(pope / "coco_pope_random.json"),
            "images": str(pope),
            "suffix": " Answer yes or no.",
        },
    }


def test_a_model_answers_and_goes_on_where_it_was_stopped(pope, llava):
    (first,) = mmalign.evaluate(config(pope, llava, "whole"))
    assert first.score.parts[0].items == 3
    path = pope / "whole" / "answers" / "tiny.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in whole]
    assert [row["question_id"] for row in rows] == ["1", "2", "3"]
    assert rows[1]["prompt"] == "Is there a dog in the image? Answer yes or no."
    # Killed in the middle of the second line: that answer is asked again, the first is left alone.
    kept = json.loads(whole[0]) | {"text": "kept"}
    path.write_text(json.dumps(kept) + "\n" + whole[1][:20])
    mmalign.evaluate(config(pope, llava, "whole"))
    again = path.read_text().splitlines(keepends=True)
    assert json.loads(again[0])["text"] == "kept"
    assert again[1:] == whole[1:]


def test_answers_of_another_prompt_are_not_taken_over(pope, llava):
    settings = config(pope, llava, "run")
    mmalign.evaluate(settings)
    settings["benchmark"]["suffix"] = " Yes or no?"
    with pytest.raises(ValueError, match="line 1 answers another question than this config asks"):
        mmalign.evaluate(settings)


def test_a_model_describes_real_pictures(tmp_path, llava):
    folder, synonyms = fixture("coco_mini", "chair_coco/synonyms.txt")
    pictures = sorted(Path(folder, "images").glob("*.jpg"))
    questions = lines(tmp_path / "q.jsonl", [{"image_id": int(path.stem), "image": path.name} for path in pictures])
    (one,) = mmalign.evaluate(
        {
            "output": str(tmp_path / "run"),
            "models": [{"name": "tiny", "path": str(llava)}],
            "model": {"kind": "lvlm"},
            "sampling": {"max_new_tokens": 3},
            "device": "cpu",
            "benchmark": {
                "name": "chair",
                "annotations": [f"{folder}/instances_val2017.json", f"{folder}/captions_val2017.json"],
                "questions": questions,
                "synonyms": synonyms,
                "images": f"{folder}/images",
            },
        }
    )
    assert one.score.parts[0].counts["captions"] == 12


def test_a_judge_is_asked_once_and_named_with_the_score(tmp_path, llava):
    (template,) = fixture("mmhal/mmhal-bench_answer_template.json")
    rows = json.loads(Path(template).read_text())
    answers = write(tmp_path / "answers.json", [{**row, "model_answer": "I see a thing."} for row in rows])
    settings = {
        "output": str(tmp_path / "run"),
        "benchmark": {"name": "mmhal", "annotations": template, "answers": answers},
    }
    with serving(TinyModel(llava)) as server:
        endpoint = {"model": "tiny", "base_url": server.url, "max_tokens": 2}
        settings["benchmark"]["judge"] = {"endpoint": endpoint}
        (one,) = mmalign.evaluate(settings)
        asked = len(server.requests)
        mmalign.evaluate(settings)
        assert len(server.requests) == asked == 96
        question = server.requests[0]["messages"][0]["content"]
    assert any(row["question"] in question for row in rows)
    assert "Judge: tiny (question " in one.score.rule
    assert "cannot be compared with published ones" in one.score.rule
    replies = (tmp_path / "run" / "judge" / "answers" / "replies.jsonl").read_text().splitlines()
    assert len(replies) == 96


def test_the_fixtures_hold_no_answers_that_are_scored_silently_wrong():
    """POPE's question file given for answers, as happens."""
    if not FIXTURES.exists():
        pytest.skip("no fixtures")
    labels = FIXTURES / "pope_coco" / "e3e3926" / "coco_pope_random.json"
    with pytest.raises(ValueError, match="is this a file of questions"):
        mmalign.evaluate(
            {
                "output": "unused",
                "benchmark": {"name": "pope", "answers": str(labels), "annotations": str(labels)},
            }
        )
