"""Judges answer questions about texts and pictures; here is what they are asked, and how an answer is read.

An answer is read strictly. Yes or no is decided by P(yes) against P(no) where the judge gives them, else by the first
word; anything else decides nothing. Nothing here guesses.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from mmalign.core.types import Prompt

_FIRST_WORD = re.compile(r"[\W_]*(yes|no)\b", re.IGNORECASE)
# marks of a word's beginning in vocabularies that a server may show as they are
_WORD_MARKS = " \t\r\n▁Ġ*\"'"


@dataclass(frozen=True)
class Answer:
    """What a judge said. `options`: log-probs of words that the answer might have begun with, where it tells them.

    `failure` says in a word why there is no answer (timeout, refused, server_error), and `text` then more; None for an
    answer.
    """

    text: str
    options: Mapping[str, float] | None = None
    failure: str | None = None


class Judge(Protocol):
    """Answers questions. `name` is what records call it; `identity` is what decides its answers beside the question."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def ask(self, questions: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """(place of the question, answer) for each question, as they come. What came before an error is good."""
        ...

    def cautions(self) -> list[str]:
        """What a reader of its answers should know, in plain sentences."""
        ...


def answers(judge: Judge, questions: Sequence[Prompt]) -> list[Answer]:
    """One answer per question, in their order."""
    found = dict(judge.ask(questions))
    return [found[place] for place in range(len(questions))]


def says_yes(answer: Answer) -> bool | None:
    """True for yes, False for no, None where the answer decides neither."""
    yes, no = probability_of("yes", answer), probability_of("no", answer)
    if yes or no:
        return None if yes == no else yes > no
    word = _FIRST_WORD.match(answer.text)
    return None if word is None else word[1].lower() == "yes"


def probability_of(word: str, answer: Answer) -> float:
    """How likely the answer was to begin with `word`, in any writing; 0 where the judge does not say."""
    options = answer.options or {}
    return sum(math.exp(value) for option, value in options.items() if _plain(option) == word)


def _plain(option: str) -> str:
    return option.strip(_WORD_MARKS).rstrip(".,!").lower()


@dataclass(frozen=True)
class Template:
    """A question with places to fill, {like_this}. `hash` tells versions of it apart."""

    text: str

    @staticmethod
    def read(path: str | None, default: str, places: Sequence[str]) -> Template:
        """The file at `path`; None: the one that ships under the name `default`. Raises where a place is missing."""
        if path is None:
            text = (resources.files("mmalign.feedback") / "prompts" / f"{default}.txt").read_text(encoding="utf-8")
        else:
            text = Path(path).read_text(encoding="utf-8")
        missing = [place for place in places if f"{{{place}}}" not in text]
        if missing:
            raise ValueError(f"{path} does not hold {{{missing[0]}}}; the {default} prompt needs a place to put it")
        return Template(text.strip())

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def fill(self, **places: str) -> str:
        """The question. What is filled in may hold braces itself: all places are filled at once."""
        return re.sub(r"\{(\w+)\}", lambda match: places.get(match[1], match[0]), self.text)
