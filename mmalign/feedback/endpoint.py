"""A judge behind an OpenAI-compatible chat endpoint: a service, or a server of one's own (vLLM, transformers serve).

The address comes from the settings, or from OPENAI_BASE_URL or OPENAI_API_BASE; the key from OPENAI_API_KEY alone, and
it is written nowhere. Timeouts, full queues (429) and errors of the server (5xx) are tried again, after growing pauses;
a question that stays without an answer is a failure of its own. Refused, for all questions at once: an address where
nothing answers, a key or a model that the server does not know, many failures in a row.
"""

from __future__ import annotations

import base64
import concurrent.futures
import io
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final
from urllib.parse import urlsplit

from mmalign.core.types import Prompt
from mmalign.feedback.judges import Answer

if TYPE_CHECKING:
    from PIL.Image import Image

# Words of the answer's beginning that are asked for with their log-probs; services allow at most 20.
TOP_WORDS = 5
MAX_TOKENS = 1024
# the failure of a question whose answer is none of a chat endpoint's
GARBAGE = "garbage"


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    kind: Literal["endpoint"] = "endpoint"
    # the model, as the endpoint knows it
    model: str
    # e.g. http://localhost:8000/v1; null: OPENAI_BASE_URL or OPENAI_API_BASE. The key is read from OPENAI_API_KEY
    base_url: str | None = None
    # tokens of the longest answer; null: 1024 for facts, 16 for yes or no
    max_tokens: int | None = None
    temperature: float = 0.0
    # ask for log-probs, so that yes and no are told by their probabilities; a server without them is read by words
    log_probs: bool = True
    # how pictures are sent: png (exact) or jpg (smaller)
    image_format: Literal["png", "jpg"] = "png"
    # questions under way at a time
    concurrent: int = 8
    # requests that may begin within a minute, by each process; null: no limit
    requests_per_minute: float | None = None
    # seconds until a question counts as unanswered
    timeout: float = 120.0
    # how often a question is tried again
    retries: int = 5
    # seconds of the first pause, which then doubles, and of the longest
    pauses: tuple[float, float] = (1.0, 60.0)
    # so many failures in a row, each after its retries, and the endpoint counts as down
    patience: int = 10

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrent", "timeout", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} of the endpoint is {value}; expected more than 0")
        if self.retries < 0 or (self.requests_per_minute is not None and not self.requests_per_minute > 0):
            raise ValueError("retries of the endpoint must be 0 or more, requests_per_minute more than 0 (or null)")
        if self.base_url is not None and urlsplit(self.base_url).username is not None:
            raise ValueError("base_url of the endpoint holds a user name or password; use OPENAI_API_KEY instead")


class _Stopped(Exception):
    """A question that was not asked, for another one ended the run."""


class EndpointDown(ConnectionError):
    """Nothing more can be asked for now."""


class EndpointRefused(ConnectionError):
    """The endpoint answers, but to nothing that is asked with these settings."""


