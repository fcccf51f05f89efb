"""Where a text is cut: sentences, and within long ones the rule of five words."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.feedback import segments
from mmalign.world.description import parse_description
from mmalign.world.writing import described_scenes, text_of


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in segments(text)]


def words(count: int, last: str = "") -> str:
    return " ".join(["w"] * count) + last


def test_sentences_are_segments_and_white_space_goes_to_the_next():
    assert cut("A dog runs. It is brown!  Is it?\nYes.") == ["A dog runs.", " It is brown!", "  Is it?", "\nYes."]


def test_a_cut_needs_five_words_before_it_and_six_after_it():
    # 5 words and the mark, 6 remain: more than 5
    assert cut(f"{words(5, ',')} {words(6)}.") == [words(5, ","), f" {words(6)}."]
    # 5 remain: not more than 5
    assert len(cut(f"{words(5, ',')} {words(5)}.")) == 1
    # only 4 have gathered, and there is no segment before that they could join
    assert len(cut(f"{words(4, ',')} {words(9)}.")) == 1


@pytest.mark.parametrize("mark", [",", ";", "!", "?"])
def test_every_mark_of_the_rule_cuts_and_no_other(mark):
    assert len(cut(f"{words(5, mark)} {words(6)}.")) == 2
    for other in (":", " -", ")", "'"):
        assert len(cut(f"{words(5, other)} {words(6)}.")) == 1


def test_a_short_later_run_merges_back():
    # 5 words | 2 words: too short, they join the first segment, and the next one begins after them | 6 words.
    text = f"{words(5, ',')} {words(2, ',')} {words(6)}."
    assert cut(text) == [f"{words(5, ',')} {words(2, ',')}", f" {words(6)}."]
    # Two short runs one after the other: both join.
    text = f"{words(5, ',')} {words(2, ',')} {words(2, ',')} {words(6)}."
    assert cut(text) == [f"{words(5, ',')} {words(2, ',')} {words(2, ',')}", f" {words(6)}."]
    # A short first run has nothing to join: it gathers on, 4 + 2 words, until the next mark.
    text = f"{words(4, ',')} {words(2, ',')} {words(6)}."
    assert cut(text) == [f"{words(4, ',')} {words(2, ',')}", f" {words(6)}."]
    # The last short run lies where no more than 5 words remain: no mark there is looked at.
    text = f"{words(5, ',')} {words(5, ',')} {words(2)}."
    assert cut(text) == [words(5, ","), f" {words(5, ',')} {words(2)}."]


def test_the_rule_counts_within_a_sentence():
    # Five words before the comma, but of two sentences.
    assert cut(f"One two. Three four five, {words(6)}.") == ["One two.", f" Three four five, {words(6)}."]


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith and Mrs. Jones stand at approx. 3.5 m, e.g. near J. Doe.",
        "Wait... what a dog",
        'A sign that says "Stop!" hangs there.',
        "Dogs, cats, etc. are there.",
        "It is 5 a.m. in the picture.",
        "1. A dog.",
    ],
)
def test_what_ends_no_sentence(text):
    assert cut(text) == [text]


def test_what_ends_one():
    assert cut('He says "Stop." Then (as usual.) "Go!" A dog runs at 5 a.m. Cats, etc. The end...') == [
        'He says "Stop."',
        " Then (as usual.)",
        ' "Go!"',
        " A dog runs at 5 a.m.",
        " Cats, etc.",
        " The end...",
    ]
    assert cut("no capital. here either") == ["no capital.", " here either"]
    assert cut("Is there one? No. There is none.") == ["Is there one?", " No.", " There is none."]
    assert cut("一只狗。一只猫！好") == ["一只狗。", "一只猫！", "好"]
    assert cut("Things:\n1. A dog.\n2. A cat.\n- a hat") == ["Things:", "\n1. A dog.", "\n2. A cat.", "\n- a hat"]


def test_a_text_without_a_word_has_no_segments():
    assert segments("") == segments(" \n\t") == []
    assert segments("  hi ") == [(0, 5)]


@settings(deadline=None)
@given(st.text(alphabet=" \nab.,;!?\"'A1。", max_size=80) | st.text(max_size=40))
def test_segments_tile_the_text_and_each_holds_a_word(text):
    spans = segments(text)
    assert (not spans) == (not text.strip())
    for start, end in spans:
        assert text[start:end].strip()
    if spans:
        assert spans[0][0] == 0
        assert spans[-1][1] == len(text)
        assert all(one[1] == two[0] for one, two in zip(spans, spans[1:], strict=False))
        # but for the last segment, white space comes before words, never after them
        assert all(not text[end - 1].isspace() for _, end in spans[:-1])


def test_sentences_of_the_world_are_segments():
    generator = described_scenes(0, "train")
    for _ in range(20):
        text = text_of(next(generator)[1])
        assert [part.strip() for part in cut(text)] == [statement.text for statement in parse_description(text)]
