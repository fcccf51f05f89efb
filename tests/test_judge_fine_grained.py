"""`mmalign judge fine_grained=...`: segments, scores and pairs in shards, with real servers and a real local model."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import mmalign
from mmalign.core.types import Prompt
from mmalign.data import Candidate, Manifest, Record, RecordError, ShardWriter, read_shard
from mmalign.feedback import KINDS, Template, answers, says_yes, segments
from mmalign.jobs.judges import Loader, LocalSettings
from mmalign.modalities.lvlm import LvlmSettings
from mmalign.modalities.tiny_lvlm import FAMILIES
from mmalign.world import Object, Scene, render
from mmalign.world.writing import described_scenes, text_of
from tests.tiny_chat_server import TinyModel

ORACLE = {"facts": "oracle", "verification": "oracle"}
SCENE = Scene((Object("circle", "red", "small", "top left"), Object("square", "blue", "large", "bottom right")))


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return FAMILIES["llava"](tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def described(tmp_path_factory) -> Path:
    """Three shards of two pictures, each with a true description and one of another picture."""
    folder = tmp_path_factory.mktemp("described") / "shards"
    drawn = list(itertools.islice(described_scenes(0, "train"), 6))
    with ShardWriter(folder, records_per_shard=2) as writer:
        for place, (scene, own) in enumerate(drawn):
            texts = (text_of(own), text_of(drawn[place - 1][1]))
            candidates = [Candidate(text=text, source="test") for text in texts]
            writer.write(Record(f"{place:04d}", "Describe the image.", candidates, prompt_images=[render(scene)]))
    return folder


def write(folder: Path, *texts: str, image: bool = True) -> Path:
    with ShardWriter(folder) as writer:
        images = [render(SCENE)] if image else []
        writer.write(Record("0000", "Describe.", [Candidate(text=text) for text in texts], prompt_images=images))
    return folder


def records(folder: Path) -> list[Record]:
    found = [one for shard in Manifest.read(folder).shards for one in read_shard(shard, frozenset({"image"}))]
    assert not any(isinstance(one, RecordError) for one in found)
    return found  # pyright: ignore[reportReturnType]


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.glob("journal/*.jsonl") for line in path.read_text().splitlines()]


# -- segments, scores, pairs -------------------------------------------------------------------------------------------


def test_segments_in_shards_round_trip_with_the_judge_the_prompt_and_the_date(described, tmp_path):
    folder = mmalign.judge({"shards": str(described), "output": str(tmp_path / "out"), "fine_grained": ORACLE})
    before, after = records(described), records(folder)
    assert [record.key for record in after] == [record.key for record in before]
    hashes = {
        "facts": Template.read(None, "facts", ()).hash,
        "verification": Template.read(None, "statement", ()).hash,
    }
    for record, old in zip(after, before, strict=True):
        assert record.meta["judge"] == {"facts": "oracle", "verification": "oracle"}
        assert record.meta["prompt_hash"] == hashes
        assert len(record.meta["date"]) == 10
        assert record.preferred == []
        assert record.prompt_images[0].tobytes() == old.prompt_images[0].tobytes()  # pyright: ignore
        for candidate in record.candidates:
            assert candidate.text is not None
            assert [(one["start"], one["end"]) for one in candidate.segments] == segments(candidate.text)
            assert all(one[kind] in (-1, 0, 1) for one in candidate.segments for kind in KINDS)
            assert candidate.score is None
            assert candidate.source == "test"
        # the first description is of its own picture
        assert not any(one[kind] == 1 for one in record.candidates[0].segments for kind in KINDS)
    assert any(one["object"] == 1 for record in after for one in record.candidates[1].segments)


def test_scores_are_minus_the_false_facts_and_make_pairs(tmp_path):
    # two false facts; none; none of two; one
    texts = ["There is a green circle in the bottom left.", "There is a circle.", "There is a red circle."]
    texts.append("There is a cross.")
    shards = write(tmp_path / "in", *texts)
    settings = {"shards": str(shards), "fine_grained": {**ORACLE, "score": "rejected"}}
    (record,) = records(mmalign.judge({**settings, "output": str(tmp_path / "out")}))
    assert [candidate.score for candidate in record.candidates] == [-2, 0, 0, -1]
    assert record.preferred == [(1, 0)]
    balanced = {"rule": "length_balanced", "pairs": 3}
    (record,) = records(mmalign.judge({**settings, "output": str(tmp_path / "balanced"), "pairing": balanced}))
    # words: 9, 4, 5, 4. (1, 3) keeps the balance; then (2, 3) leads to +1 and (3, 0) to -5; then (2, 0) to -3.
    assert record.preferred == [(1, 3), (2, 3), (2, 0)]
    share = {**ORACLE, "score": "share"}
    (record,) = records(mmalign.judge({**settings, "output": str(tmp_path / "share"), "fine_grained": share}))
    # of circle, green, in the bottom left: two are false
    assert [candidate.score for candidate in record.candidates] == pytest.approx([-2 / 3, 0, 0, -1])


def test_an_empty_text_is_not_the_best_for_having_no_false_fact(tmp_path):
    shards = write(tmp_path / "in", "", "There is a cross.", "There is a circle.")
    settings = {"shards": str(shards), "output": str(tmp_path / "out"), "fine_grained": {**ORACLE, "score": "rejected"}}
    (record,) = records(mmalign.judge(settings))
    assert [candidate.score for candidate in record.candidates] == [None, -1, 0]
    assert record.candidates[0].segments == []
    assert record.preferred == [(2, 1)]


def test_records_that_no_judge_can_read_are_counted_and_too_many_stop_the_job(tmp_path):
    shards = write(tmp_path / "in", "There is a circle.", image=False)
    settings = {"shards": str(shards), "output": str(tmp_path / "out"), "fine_grained": ORACLE}
    with pytest.raises(ValueError, match="1 of 1 records cannot be used.*the prompt has no picture"):
        mmalign.judge(settings)
    with ShardWriter(tmp_path / "pictures") as writer:
        writer.write(Record("0000", "a", [Candidate(image=render(SCENE))], prompt_images=[render(SCENE)]))
    with pytest.raises(ValueError, match="candidate 0 has no text"):
        mmalign.judge({**settings, "shards": str(tmp_path / "pictures")})


def test_the_table_against_the_oracle(described, tmp_path, capsys):
    fine_grained = {**ORACLE, "against_oracle": True}
    mmalign.judge({"shards": str(described), "output": str(tmp_path / "out"), "fine_grained": fine_grained})
    printed = capsys.readouterr().out
    rows = [line.split()[1:-1] for line in printed.splitlines() if line.startswith("│") and "1.000" in line]
    assert [[word for word in row if word != "│"] for row in rows] == [
        [kind, "1.000", "1.000", "1.000", "0"] for kind in KINDS
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"facts": "oracle"}, "missing key fine_grained.verification"),
        ({**ORACLE, "facts": {"kind": "endpoint"}}, "missing key model"),
        ({**ORACLE, "facts": {"kind": "magic"}}, "expected one of endpoint, local, oracle"),
        ({**ORACLE, "facts": {"model": "x", "concurent": 3}}, "did you mean fine_grained.facts.concurrent"),
        ({**ORACLE, "score": "best"}, "fine_grained.score"),
    ],
)
def test_mistakes_in_the_section_are_told_by_their_key(described, tmp_path, section, message):
    with pytest.raises(ValueError, match=message):
        mmalign.judge({"shards": str(described), "output": str(tmp_path / "out"), "fine_grained": section})
    assert not (tmp_path / "out").exists()


# -- a model in this process -------------------------------------------------------------------------------------------


def test_a_local_judge_weighs_yes_against_no_as_the_model_itself_does(llava):
    import torch

    prompt = Template.read(None, "statement", ("fact",))
    settings = LocalSettings(model=LvlmSettings(path=str(llava)), batch_size=2)
    judge = Loader(torch.device("cpu")).verifier(settings, prompt)
    picture = render(SCENE)
    questions = [Prompt(prompt.fill(fact=fact), (picture,)) for fact in ("There is a dog", "It is red", "A cat")]
    found = answers(judge, questions)
    model = TinyModel(llava)
    for question, answer in zip(questions, found, strict=True):
        assert answer.options is not None
        for word, value in answer.options.items():
            assert value == pytest.approx(log_prob(model, question, word), abs=1e-4)
        assert says_yes(answer) in (True, False)
    # a question with a placeholder in it fits no picture: it is refused, and it alone
    bad = [questions[0], Prompt("Is <image> there?", (picture, picture)), questions[1]]
    assert [answer.failure for answer in answers(judge, bad)] == [None, "wrong_placeholders", None]


def log_prob(model: TinyModel, question: Prompt, word: str) -> float:
    """log P(the answer begins with `word`), by the model's plain forward pass."""
    import torch

    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    start = model.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # LLaVA's template ends in "ASSISTANT:", the answer follows after a space
    ids = model.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    inputs = model.processor(text=start, images=list(question.images), return_tensors="pt")
    count = inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([ids])], -1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        rows = model.model(**whole).logits[0, count - 1 : -1].log_softmax(-1)
    return float(rows[range(len(ids)), ids].sum())


