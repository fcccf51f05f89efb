"""A judge behind an endpoint, against a real server around a real tiny model: answers, retries, limits, refusals."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mmalign.core.types import Prompt
from mmalign.feedback import EndpointJudge, EndpointSettings, Journal, Journalled, answers
from mmalign.feedback.endpoint import EndpointDown, EndpointRefused, Pace
from mmalign.modalities.tiny_lvlm import FAMILIES
from mmalign.world import Object, Scene, render
from tests.tiny_chat_server import TinyModel, TinyServer, serving

pytest.importorskip("openai", reason="the extra `judge` is not installed: pip install 'mmalign[judge]'")
pytest.importorskip("tenacity", reason="the extra `judge` is not installed: pip install 'mmalign[judge]'")

PICTURE = render(Scene((Object("circle", "red", "small", "top left"),)))
KEY = "sk-very-secret-9f2c"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TinyModel:
    return TinyModel(FAMILIES["llava"](tmp_path_factory.mktemp("llava")))


@pytest.fixture
def server(model, monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with serving(model) as server:
        yield server


def judge(server: TinyServer, **settings: Any) -> EndpointJudge:
    usual: dict[str, Any] = {"model": "tiny", "base_url": server.url, "max_tokens": 4, "pauses": (0.01, 0.05)}
    return EndpointJudge(EndpointSettings(**{**usual, **settings}))


def asked(count: int) -> list[Prompt]:
    return [Prompt(f"Is it number {place}?", (PICTURE,)) for place in range(count)]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answers_and_log_probs_are_the_models_own(server, model):
    questions = [*asked(3), Prompt("Is it?")]
    found = answers(judge(server), questions)
    for question, answer in zip(questions, found, strict=True):
        text, rows = model.answer(question.text, list(question.images), 4)
        assert answer.text == text
        assert answer.options is not None
        best = sorted(rows[0].values(), reverse=True)[:5]
        assert sorted(answer.options.values(), reverse=True) == pytest.approx(best, abs=1e-5)
    # The picture arrived as it is, and it counts.
    assert found[0].options != answers(judge(server), [Prompt("Is it number 0?")])[0].options


def test_the_address_comes_from_the_environment_and_the_key_too(server, monkeypatch):
    server.key = KEY
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("OPENAI_API_BASE", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, server.url)
        assert answers(judge(server, base_url=None), asked(1))[0].failure is None
        monkeypatch.setenv(name, "")


def test_without_an_address_or_a_key_nothing_is_asked(server):
    with pytest.raises(ValueError, match="set base_url or OPENAI_BASE_URL"):
        judge(server, base_url=None)
    with pytest.raises(ValueError, match="holds a user name or password"):
        judge(server, base_url="https://me:secret@example.org/v1")


def test_what_a_server_does_not_take_is_left_out_from_then_on(server):
    server.refuses = {"logprobs", "max_tokens", "temperature"}
    asker = judge(server, concurrent=1)
    found = answers(asker, asked(3))
    assert all(answer.failure is None and answer.options is None for answer in found)
    # three refusals, then the three answers
    assert len(server.requests) == 6
    assert server.requests[-1].keys() == {"model", "messages", "max_completion_tokens"}
    temperature, log_probs = asker.cautions()
    assert "takes no temperature" in temperature
    assert "no log-probs with 3 answers" in log_probs


def test_other_refusals_are_failures_of_their_question(server):
    server.faults = [400, None, 422]
    found = answers(judge(server, concurrent=1), asked(3))
    assert [answer.failure for answer in found] == ["refused", None, "refused"]
    assert len(server.requests) == 3


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_full_queues_and_errors_are_tried_again(server):
    server.faults = [429, 503, 500, 408, None]
    assert answers(judge(server, concurrent=1), asked(1))[0].failure is None
    assert len(server.requests) == 5


def test_the_pause_doubles_has_a_limit_and_heeds_the_server(server):
    class State:
        def __init__(self, attempt: int, error: BaseException):
            self.attempt_number = attempt
            self.outcome = self
            self.exception = lambda: error

    asker = judge(server, pauses=(1.0, 20.0))
    pauses = [asker._pause(State(attempt, OSError())) for attempt in range(1, 7)]
    assert pauses == [1, 2, 4, 8, 16, 20]

    class Asks(OSError):
        class response:
            headers = {"retry-after": "7"}

    assert [asker._pause(State(attempt, Asks())) for attempt in (1, 4)] == [7, 8]


def test_questions_without_an_answer_in_time_are_counted_and_asked_again_by_the_next_run(server, tmp_path):
    server.faults = ["silence"] * 4
    impatient = judge(server, concurrent=1, timeout=0.2, retries=1)
    found = answers(Journalled(impatient, Journal(tmp_path), ""), asked(2))
    # both are asked, each of them twice
    assert [answer.failure for answer in found] == ["timeout", "timeout"]
    assert len(server.requests) == 4
    assert len(Journal(tmp_path)) == 0
    server.release.set()
    found = answers(Journalled(judge(server), Journal(tmp_path), ""), asked(2))
    assert [answer.failure for answer in found] == [None, None]
    assert len(Journal(tmp_path)) == 2


def test_answers_that_are_none_are_failures(server):
    server.faults = ["page", "broken", "empty", None]
    found = answers(judge(server, concurrent=1), asked(4))
    assert [answer.failure for answer in found] == ["garbage", "garbage", "garbage", None]


def test_many_failures_in_a_row_mean_that_the_endpoint_is_down(server):
    server.faults = [None, *[500] * 100]
    asker = judge(server, concurrent=1, retries=1, patience=3)
    found = []
    with pytest.raises(EndpointDown, match="3 questions in a row failed at http://127.0.0.1.*: server_error"):
        found += asker.ask(asked(9))
    # one answer, then three questions, each asked twice
    assert len(server.requests) == 7


def test_an_endpoint_that_is_not_there(server, tmp_path):
    nowhere = judge(server, base_url="http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(EndpointDown, match=r"no answer from http://127.0.0.1:9: .*\n0 answers are kept"):
        answers(Journalled(nowhere, Journal(tmp_path / "journal"), ""), asked(3))


def test_a_wrong_key_or_model_stops_the_run_and_shows_no_key(server, monkeypatch):
    with pytest.raises(EndpointRefused, match="has no model 'tini'"):
        answers(judge(server, model="tini"), asked(2))
    server.key = "another"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(EndpointRefused, match="set OPENAI_API_KEY") as raised:
        answers(judge(server), asked(2))
    assert KEY not in str(raised.value)


def test_what_was_answered_before_the_end_is_kept_and_not_asked_again(server, tmp_path):
    """The server fails for good from the sixth request on, with three questions under way at a time."""
    server.faults = [*[None] * 5, *[503] * 1000]
    journal = tmp_path / "journal"
    with pytest.raises(EndpointDown, match="give the same command again"):
        answers(Journalled(judge(server, concurrent=3, retries=0, patience=2), Journal(journal), ""), asked(20))
    kept = len(Journal(journal))
    assert kept == 5
    server.faults = []
    server.requests.clear()
    again = Journalled(judge(server, concurrent=3), Journal(journal), "")
    assert all(answer.failure is None for answer in answers(again, asked(20)))
    assert len(server.requests) == again.asked == 15
    assert len(Journal(journal)) == 20


def test_no_file_holds_the_key(server, tmp_path, monkeypatch):
    server.key = KEY
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    answers(Journalled(judge(server), Journal(tmp_path), "0a"), asked(2))
    content = "".join(path.read_text() for path in Path(tmp_path).rglob("*.jsonl"))
    assert len(content.splitlines()) == 2
    assert json.loads(content.splitlines()[0])["judge"] == "tiny"
    assert KEY not in content
    assert "127.0.0.1" not in content


# -- limits ------------------------------------------------------------------------------------------------------------


def test_no_more_questions_are_under_way_than_allowed(server):
    answers(judge(server, concurrent=3), asked(12))
    assert 1 <= server.most <= 3
    server.most = 0
    answers(judge(server, concurrent=1), asked(4))
    assert server.most == 1


def test_requests_begin_at_equal_distances():
    now = 100.0
    pace = Pace(30, clock=lambda: now)  # one every 2 seconds
    assert [pace.reserve() for _ in range(3)] == [0, 2, 4]
    now = 103.0  # the third has begun at 104, the fourth may at 106
    assert pace.reserve() == 3
    now = 200.0  # what was not used is not saved up
    assert [pace.reserve() for _ in range(2)] == [0, 2]
    assert [Pace(None).reserve() for _ in range(3)] == [0, 0, 0]


def test_whoever_waits_for_the_pace_can_be_stopped():
    pace, stop = Pace(0.001), threading.Event()
    pace.wait(stop)
    stop.set()
    pace.wait(stop)  # would last 60,000 seconds


@pytest.mark.parametrize(
    "wrong", [{"concurrent": 0}, {"timeout": 0.0}, {"retries": -1}, {"requests_per_minute": 0}, {"max_tokens": 0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EndpointSettings(model="tiny", **wrong)
