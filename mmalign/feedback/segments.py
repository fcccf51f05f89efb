"""Where a text is cut into segments, the units that fine-grained feedback labels (arXiv 2404.05046).

A segment is a sentence. Within a sentence of many words there is a cut after a word that ends in one of `,;!?`, once
at least 5 words have gathered and more than 5 remain; a later run of fewer words joins the segment before it.

A sentence ends after `.`, `!` or `?`, closing quotes and brackets included, and at a line break. It does not end after
an abbreviation on the list (Dr., e.g.), an initial (J.) or a number that opens a line (a list), nor after `...`, `!`,
`?`, `etc.` or `a.m.` where a small letter follows. Chinese and Japanese full stops need no space after them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

LEAST_WORDS = 5

_WORD = re.compile(r"[^\s。！？]*[。！？]+|[^\s。！？]+")
_CLOSING = "\"')]}»”’*_"
_OPENING = "\"'([{«“‘*_"
# words before a full stop that ends no sentence; "no." and "Inc." are left out, for they also end some
_ABBREVIATIONS = ("mr", "mrs", "ms", "dr", "prof", "st", "mt", "vs", "approx", "fig", "figs", "vol", "ca", "cf", "al")
_NEVER_ENDS = re.compile(rf"(?:{'|'.join(_ABBREVIATIONS)}|e\.g|i\.e|[a-z])\.", re.IGNORECASE)
_LIST_NUMBER = re.compile(r"\d{1,3}\.")
# what ends a sentence only where no small letter follows: dots in a row, ! and ?, etc., a.m.
_SOFT_END = re.compile(r".*(?:\.\.|…|[!?]|etc\.|[a-z]\.[a-z]\.)", re.IGNORECASE)


def segments(text: str) -> list[tuple[int, int]]:
    """(start, end) of each segment in characters: they follow one another from 0 to len(text).

    White space belongs to the segment that follows it, as the tokens of most vocabularies have it; at the end of the
    text, to the last one. A text without a word has no segments.
    """
    words = [(match.start(), match.end()) for match in _WORD.finditer(text)]
    if not words:
        return []
    firsts = {first for sentence in _sentences(text, words) for first in _cuts(text, sentence)}
    ends = [end for (_, end), (start, _) in pairwise(words) if start in firsts] + [len(text)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _sentences(text: str, words: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    sentences = [[words[0]]]
    for before, word in pairwise(words):
        if _ends_sentence(text, before, word):
            sentences.append([])
        sentences[-1].append(word)
    return sentences


def _ends_sentence(text: str, word: tuple[int, int], following: tuple[int, int]) -> bool:
    if "\n" in text[word[1] : following[0]]:
        return True
    bare = text[slice(*word)].rstrip(_CLOSING).lstrip(_OPENING)
    if bare.endswith(("。", "！", "？")):
        return True
    if not bare.endswith((".", "!", "?", "…")):
        return False
    opens_line = not text[text.rfind("\n", 0, word[0]) + 1 : word[0]].strip()
    if _NEVER_ENDS.fullmatch(bare) or (opens_line and _LIST_NUMBER.fullmatch(bare)):
        return False
    small = text[slice(*following)].lstrip(_OPENING)[:1].islower()
    return not (small and _SOFT_END.fullmatch(bare))


def _cuts(text: str, sentence: Sequence[tuple[int, int]]) -> list[int]:
    """Where the segments of a sentence begin: the first characters of their first words."""
    firsts = [0]
    for place in range(1, len(sentence)):
        if text[sentence[place - 1][1] - 1] not in ",;!?" or len(sentence) - place <= LEAST_WORDS:
            continue
        if place - firsts[-1] >= LEAST_WORDS:
            firsts.append(place)
        elif len(firsts) > 1:
            # What has gathered since the last cut is too short to stand alone: it joins the segment before.
            firsts[-1] = place
    return [sentence[first][0] for first in firsts]
