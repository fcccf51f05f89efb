"""Hallucination benchmarks: published numbers from real answers, where the files are there, and rules by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmalign.evaluate.benchmarks import amber, coco, hallusionbench, mmhal, object_halbench, pope, words
from mmalign.evaluate.benchmarks.files import BenchmarkFiles, JudgeReplies
from mmalign.evaluate.benchmarks.scores import Part, Score
from mmalign.evaluate.benchmarks.words import ObjectWords
from mmalign.evaluate.hallucination import BENCHMARKS, answer_files, read_answers

FIXTURES = Path(__file__).parent.parent.parent / "shared" / "fixtures"
JUDGE = JudgeReplies(name="a judge", date="2024-05-01")


def fixture(*names: str) -> list[str]:
    """The paths of fixtures; the test is skipped where one is absent."""
    paths = [FIXTURES / name for name in names]
    for path in paths:
        if not path.exists():
            pytest.skip(f"no fixture {path}")
    return [str(path) for path in paths]


def scored(files: BenchmarkFiles) -> Score:
    """The score of the one model in `files.answers`."""
    benchmark = BENCHMARKS[files.name]
    ((name, paths),) = answer_files(files).items()
    return benchmark.score(files, benchmark.load(files), read_answers(name, paths))


def values(part: Part, decimals: int = 1) -> dict[str, float | None]:
    return {
        name: None if number.value is None else round(number.value, decimals) for name, number in part.numbers.items()
    }


def write(path: Path, rows: Any) -> str:
    path.write_text(json.dumps(rows) if not isinstance(rows, str) else rows)
    return str(path)


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# -- POPE --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llava() -> BenchmarkFiles:
    answers, labels, questions = fixture(
        "pope_llava15_13b/llava-v1.5-13b.jsonl", "pope_coco/e3e3926", "pope_coco/llava_pope_test.jsonl"
    )
    return BenchmarkFiles(name="pope", answers=answers, annotations=labels, questions=questions)


def test_pope_of_llava_15_13b_is_as_published(llava):
    (expected,) = fixture("pope_llava15_13b/EXPECTED.json")
    parts = {part.name: part for part in scored(llava).parts}
    for name, known in json.loads(Path(expected).read_text()).items():
        if name not in ("random", "popular", "adversarial"):
            continue
        assert parts[name].counts == {key: known[key] for key in ("TP", "FP", "TN", "FN")}
        assert parts[name].items == known["n"]
        for number, key in (
            ("F1", "f1"),
            ("accuracy", "acc"),
            ("precision", "prec"),
            ("recall", "rec"),
            ("yes ratio", "yes"),
        ):
            assert parts[name].numbers[number].value == pytest.approx(100 * known[key])
    assert [str(parts[name].numbers["F1"]) for name in ("random", "popular", "adversarial")] == ["87.1", "86.2", "84.5"]
    assert parts["mean"].numbers["F1"].value == pytest.approx(85.94688, abs=1e-5)  # MODEL_ZOO: 85.9


def test_pope_labels_of_another_release_are_refused(llava):
    (main,) = fixture("pope_coco/main/coco_pope_random.json")
    with pytest.raises(ValueError, match="2,910 questions.*3,000 labels.*different releases"):
        scored(BenchmarkFiles(name="pope", answers=llava.answers, annotations=main, questions=llava.questions))


def test_pope_release_of_3000_rows_is_scored_by_order_too(tmp_path):
    (main,) = fixture("pope_coco/main/coco_pope_random.json")
    labels = [json.loads(line) for line in Path(main).read_text().splitlines()]
    # Right but for the first 30, which all say yes: TP 1500, FP as many as of these have the label no.
    wrong = sum(row["label"] == "no" for row in labels[:30])
    said = ["Yes." if place < 30 or row["label"] == "yes" else "No, there is not." for place, row in enumerate(labels)]
    answers = lines(
        tmp_path / "a.jsonl",
        [{"question": row["text"], "answer": text} for row, text in zip(labels, said, strict=True)],
    )
    (part,) = scored(BenchmarkFiles(name="pope", answers=answers, annotations=main)).parts
    assert part.counts == {"TP": 1500, "FP": wrong, "TN": 1500 - wrong, "FN": 0}
    assert part.numbers["yes ratio"].value == pytest.approx(100 * (1500 + wrong) / 3000)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("no", False),
        ("No, there is none", False),
        ("There is not", False),
        ("I cannot tell", True),  # neither: counts as yes
        ("NO", True),  # not one of the three spellings
        ("Yes. But no dog", True),  # cut at the first full stop
        ("Nothing", True),
        ("no\n", True),  # split at spaces alone
    ],
)
def test_pope_reads_an_answer_as_the_official_script_does(answer, yes):
    assert pope.says_yes(answer) is yes


LABELS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a cat in the imange?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "no"},
    {"question_id": 3, "image": "b.jpg", "text": "Is there a cup in the image?", "label": "yes"},
]


@pytest.fixture
def small(tmp_path) -> Path:
    lines(tmp_path / "coco_pope_random.json", LABELS)
    lines(tmp_path / "coco_pope_popular.json", LABELS[:2])
    return tmp_path


def test_pope_pairs_by_question_id_in_any_order(small):
    # 1 and 3 are yes, 2 is no: TP 1 (cup), FN 1 (cat), TN 1 -> precision 1, recall 1/2, F1 2/3, accuracy 2/3
    rows = [{"question_id": 3, "text": "Yes"}, {"question_id": 1, "text": "No"}, {"question_id": 2, "text": "No"}]
    answers = lines(small / "answers.jsonl", rows)
    (part,) = scored(
        BenchmarkFiles(name="pope", answers=answers, annotations=str(small / "coco_pope_random.json"))
    ).parts
    assert values(part) == {"F1": 66.7, "accuracy": 66.7, "precision": 100.0, "recall": 50.0, "yes ratio": 33.3}


def test_pope_takes_a_file_for_each_category_and_means_over_them(small):
    good = [{"question_id": 1, "text": "Yes"}, {"question_id": 2, "text": "No"}]
    popular, random = (
        lines(small / "x_popular.jsonl", good),
        lines(small / "x_random.jsonl", [*good, {"question_id": 3, "text": "No"}]),
    )
    files = BenchmarkFiles(name="pope", answers=[popular, random], annotations=str(small))
    parts = scored(files).parts
    # random: TP 1, FN 1 -> F1 2/3; popular: all right
    assert [part.name for part in parts] == ["random", "popular", "mean"]
    assert [round(part.numbers["F1"].value or 0, 2) for part in parts] == [66.67, 100.0, 83.33]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "text": "Yes"}], "2 of 3 questions have no answer: 2, 3"),
        ([{"question_id": n, "text": "Yes"} for n in (1, 2, 3, 77)], "1 answers fit no question: 77"),
        ([{"question_id": 1, "text": "Yes"}, {"question_id": 1, "text": "No"}], "question_id 1 is answered twice"),
        ([{"text": "Yes"}], "1 answers without question_id for 3 labels"),
        (LABELS, "is answered by itself; is this a file of questions"),
        (
            [{"question_id": n, "reply": "Yes"} for n in (1, 2, 3)],
            "none of the fields answer, .*benchmark.answer_field",
        ),
        (
            [{"question": LABELS[place]["text"], "answer": "Yes"} for place in (1, 0, 2)],
            "row 1 is about 'Is there a dog in the image\\?', its label about 'Is there a cat",
        ),
        ([{"image": "b.jpg", "text": "Yes"}] * 3, "row 1 is about b.jpg, its label about a.jpg"),
    ],
)
def test_pope_refuses_answers_that_do_not_fit(small, rows, message):
    answers = lines(small / "answers.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        scored(BenchmarkFiles(name="pope", answers=answers, annotations=str(small / "coco_pope_random.json")))


def test_partial_scores_what_is_there_and_says_so(small):
    answers = lines(small / "answers.jsonl", [{"question_id": 1, "text": "Yes"}])
    files = BenchmarkFiles(name="pope", answers=answers, annotations=str(small / "coco_pope_random.json"), partial=True)
    score = scored(files)
    assert score.parts[0].items == 1
    assert score.notes == ["2 of 3 questions have no answer and are left out"]
    assert score.parts[0].numbers["recall"].value == 100.0


# -- CHAIR -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("Instruction1_instructblip", "pope_caption_data/Instruction1_instructblip.json"),
        ("Instruction2_llava", "pope_caption_data/Instruction2_llava.json"),
        ("opera_llava15_greedy", "opera_llava15_greedy.jsonl"),
    ],
)
def test_chair_of_real_captions_is_as_published(name, path):
    answers, truth, synonyms, expected = (
        f"chair_coco/{one}" for one in (path, "gt_objects.json", "synonyms.txt", "EXPECTED.json")
    )
    answers, truth, synonyms, expected = fixture(answers, truth, synonyms, expected)
    known = json.loads(Path(expected).read_text())["rows"][name]
    (part,) = scored(BenchmarkFiles(name="chair", answers=answers, annotations=truth, synonyms=synonyms)).parts
    assert list(part.counts.values()) == [known["n"], known["h"], known["cw"], known["hw"]]
    found = {key: part.numbers[key].value or 0.0 for key in ("CHAIR_s", "CHAIR_i", "Recall", "Len")}
    assert found["CHAIR_s"] == pytest.approx(known["CHAIRs"], abs=0.006)
    assert found["CHAIR_i"] == pytest.approx(known["CHAIRi"], abs=0.006)
    assert found["Recall"] == pytest.approx(known["Recall"], abs=0.006)
    assert found["Len"] == pytest.approx(known["Len"], abs=0.06)
    if "opera" not in name:  # whose own numbers are by another rule
        assert found["CHAIR_s"] == pytest.approx(known["published_CHAIRs"], abs=0.1)
        assert found["CHAIR_i"] == pytest.approx(known["published_CHAIRi"], abs=0.1)


def test_truth_from_raw_coco_files_is_that_of_the_reference():
    instances, captions, expected, synonyms = fixture(
        "coco_mini/instances_val2017.json",
        "coco_mini/captions_val2017.json",
        "coco_mini/expected_gt_objects.json",
        "chair_coco/synonyms.txt",
    )
    known = json.loads(Path(expected).read_text())
    files = BenchmarkFiles(name="chair", annotations=[instances, captions], synonyms=synonyms)
    found = coco.ground_truth(files, ObjectWords.official(words.read_synonyms(files)), [int(name) for name in known])
    assert {str(number): sorted(names) for number, names in found.items()} == known
    assert len(found) == 79


# Four classes as the official list writes them, with its odd spaces.
SYNONYMS = [
    "person, man, woman, people",
    "motorcycle, scooter,  motor bike, motorbike",
    "cow, calf, bull, bison ",
    "cell phone, mobile phone, phone, iPhone",
    "wine glass",
    "bus, minibus",
    "toilet, toilet",
    "chair, seat",
    "tie, bow tie",
    "oven, stove top oven",
    "bird, goose",
    "train",
]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("Two men and a woman; people.", ["person"] * 3),
        ("A baby bird sits, an adult cow stands.", ["bird", "cow"]),
        ("Geese and calves", ["bird", "cow"]),
        ("A passenger train's mobile phones.", ["train", "cell phone"]),
        ("a wine glass, wine glasses", ["wine glass", "wine glass"]),
        ("The seat of the toilet.", ["toilet"]),
        ("A toilet seat", ["toilet"]),
        ("a bow tie", ["tie"]),
        ("A train.The seat", ["chair"]),  # no space after the full stop: one word, as in the official script
        ("a man/woman on a motor bike", []),  # neither the slash nor the pair with its odd space is found
        ("a bus, two ties, an iPhone, a stove top oven", ["oven"]),  # of these the official script finds an oven
        ("buses and minibuses", ["bus", "bus"]),
    ],
)
def test_chair_finds_words_as_the_official_script_does(caption, found):
    assert [mention.object for mention in ObjectWords.official(SYNONYMS).mentions(caption)] == found


def test_cleaned_list_finds_what_the_official_script_loses():
    found = ObjectWords.cleaned(SYNONYMS).mentions("a bus, two ties, a motor bike, bison and a glass")
    assert [mention.object for mention in found] == ["bus", "tie", "motorcycle", "cow"]


@pytest.fixture
def captions(tmp_path) -> BenchmarkFiles:
    # CHAIR's list must have 80 classes; here 68 of them stand for nothing.
    synonyms = write(tmp_path / "synonyms.txt", "\n".join(SYNONYMS + [f"class{n}" for n in range(68)]))
    truth = write(tmp_path / "truth.json", {"7": ["person", "bus"], "12": ["cow"]})
    rows = [
        {"image_id": 7, "caption": "A man and a woman look at a cow and a bird."},
        {"image": "COCO_val2014_000000000012.jpg", "caption": "Cows."},
    ]
    answers = lines(tmp_path / "captions.jsonl", rows)
    return BenchmarkFiles(name="chair", answers=answers, annotations=truth, synonyms=synonyms)


def test_chair_by_hand(captions):
    # 5 mentions: man, woman, cow, bird | cow. cow and bird are not in picture 7. Shown and named: person | cow, of 3.
    (part,) = scored(captions).parts
    assert part.counts == {"captions": 2, "with hallucination": 1, "mentions": 5, "hallucinated": 2}
    # words and marks: a man and a woman look at a cow and a bird . = 13, cows . = 2
    assert values(part) == {"CHAIR_s": 50.0, "CHAIR_i": 40.0, "Recall": 66.7, "Len": 7.5, "Words": 6.5}


def test_chair_refuses_what_would_change_its_meaning(captions, tmp_path):
    def changed(**keys: Any) -> BenchmarkFiles:
        return BenchmarkFiles(**{**vars(captions), **keys})

    instances = {
        "images": [],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [{"image_id": 7, "category_id": 1}],
    }
    cases = [
        ({"annotations": write(tmp_path / "i.json", instances)}, "instances, but no captions"),
        ({"annotations": write(tmp_path / "t.json", {"7": ["person"]})}, "nothing of 1 of 2 pictures: 12"),
        ({"annotations": write(tmp_path / "u.json", {"7": ["yeti"], "12": []})}, "benchmark.synonyms lacks: yeti"),
        ({"annotations": write(tmp_path / "v.json", [1])}, "cannot use .*instances_"),
        ({"synonyms": None}, "benchmark.synonyms is not set.*LisaAnne/Hallucination"),
        ({"synonyms": write(tmp_path / "s.txt", "person\n")}, "expected 80 classes"),
        ({"answers": lines(tmp_path / "a.jsonl", [{"caption": "x"}])}, "row 1 does not say of which picture"),
        (
            {"answers": lines(tmp_path / "b.jsonl", [{"image_id": 7, "caption": "x"}] * 2)},
            "more than one caption of picture 7",
        ),
    ]
    for keys, message in cases:
        with pytest.raises(ValueError, match=message):
            scored(changed(**keys))


# -- AMBER -------------------------------------------------------------------------------------------------------------

ITEMS = [
    {"id": 1, "type": "generative", "truth": ["man", "tree", "tree", "bus"], "hallu": ["dog", "sun"]},
    {"id": 2, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 3, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 4, "type": "discriminative-attribute-action", "truth": "no"},
    {"id": 5, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 6, "type": "discriminative-relation", "truth": "yes"},
    {"id": 7, "type": "relation", "truth": "no"},
]
RELATIONS = {"man": ["person"], "tree": ["forest"], "dog": ["puppy"], "sun": [], "TV": [], "cup": [], "bus": []}


@pytest.fixture
def amber_files(tmp_path) -> Path:
    write(tmp_path / "annotations.json", ITEMS)
    write(tmp_path / "relation.json", RELATIONS)
    write(tmp_path / "safe_words.txt", "light\ncup")
    return tmp_path


def test_amber_by_hand(amber_files):
    # Words of the vocabulary: persons, forest, puppies, cup, TV. person stands for man, forest for the first tree; cup
    # is safe; puppy and TV are wrong, and puppy stands for dog, which was foreseen.
    said = {
        1: "Two persons in a forest with puppies, a cup and a tv.",
        2: "Yes",
        3: "No",
        4: "No.",
        5: "No",
        6: "No",
        7: "Yes",
    }
    answers = write(amber_files / "answers.json", [{"id": number, "response": text} for number, text in said.items()])
    score = scored(BenchmarkFiles(name="amber", answers=answers, annotations=str(amber_files)))
    parts = {part.name: part for part in score.parts}
    assert values(parts["generative"]) == {"CHAIR": 40.0, "Cover": 50.0, "Hal": 100.0, "Cog": 50.0}
    # 3 of 6 right (2, 3, 5). Said exactly No: 3, 5, 6, of which 3 and 5 are right: P 2/3. Label no: 3, 4, 5, 7: R 1/2.
    # F1 from 66.7 and 50.0: 2 * .667 * .5 / 1.1671 = 57.15
    assert values(parts["discriminative"], 2) == {"accuracy": 50.0, "precision": 66.67, "recall": 50.0, "F1": 57.15}
    assert values(parts["existence"], 2) == {"accuracy": 100.0, "precision": 100.0, "recall": 100.0, "F1": 99.95}
    assert values(parts["relation"]) == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "F1": 0.0}
    assert values(parts["state"]) == {"accuracy": 100.0, "precision": None, "recall": None, "F1": 0.0}
    # (100 - 40 + 57.15) / 2
    assert values(parts["all"], 2) == {"AMBER score": 58.58}
    assert score.notes == ['1 of 6 answers are neither exactly Yes nor No, e.g. "No."; they count as wrong']


def test_amber_takes_words_for_the_same_that_are_close(amber_files):
    files = BenchmarkFiles(name="amber", annotations=str(amber_files))
    known = amber.load(files)

    def similar(one: str, other: str) -> bool:
        return {one, other} in ({"sun", "sunlight"}, {"bus", "TV"}) or one == other

    near = amber.Amber(known.items, known.associations, known.safe, similar)
    # sun is foreseen and wrong; TV is close to bus, which is shown: named, and not wrong
    found = amber.describe(near, known.items["1"], ["sun", "TV"])
    assert (found.words, found.wrong, found.named, found.foreseen) == (2, 1, 1, 1)
    assert amber.describe(known, known.items["1"], ["sun", "TV"]).wrong == 2


def test_amber_says_which_model_of_vectors_is_missing(amber_files):
    with pytest.raises(ValueError, match="cannot load the spaCy model 'no_such_model'"):
        amber.load(BenchmarkFiles(name="amber", annotations=str(amber_files), similarity="no_such_model"))


def test_amber_wants_tasks_whole(amber_files):
    answers = write(amber_files / "a.json", [{"id": 3, "response": "No"}])
    with pytest.raises(ValueError, match="2 of 3 questions have no answer: 2, 4"):
        scored(BenchmarkFiles(name="amber", answers=answers, annotations=str(amber_files)))
    (attribute, number) = scored(
        BenchmarkFiles(name="amber", answers=answers, annotations=str(amber_files), partial=True)
    ).parts
    assert (attribute.name, number.name) == ("attribute", "number")


def test_amber_reads_the_real_annotations():
    (folder,) = fixture("amber")
    known = amber.load(BenchmarkFiles(name="amber", annotations=folder))
    assert len(known.items) == 15_220
    # Perfect answers: everything annotated is named, and nothing else.
    kinds = [amber._task(item) for item in known.items.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "generative": 1004,
        "existence": 4924,
        "attribute": 7628,
        "relation": 1664,
    }
    item = known.items["2"]
    found = amber.describe(known, item, list(dict.fromkeys(item["truth"])))
    # the truth lists ship twice; only the first is ever named
    assert (found.wrong, found.shown - found.named) == (0, 1)


# -- MMHal-Bench -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Fine.\nRating: 5", 5),
        ("rating: 0, bad", 0),
        ("Rating: 2 or Rating: 4", None),
        ("5", None),
        ("Rating: 3. rating: 3", 3),
    ],
)
def test_mmhal_reads_one_rating(reply, rating):
    assert mmhal.rating(reply) == rating


def test_mmhal_by_hand(tmp_path):
    # In each block of eight: 6, 0, 3, 2, none, 4, 4, 5. Mean 24 / 8 = 3; below 3: three of eight; informativeness:
    # 3, 0, 0, 2, 0, 1, 1, 2 = 9 / 24.
    block = ["Rating: 6", "Rating: 0", "Rating: 3", "Rating: 2", "no idea", "rating: 4", "Rating: 4", "RATING: 5"]
    replies = write(tmp_path / "replies.json", [{"choices": [{"message": {"content": text}}]} for text in block * 12])
    files = BenchmarkFiles(name="mmhal", judge=JudgeReplies(name="a judge", date="2024-05-01", replies=replies))
    score = scored(files)
    assert values(score.parts[0], 2) == {"mean rating": 3.0, "hallucination": 37.5, "informativeness": 37.5}
    assert [part.numbers["mean rating"].value for part in score.parts[1:]] == [6, 0, 3, 2, 0, 4, 4, 5]
    assert "Judge: a judge, 2024-05-01." in score.rule
    assert score.notes == ["12 of 96 replies hold no single rating and count as 0"]


def test_mmhal_refuses_other_numbers_of_replies_and_nameless_judges(tmp_path):
    answers = lines(tmp_path / "a.jsonl", [{"gpt4_review": "Rating: 3"}] * 95)
    with pytest.raises(ValueError, match="95 replies of the judge; MMHal-Bench has 96"):
        scored(BenchmarkFiles(name="mmhal", answers=answers, judge=JUDGE))
    with pytest.raises(ValueError, match="benchmark.judge is not set"):
        scored(BenchmarkFiles(name="mmhal", answers=answers))
    with pytest.raises(ValueError, match="set benchmark.judge.name and .date"):
        JudgeReplies(name="a judge")


# -- Object HalBench ---------------------------------------------------------------------------------------------------


def test_object_halbench_by_hand(captions, tmp_path):
    rows = [
        {"image_id": 7, "text": "A man, a man and a woman see one cow."},  # different words: man, woman, cow
        {"image_id": 12, "text": "There is some grass here."},  # names no class
        {"image_id": 12, "text": "A cow."},  # two words: names nothing
    ]
    files = BenchmarkFiles(
        name="object_halbench",
        answers=lines(tmp_path / "a.jsonl", rows),
        annotations=captions.annotations,
        synonyms=captions.synonyms,
    )
    score = scored(files)
    # One answer names classes, and it hallucinates; 1 of 3; person of person, bus, and nothing of cow, cow: 1 of 4.
    assert values(score.parts[0]) == {
        "response hallucination": 100.0,
        "object hallucination": 33.3,
        "Recall": 25.0,
        "Words": 5.7,
    }
    assert "no judge was asked" in score.rule
    replies = write(tmp_path / "r.json", ['["tall man", "buses", "wine glass of water"]', 'Here:\n["cow"]', "none"])
    judged = BenchmarkFiles(
        **{**vars(files), "judge": JudgeReplies(name="a judge", date="2024-05-01", replies=replies)}
    )
    # person and bus are right, wine glass is not; cow is right. The third answer is too short to be asked about.
    score = scored(judged)
    assert values(score.parts[0]) == {
        "response hallucination": 50.0,
        "object hallucination": 25.0,
        "Recall": 75.0,
        "Words": 5.7,
    }
    assert "a judge, 2024-05-01" in score.rule


def test_object_halbench_counts_replies_that_are_no_list(captions, tmp_path):
    rows = [{"image_id": 7, "text": "There is one man here."}, {"image_id": 12, "text": "There is one cow here."}]
    files = BenchmarkFiles(
        name="object_halbench",
        answers=lines(tmp_path / "a.jsonl", rows),
        annotations=captions.annotations,
        synonyms=captions.synonyms,
        judge=JudgeReplies(name="j", date="d", replies=write(tmp_path / "r.json", ["man and cow", '["cow"]'])),
    )
    score = scored(files)
    assert score.parts[0].items == 1
    assert score.notes == ["1 of 2 replies are no JSON list of names; these answers are left out"]
    assert object_halbench.parse_list('{"a": 1}') is None


# -- HallusionBench ----------------------------------------------------------------------------------------------------


def question(category: str, figure: int, number: int, visual: int, truth: int) -> dict[str, Any]:
    names = {"category": category, "subcategory": "chart", "set_id": "0", "figure_id": str(figure)}
    more = {"question_id": str(number), "visual_input": str(visual), "gt_answer": str(truth)}
    return {**names, **more, "question": "?", "gt_answer_details": "!", "filename": None}


QUESTIONS = [
    question("VS", 0, 0, 0, 1),  # no figure: unclear is right
    question("VS", 1, 0, 1, 1),
    question("VS", 1, 1, 1, 0),
    question("VD", 0, 0, 1, 1),
    question("VD", 1, 0, 2, 0),
]


def test_hallusionbench_by_hand(tmp_path):
    annotations = write(tmp_path / "HallusionBench.json", QUESTIONS)
    rows = [{**row, "gpt4v_output_gpt_check": verdict} for row, verdict in zip(QUESTIONS, "21121", strict=True)]
    answers = write(tmp_path / "answers.json", rows)
    score = scored(BenchmarkFiles(name="hallusionbench", answers=answers, annotations=annotations, judge=JUDGE))
    # Right: VS 0 (unclear, no figure), VS 1 twice, not VD 0 (unclear), VD 1: 4 of 5. Groups of a question: VS 0, VS 1
    # right, VD 0 (figures 0 and 1) not: 2 of 3. Figures without VS 0: VS 1 right, VD 0 not, VD 1 right: 2 of 3. Easy:
    # VS 0, VS 1 right, VD 0 not. Hard: VD 1.
    assert values(score.parts[0]) == {"aAcc": 80.0, "qAcc": 66.7, "fAcc": 66.7, "easy": 66.7, "hard": 100.0}
    assert [part.name for part in score.parts] == ["all", "VS", "VD"]
    assert values(score.parts[1]) == {"aAcc": 100.0, "qAcc": 100.0, "fAcc": 100.0, "easy": 100.0, "hard": None}
    assert "2 unclear, from the field gpt4v_output_gpt_check of the answers; judge: a judge" in score.rule


@pytest.mark.parametrize(
    ("answer", "said"), [("Yes, it is.", 1), ("no", 0), ("Yes and no", None), ("It is", None), ("I know, yes", 1)]
)
def test_hallusionbench_matches_yes_and_no(answer, said):
    assert hallusionbench.says(answer) == said


@pytest.mark.parametrize(("reply", "verdict"), [("Incorrect.", 0), ("correct", 1), ("It is unclear", 2)])
def test_hallusionbench_reads_verdicts(reply, verdict):
    assert hallusionbench.read_verdict(reply) == verdict


def test_hallusionbench_of_the_official_sample():
    answers, annotations = fixture(
        "hallusionbench/HallusionBench_result_sample.json", "hallusionbench/HallusionBench.json"
    )
    files = BenchmarkFiles(name="hallusionbench", answers=answers, annotations=annotations, partial=True)
    score = scored(files)
    assert [part.items for part in score.parts] == [254, 94, 160]
    # Looked for in the text: 131 hold the right word and not the other; 24 hold neither or both and have no figure.
    assert score.parts[0].counts["right"] == 155
    assert score.notes[1] == "49 of 254 answers are unclear"
    with pytest.raises(ValueError, match="875 of 1,129 questions have no answer"):
        scored(BenchmarkFiles(name="hallusionbench", answers=answers, annotations=annotations))


def test_hallusionbench_refuses_verdicts_that_are_none(tmp_path):
    annotations = write(tmp_path / "HallusionBench.json", QUESTIONS)
    answers = write(tmp_path / "answers.json", [{**row, "verdict": "maybe"} for row in QUESTIONS])
    with pytest.raises(ValueError, match="verdict is 'maybe'; expected 0, 1 or 2"):
        scored(BenchmarkFiles(name="hallusionbench", answers=answers, annotations=annotations))
