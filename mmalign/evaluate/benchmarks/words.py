"""Finding the objects of COCO's 80 classes in a caption, by words alone.

The list of words comes from a file, a class a line, its name first: synonyms.txt of the CHAIR authors. Two ways to read
it are here, since published numbers come from both: `official`, with all oddities of the script that made the numbers,
and `cleaned`, as Object HalBench reads its list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from mmalign.evaluate.benchmarks.files import BenchmarkFiles, paths

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# A full stop is a word of its own at the end of a sentence alone, a comma or colon unless a digit follows.
_MARKS = re.compile(r"\.{2,}|\.(?=[\])}>\"'»”’ ]*$)|[;@#$%&?!()\[\]{}<>\"“”«»]|--|[:,](?!\d)")
_ENDINGS = re.compile(r"(?<=[^' ])('(?:s|m|d|ll|re|ve)|n't|')(?= )")

# Pairs of words that count as one; the official list.
PAIRS = (
    *("motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light"),
    *("fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove"),
    *("tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier"),
    *("potted plant", "bow tie", "laptop computer", "stove top oven", "home plate", "train track"),
)
# "baby" and "adult" before an animal, and "passenger" before a vehicle, speak of no person.
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
VEHICLES = ("jet", "train")
# what a pair counts as, where that is not the pair itself
SPECIAL = {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}

_IRREGULAR = {
    "people": "person",
    "children": "child",
    "men": "man",
    "geese": "goose",
    "oxen": "ox",
    "mice": "mouse",
    "knives": "knife",
    "calves": "calf",
}
# what the official singulariser leaves alone
_UNCHANGED = {"scissors", "doggies", "collies", "bison", "luggage"}
_RULES = (
    (re.compile(r"(x|ch|ss|sh|o)es$"), r"\1"),
    (re.compile(r"buses$"), "bus"),
    (re.compile(r"([^aeiouy]|qu)ies$"), r"\1y"),
    (re.compile(r"s$"), ""),
)


@dataclass(frozen=True)
class Mention:
    """A word of the caption, and the class that it stands for."""

    word: str
    object: str


def tokens(caption: str) -> list[str]:
    """Lower-case words and marks, sentence by sentence, in the manner of the Penn Treebank."""
    found = []
    for sentence in _SENTENCE_END.split(caption.lower().strip()):
        spaced = _MARKS.sub(r" \g<0> ", sentence)
        found += _ENDINGS.sub(r" \1", f" {spaced} ").split()
    return found


def official_singular(word: str) -> str:
    """The singular as the official script finds it. It takes the s of `bus` for a plural and makes `ty` of `ties`, so
    that these words are never found; `canoes` fares no better."""
    if word in _UNCHANGED:
        return word
    for plural, singular in _IRREGULAR.items():
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    if word.endswith("shoes"):
        return word.removesuffix("s")
    for ending, replacement in _RULES:
        if ending.search(word):
            return ending.sub(replacement, word)
    return word


def singular_in(vocabulary: Iterable[str]) -> Callable[[str], str]:
    """The singular of a word, where the vocabulary holds it; other words stay."""
    known = frozenset(vocabulary)

    def singular(word: str) -> str:
        return next((form for form in _forms(word) if form in known), word)

    return singular


def _forms(word: str) -> Iterable[str]:
    """The word, and what it may be the plural of."""
    yield word
    for plural, singular in _IRREGULAR.items():
        if word.endswith(plural):
            yield word.removesuffix(plural) + singular
    for ending, replacements in (("ies", ("y", "ie")), ("ves", ("f", "fe")), ("es", ("",)), ("s", ("",))):
        if word.endswith(ending):
            yield from (word.removesuffix(ending) + replacement for replacement in replacements)


@final
class ObjectWords:
    """Reads captions with a list of classes and their words."""

    def __init__(self, classes: Sequence[Sequence[str]], pairs: dict[str, str], singular: Callable[[str], str]):
        self.object_of = {word: words[0] for words in classes for word in words}
        self._pairs, self._singular = pairs, singular

    @staticmethod
    def official(lines: Sequence[str]) -> ObjectWords:
        """As the CHAIR script reads the list. Two names keep a space before them, for lack of one in the separator, and
        one name has three words: these are never found. Nor is iPhone, as captions are lower-cased."""
        return ObjectWords([line.strip().split(", ") for line in lines], _pairs(PAIRS), official_singular)

    @staticmethod
    def cleaned(lines: Sequence[str]) -> ObjectWords:
        """Spaces around names do not count, and every name of two words is a pair."""
        classes = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
        names = [name for words in classes for name in words]
        pairs = _pairs([*(name for name in names if " " in name), "home plate", "train track"])
        known = {part for name in [*names, *pairs] for part in name.split()}
        return ObjectWords(classes, pairs, singular_in(known))

    def mentions(self, caption: str) -> list[Mention]:
        """The objects of a caption, each as often as it is named."""
        merged = self.merged(caption)
        # the seat of a toilet is no chair
        if "toilet" in merged and "seat" in merged:
            merged = [word for word in merged if word != "seat"]
        return [Mention(word, self.object_of[word]) for word in merged if word in self.object_of]

    def pairs(self, phrase: str) -> list[str]:
        """The pairs of words in a phrase that count as one."""
        return [word for word in self.merged(phrase) if word in self._pairs.values() and " " in word]

    def merged(self, caption: str) -> list[str]:
        """The words and marks of a caption in the singular, pairs as one."""
        singular = [self._singular(word) for word in tokens(caption)]
        found, place = [], 0
        while place < len(singular):
            pair = " ".join(singular[place : place + 2])
            one = pair in self._pairs
            found.append(self._pairs[pair] if one else singular[place])
            place += 2 if one else 1
        return found


def _pairs(names: Iterable[str]) -> dict[str, str]:
    found = {name: name for name in names}
    found |= {f"{age} {animal}": animal for animal in ANIMALS for age in ("baby", "adult")}
    found |= {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
    return found | SPECIAL


def read_synonyms(files: BenchmarkFiles) -> list[str]:
    """The lines of `benchmark.synonyms`."""
    if files.synonyms is None:
        raise ValueError(
            f"benchmark.synonyms is not set; {files.name} needs the words of COCO's 80 classes: data/synonyms.txt of "
            "github.com/LisaAnne/Hallucination, or eval/data/synonyms_refine.txt of github.com/RLHF-V/RLAIF-V"
        )
    path: Path = paths(files.synonyms, "synonyms", "*.txt")[0]
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) != 80 or not lines[0].startswith("person"):
        raise ValueError(
            f"benchmark.synonyms: {path} has {len(lines)} lines and begins with {lines[0][:40] if lines else ''!r}; "
            "expected 80 classes, a line each, the first being person"
        )
    return lines