@final
class EndpointJudge:
    """Asks with several threads. Raises ValueError at once where the libraries or the address are missing."""

    def __init__(self, settings: EndpointSettings):
        self.settings = settings
        self._client, self._address = _client(settings)
        self._pace = Pace(settings.requests_per_minute)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._failures_in_a_row = 0
        self._unsupported: set[str] = set() if settings.log_probs else {"log_probs"}
        self._without_options = 0

    @property
    def name(self) -> str:
        return self.settings.model

    @property
    def identity(self) -> Mapping[str, Any]:
        """Without the address: a server that moves gives the answers that it gave before."""
        settings = self.settings
        return {
            "model": settings.model,
            "max_tokens": settings.max_tokens or MAX_TOKENS,
            "temperature": settings.temperature,
            "log_probs": settings.log_probs,
            "image_format": settings.image_format,
        }

    def cautions(self) -> list[str]:
        found = []
        if "temperature" in self._unsupported:
            found.append(f"{self.name} takes no temperature; its answers may differ from run to run.")
        if self.settings.log_probs and self._without_options:
            found.append(
                f"{self.name} gave no log-probs with {self._without_options} answers; yes and no were read from their "
                "first word."
            )
        return found

    def ask(self, questions: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """As they come. Raises EndpointDown or EndpointRefused, but only after every answer that is under way."""
        self._stop.clear()
        pictures = _Pictures(self.settings.image_format)
        pool = concurrent.futures.ThreadPoolExecutor(self.settings.concurrent)
        ended: queue.SimpleQueue[concurrent.futures.Future[Answer]] = queue.SimpleQueue()
        places: dict[concurrent.futures.Future[Answer], int] = {}
        fatal: ConnectionError | None = None
        try:
            for place, question in enumerate(questions):
                future = pool.submit(self._answer, question, pictures)
                places[future] = place
                future.add_done_callback(ended.put)
            for _ in questions:
                future = ended.get()
                if future.cancelled():
                    continue
                try:
                    answer = future.result()
                except _Stopped:
                    continue
                except ConnectionError as error:
                    fatal = fatal or error
                    pool.shutdown(wait=False, cancel_futures=True)
                else:
                    yield places[future], answer
            if fatal is not None:
                raise fatal
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, question: Prompt, pictures: _Pictures) -> Answer:
        import openai
        import tenacity

        if self._stop.is_set():
            raise _Stopped
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.settings.retries + 1) | tenacity.stop_when_event_set(self._stop),
            wait=self._pause,
            sleep=tenacity.sleep_using_event(self._stop),
            retry=tenacity.retry_if_exception(_passes),
            reraise=True,
        )
        messages = _messages(question, pictures)
        try:
            answer = retrying(self._request, messages)
        except openai.APIError as error:
            answer = self._failure(error)
        except ValueError:  # an answer that is no JSON
            answer = Answer("no JSON", failure=GARBAGE)
        with self._lock:
            self._failures_in_a_row = 0 if answer.failure is None else self._failures_in_a_row + 1
            self._without_options += self.settings.log_probs and answer.failure is None and answer.options is None
            if self._failures_in_a_row < self.settings.patience:
                return answer
        self._stop.set()
        last = f"the last one: {answer.failure}: {answer.text}"
        raise EndpointDown(f"{self.settings.patience} questions in a row failed at {self._address}, {last}")

    def _request(self, messages: list[dict[str, Any]]) -> Answer:
        """One request; where the server does not support an option it is left out from now on."""
        import openai

        while True:
            self._pace.wait(self._stop)
            unsupported = frozenset(self._unsupported)
            try:
                response = self._client.chat.completions.create(
                    model=self.settings.model, messages=messages, **self._options(unsupported)
                )
            except openai.APIStatusError as error:
                refused = _refused_option(error)
                if refused is None or refused in unsupported:
                    raise
                self._unsupported.add(refused)
                continue
            return _read(response)

    def _options(self, unsupported: frozenset[str]) -> dict[str, Any]:
        longest = "max_completion_tokens" if "max_tokens" in unsupported else "max_tokens"
        options: dict[str, Any] = {longest: self.settings.max_tokens or MAX_TOKENS}
        if "temperature" not in unsupported:
            options["temperature"] = self.settings.temperature
        if "log_probs" not in unsupported:
            options |= {"logprobs": True, "top_logprobs": TOP_WORDS}
        return options

    def _pause(self, state: Any) -> float:
        """Doubling pauses, or as long as the server asks for, and never more than the longest."""
        first, longest = self.settings.pauses
        asked = _retry_after(state.outcome.exception())
        return min(max(first * 2 ** (state.attempt_number - 1), asked), longest)

    def _failure(self, error: Any) -> Answer:
        """The failure of one question. Raises, and stops the others, where they would fare no better."""
        import openai

        fatal: ConnectionError | None = None
        status = getattr(error, "status_code", 0)
        if isinstance(error, openai.APITimeoutError):
            return Answer(_reason(error), failure="timeout")
        if isinstance(error, openai.APIConnectionError):
            fatal = EndpointDown(f"no answer from {self._address}: {error.__cause__ or error}")
        elif status in (401, 403):
            fatal = EndpointRefused(f"{self._address} refuses the key ({status}); set OPENAI_API_KEY")
        elif status == 404:
            fatal = EndpointRefused(
                f"{self._address} has no model {self.name!r}, or base_url lacks its /v1: {_reason(error)}"
            )
        elif _is_out_of_quota(error):
            fatal = EndpointRefused(f"the quota at {self._address} is used up: {_reason(error)}")
        if fatal is not None:
            self._stop.set()
            raise fatal
        failures = {0: GARBAGE, 408: "timeout", 429: "rate_limit"}
        return Answer(_reason(error), failure=failures.get(status, "server_error" if status >= 500 else "refused"))


