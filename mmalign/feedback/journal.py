"""Every answer of a judge, kept as it came: a run that was killed, or that lost its endpoint, asks only the rest.

A journal is a folder of JSON Lines files, one for each process that writes. A line holds the question (its text, and
hashes of its pictures), the raw answer, the judge, the hash of the prompt template and the date. Lines are only ever
appended, and each is flushed at once; a line that was cut short by a crash is asked again. Failures are not kept. No
line holds an address or a key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from mmalign.core.types import Prompt
from mmalign.feedback.judges import Answer, Judge

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class Journal:
    """The answers in `folder`, by key, and the file in it that this process appends to."""

    def __init__(self, folder: str | Path, writer: int = 0):
        self.folder = Path(folder)
        self._path = self.folder / f"{writer:05d}.jsonl"
        self._answers: dict[str, Answer] = {}
        self._written = False
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open(encoding="utf-8", errors="replace") as lines:
                self._answers.update(found for line in lines if (found := _read(line)) is not None)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def add(self, key: str, answer: Answer, about: Mapping[str, Any]) -> None:
        """Appends a line. `about` is what else it says."""
        self._answers[key] = answer
        line = {"key": key, **about, "answer": answer.text, "options": answer.options}
        line["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            if not self._written and file.tell():
                # A crash may have cut the last line short.
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read() == b"\n" else b"\n")
            file.write(json.dumps(line).encode() + b"\n")
        self._written = True


def _read(line: str) -> tuple[str, Answer] | None:
    try:
        entry = json.loads(line)
        return entry["key"], Answer(entry["answer"], entry["options"])
    except (ValueError, KeyError, TypeError):
        return None


@final
class Journalled:
    """A judge whose answers are kept: it is asked only what the journal does not hold, and each question once."""

    def __init__(self, judge: Judge, journal: Journal, prompt_hash: str):
        self._judge, self._journal, self._prompt_hash = judge, journal, prompt_hash
        self.asked = 0

    @property
    def name(self) -> str:
        return self._judge.name

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._judge.identity

    def cautions(self) -> list[str]:
        return self._judge.cautions()

    def ask(self, questions: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """Raises what the judge raises; a ConnectionError then says where the answers are."""
        places: dict[str, list[int]] = {}
        new: dict[str, Prompt] = {}
        pictures = _Pictures()
        for place, question in enumerate(questions):
            key = _key(self.identity, question, pictures)
            places.setdefault(key, []).append(place)
            kept = self._journal.get(key)
            if kept is None:
                new[key] = question
            else:
                yield place, kept
        keys = list(new)
        try:
            for index, answer in self._judge.ask(list(new.values())):
                self.asked += 1
                if answer.failure is None:
                    self._journal.add(keys[index], answer, self._about(new[keys[index]], pictures))
                for place in places[keys[index]]:
                    yield place, answer
        except ConnectionError as error:
            raise type(error)(
                f"{error}\n{len(self._journal)} answers are kept in {self._journal.folder}; "
                "give the same command again to ask the rest"
            ) from None

    def _about(self, question: Prompt, pictures: _Pictures) -> dict[str, Any]:
        about = {"judge": self.name, "prompt_hash": self._prompt_hash, "question": question.text}
        return {**about, "images": [pictures.hash(image) for image in question.images]}


class _Pictures:
    """Hashes of pictures; each picture of a call is hashed once, however many questions are about it."""

    def __init__(self):
        self._hashes: dict[int, tuple[Image, str]] = {}

    def hash(self, image: Image) -> str:
        if id(image) not in self._hashes:
            content = f"{image.mode} {image.size} ".encode() + image.tobytes()
            # The picture is held on to, so that its id stays its own.
            self._hashes[id(image)] = (image, hashlib.sha256(content).hexdigest()[:16])
        return self._hashes[id(image)][1]


def _key(identity: Mapping[str, Any], question: Prompt, pictures: _Pictures) -> str:
    parts = [identity, question.text, [pictures.hash(image) for image in question.images]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