def test_a_local_model_as_both_judges_writes_garbage_that_is_counted_and_kept(llava, tmp_path):
    shards = write(tmp_path / "in", "There is a circle. There is a cross.")
    local = {"kind": "local", "model": {"path": str(llava)}, "max_tokens": 8}
    settings: dict[str, Any] = {"shards": str(shards), "output": str(tmp_path / "out"), "device": "cpu"}
    with pytest.raises(ValueError, match="fine_grained.facts: 100% of the answers cannot be used.*2 malformed"):
        mmalign.judge({**settings, "fine_grained": {"facts": local, "verification": local}})
    assert not list((tmp_path / "out").glob("*.tar"))
    kept = journal(tmp_path / "out")
    assert len(kept) == 2
    assert all(line["judge"] == str(llava) and isinstance(line["answer"], str) for line in kept)
    fine_grained = {"facts": local, "verification": local, "max_bad_share": 1.0, "score": "rejected"}
    (record,) = records(mmalign.judge({**settings, "fine_grained": fine_grained, "keep_ties": True}))
    assert (record.candidates[0].segments, record.candidates[0].score) == ([], None)
    assert len(journal(tmp_path / "out")) == 2
    # With the world's facts, the model's probabilities decide each of them.
    fine_grained = {"facts": "oracle", "verification": local}
    (record,) = records(mmalign.judge({**settings, "output": str(tmp_path / "b"), "fine_grained": fine_grained}))
    assert [one["object"] for one in record.candidates[0].segments] in ([0, 0], [0, 1], [1, 0], [1, 1])