@final
class Pace:
    """Requests begin at equal distances, however many threads make them."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic):
        self._distance = 60 / per_minute if per_minute else 0.0
        self._clock, self._lock = clock, threading.Lock()
        self._next = 0.0

    def reserve(self) -> float:
        """Seconds to wait before the next request may begin."""
        with self._lock:
            now = self._clock()
            begin = max(now, self._next)
            self._next = begin + self._distance
            return begin - now

    def wait(self, stop: threading.Event) -> None:
        seconds = self.reserve()
        if seconds > 0:
            stop.wait(seconds)


@final
class _Pictures:
    """Pictures as data URLs; each picture of a call is encoded once."""

    def __init__(self, image_format: str):
        self._format = image_format
        self._urls: dict[int, str] = {}
        self._lock = threading.Lock()

    def url(self, image: Image) -> str:
        with self._lock:
            if id(image) not in self._urls:
                buffer = io.BytesIO()
                if self._format == "png":
                    image.save(buffer, "PNG")
                else:
                    image.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
                kind = {"png": "png", "jpg": "jpeg"}[self._format]
                content = base64.b64encode(buffer.getvalue()).decode()
                self._urls[id(image)] = f"data:image/{kind};base64,{content}"
            return self._urls[id(image)]


def _client(settings: EndpointSettings) -> tuple[Any, str]:
    """The client and the address that messages show."""
    try:
        import openai
        import tenacity  # noqa: F401
    except ImportError as error:
        raise ValueError(f"a judge behind an endpoint needs {error.name}: pip install 'mmalign[judge]'") from None
    address = settings.base_url or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_BASE") or None
    key = os.environ.get("OPENAI_API_KEY")
    if not key and address is None:
        raise ValueError(
            "no endpoint for the judge: set base_url or OPENAI_BASE_URL to the address of a server, and OPENAI_API_KEY "
            "where it wants one"
        )
    # Servers of one's own want no key, the client insists on one.
    client = openai.OpenAI(base_url=address, api_key=key or "none", timeout=settings.timeout, max_retries=0)
    return client, f"{client.base_url.scheme}://{client.base_url.netloc.decode().rpartition('@')[2]}"


def _messages(question: Prompt, pictures: _Pictures) -> list[dict[str, Any]]:
    if not isinstance(question.text, str):
        raise ValueError(f"a judge is asked in plain text, got a {type(question.text).__name__}")
    if not question.images:
        return [{"role": "user", "content": question.text}]
    parts = [{"type": "image_url", "image_url": {"url": pictures.url(image)}} for image in question.images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}]


def _read(response: Any) -> Answer:
    choices = getattr(response, "choices", None)  # a page of a proxy comes as text
    if not choices or choices[0].message is None:
        return Answer("no choices", failure=GARBAGE)
    return Answer(choices[0].message.content or "", _first_options(choices[0].logprobs))


def _first_options(log_probs: Any) -> dict[str, float] | None:
    """The alternatives of the first token that is more than white space."""
    for token in (log_probs and log_probs.content) or []:
        if token.token.strip(" \t\r\n▁ĠĊ"):
            options = {token.token: token.logprob}
            return options | {other.token: other.logprob for other in token.top_logprobs or []}
    return None


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    import openai

    passing = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError, openai.ConflictError)
    if isinstance(error, openai.APIStatusError) and error.status_code == 408:
        return True
    return isinstance(error, passing) and not _is_out_of_quota(error)


def _is_out_of_quota(error: Any) -> bool:
    return getattr(error, "status_code", None) == 429 and getattr(error, "code", None) == "insufficient_quota"


def _retry_after(error: Any) -> float:
    response = getattr(error, "response", None)
    try:
        return float(response.headers.get("retry-after", 0)) if response is not None else 0.0
    except ValueError:
        return 0.0  # a date: the own pauses serve as well


def _refused_option(error: Any) -> str | None:
    """The option that the server says it does not support; None where it complains of something else."""
    if error.status_code not in (400, 403, 404, 422):
        return None
    message = _reason(error).lower()
    if "logprob" in message:
        return "log_probs"
    if "support" not in message and "unexpected" not in message:
        return None
    return next((name for name in ("max_tokens", "temperature") if name in message), None)


def _reason(error: Any) -> str:
    return " ".join(str(error).split())[:300]
