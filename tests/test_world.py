"""The world's gates: nothing may be labelled by an oracle that fails one of these."""

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mmalign.world import Caption, Mention, Object, Scene, corrupt, describe, parse_caption, parse_image, render, verify
from mmalign.world.datasets import PROMPT_KINDS, captioned_scenes, prompts, split_of
from mmalign.world.oracle import ParsedScene
from mmalign.world.scene import every_object, random_scene


def seen(scene: Scene) -> ParsedScene:
    return ParsedScene(tuple(sorted(scene.objects)))


def test_every_single_object_is_parsed_exactly():
    assert len(every_object()) == 4 * 6 * 2 * 4
    wrong = [thing for thing in every_object() if parse_image(render(Scene((thing,)))) != seen(Scene((thing,)))]
    assert wrong == []


def test_2000_clean_renders_are_parsed_wholly_right():
    generator = random.Random(0)
    scenes = [random_scene(generator, 1 + index % 4) for index in range(2000)]
    right = sum(parse_image(render(scene)) == seen(scene) for scene in scenes)
    assert right / 2000 >= 0.999


def test_the_empty_picture_has_no_object():
    assert parse_image(render(Scene(()))) == ParsedScene(())


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        (lambda image, noise: image.filter(ImageFilter.GaussianBlur(1.0)), 0.95),
        (lambda image, noise: add_noise(image, noise, 20), 0.95),
    ],
    ids=["blur of 1 px", "noise of 20 levels"],
)
def test_mild_blur_and_noise_are_survived(spoil, least):
    generator, noise = random.Random(1), np.random.default_rng(1)
    scenes = [random_scene(generator, 1 + index % 3) for index in range(200)]
    right = sum(parse_image(spoil(render(scene), noise)) == seen(scene) for scene in scenes)
    assert right / 200 >= least


def add_noise(image: Image.Image, noise: np.random.Generator, level: float) -> Image.Image:
    pixels = np.asarray(image) + noise.normal(0, level, (64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def test_pure_noise_is_not_taken_for_an_object():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert len(parse_image(pixels).objects) == 0


def test_wrong_picture_size_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="64 x 64"):
        parse_image(Image.new("RGB", (32, 32)))


def test_captions_are_true_and_read_back():
    generator = random.Random(2)
    for index in range(1000):
        scene = random_scene(generator, 1 + index % 3)
        caption = describe(scene, generator)
        assert parse_caption(str(caption)) == caption
        assert verify(caption, seen(scene)).correct, (str(caption), scene)


@pytest.mark.parametrize("text", ["", "a dog", "a red circle on a blue square", "red circle", "a red circle and"])
def test_text_outside_the_grammar_is_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(text)


RED_CIRCLE = Object("circle", "red", "small", "top left")
BLUE_SQUARE = Object("square", "blue", "large", "bottom right")


@pytest.mark.parametrize(
    ("text", "objects", "score"),
    [
        ("a red circle", [RED_CIRCLE], 1),
        ("a blue circle", [RED_CIRCLE], 2 / 3),  # the circle and nothing else; not the colour
        ("a red square", [RED_CIRCLE], 1 / 3),  # nothing else; neither the shape nor its colour
        ("a red circle", [RED_CIRCLE, BLUE_SQUARE], 2 / 3),  # something else is there
        ("a large red circle in the top left", [RED_CIRCLE], 4 / 5),
        ("two red circles", [RED_CIRCLE], 3 / 5),
        ("a red circle left of a blue square", [RED_CIRCLE, BLUE_SQUARE], 1),
        ("a red circle right of a blue square", [RED_CIRCLE, BLUE_SQUARE], 5 / 6),
        ("a blue square below a red circle", [RED_CIRCLE, BLUE_SQUARE], 1),
        ("a green circle above a blue square", [RED_CIRCLE, BLUE_SQUARE], 5 / 6),
        ("a red circle", [], 1 / 3),
    ],
)
def test_facts_of_a_caption_in_a_scene(text, objects, score):
    verdict = verify(parse_caption(text), ParsedScene(tuple(objects)))
    assert verdict.score == pytest.approx(score)
    assert verdict.correct == (score == 1)


def test_a_malformed_region_counts_as_something_else():
    assert not verify(parse_caption("a red circle"), ParsedScene((RED_CIRCLE,), malformed=1)).correct


def test_corruption_has_the_stated_rate_and_changes_nothing_else():
    generator = random.Random(3)
    caption = Caption((Mention("circle", "red", "small", "top left"),))
    drawn = [corrupt(caption, generator, 0.3).mentions[0] for _ in range(4000)]
    assert sum(mention.shape != "circle" for mention in drawn) / 4000 == pytest.approx(0.3, abs=0.03)
    assert sum(mention.colour != "red" for mention in drawn) / 4000 == pytest.approx(0.3, abs=0.03)
    assert {(mention.size, mention.place) for mention in drawn} == {("small", "top left")}


def test_splits_share_no_composition_and_are_deterministic():
    by_split = {split: prompts(300, seed=0, split=split) for split in ("train", "tune", "test")}
    for split, captions in by_split.items():
        assert all(split_of(caption) == split for caption in captions)
        assert captions == prompts(300, seed=0, split=split)
        kinds = {caption.kind for caption in captions}
        assert kinds == set(PROMPT_KINDS)
    assert by_split["train"] != prompts(300, seed=1)
    pair = parse_caption("a red circle left of a blue square")
    assert split_of(pair) == split_of(parse_caption("a small blue square and a red circle"))


def test_scenes_of_a_split_carry_true_captions():
    source = captioned_scenes(seed=0, split="tune")
    for _ in range(100):
        scene, caption = next(source)
        assert split_of(caption) == "tune"
        assert verify(caption, seen(scene)).correct