# -- a server ----------------------------------------------------------------------------------------------------------

NEEDED = ("openai", "tenacity", "fastapi", "uvicorn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


class Served:
    """`transformers serve` with a model, in a process of its own."""

    def __init__(self, model: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def answered(self) -> int:
        return self.log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200')


@pytest.mark.skipif(bool(MISSING), reason=f"`transformers serve` and its client need {', '.join(MISSING)}")
def test_a_server_that_dies_half_way_loses_nothing_and_the_next_run_asks_the_rest(llava, described, tmp_path):
    """The judge is a real LVLM behind `transformers serve`; a random one, so that its words decide nothing."""
    server = Served(llava, tmp_path / "first.log")
    verification = {"model": str(llava), "max_tokens": 2, "concurrent": 2, "retries": 1, "pauses": [0.05, 0.1]}
    settings: dict[str, Any] = {"shards": str(described), "output": str(tmp_path / "out")}

    def fine_grained(url: str) -> dict[str, Any]:
        return {"facts": "oracle", "verification": {**verification, "base_url": url}, "max_bad_share": 1.0}

    def asked() -> list[dict[str, Any]]:
        return [line for line in journal(tmp_path / "out") if line["judge"] == str(llava)]

    def kill_half_way() -> None:
        while server.answered < 25 and server.process.poll() is None:
            time.sleep(0.02)
        server.kill()

    killer = threading.Thread(target=kill_half_way)
    killer.start()
    with pytest.raises(OSError, match="answers are kept in .*give the same command again to ask the rest"):
        mmalign.judge({**settings, "fine_grained": fine_grained(server.url)})
    killer.join()
    kept = asked()
    assert len(kept) >= 20
    # what the server had answered is there; up to two answers died on their way
    assert server.answered - 2 <= len(kept) <= server.answered

    server = Served(llava, tmp_path / "second.log")
    try:
        folder = mmalign.judge({**settings, "fine_grained": fine_grained(server.url)})
    finally:
        server.kill()
    every = asked()
    assert every[: len(kept)] == kept
    assert len({line["key"] for line in every}) == len(every) == len(kept) + server.answered
    assert server.answered > 10
    assert {line["options"] for line in every} == {None}
    assert len(records(folder)) == 6
    # A third run has nothing to ask: no server is needed.
    for path in folder.glob("*.tar"):
        path.unlink()
    mmalign.judge({**settings, "fine_grained": fine_grained(server.url)})
    assert asked() == every
