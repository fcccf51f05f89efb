"""Configs are strict, and their errors name the key to change."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from mmalign.config import Choice, build, describe, load, short_form, to_dict, to_yaml


@dataclass(frozen=True, kw_only=True)
class Lora:
    # rank of the update
    rank: int = 8


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    # step size of the optimizer,
    # after warm-up
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Settings:
    output: str
    lora: Lora | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    stove: Annotated[Lora, short_form("rank")] = field(default_factory=Lora)
    pans: list[Annotated[Lora, short_form("rank")]] = field(default_factory=list)


def test_a_word_stands_for_its_section():
    assert build(Kitchen, {"stove": "4", "pans": ["2", {"rank": 3}]}) == Kitchen(
        stove=Lora(rank=4), pans=[Lora(rank=2), Lora(rank=3)]
    )
    assert load(Kitchen, None, ["stove.rank=5"]).stove == Lora(rank=5)
    assert "rank: 8" in describe(Kitchen)
    with pytest.raises(ValueError, match=r"stove\.rank is 'hot'"):
        build(Kitchen, {"stove": "hot"})
    with pytest.raises(ValueError, match=r"unknown key pans\.1\.rang: did you mean pans\.1\.rank\?"):
        build(Kitchen, {"pans": ["2", {"rang": 3}]})


def test_file_then_overrides_in_order(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("output: here\noptimizer: {learning_rate: 1e-5}\n")
    settings = load(Settings, path, ["optimizer.betas=[0.5, 0.6]", "lora.rank=4", "output=there"])
    assert settings == Settings(
        output="there", lora=Lora(rank=4), optimizer=Optimizer(learning_rate=1e-5, betas=(0.5, 0.6))
    )


def test_saved_settings_read_back_equal(tmp_path):
    settings = Settings(output="x", lora=Lora())
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    assert load(Settings, path) == settings
    assert to_dict(settings)["lora"] == {"rank": 8}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "missing key output"),
        ({"output": "x", "lor": {}}, r"unknown key lor: did you mean lora\?"),
        ({"output": "x", "optimizer": {"learning_rat": 1}}, r"did you mean optimizer\.learning_rate\?"),
        ({"output": "x", "lora": {"rang": 1}}, r"did you mean lora\.rank\?"),
        ({"output": "x", "optimizer": {"learning_rate": "fast"}}, r"optimizer\.learning_rate is 'fast'"),
        ({"output": "x", "zzz": 1}, "expected one of output, lora, optimizer"),
    ],
)
def test_errors_teach(values, message):
    with pytest.raises(ValueError, match=message):
        build(Settings, values)


def test_bad_files_and_overrides(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file"):
        load(Settings, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        load(Settings, tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="holds a list"):
        load(Settings, tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="look like"):
        load(Settings, None, ["output"])
    with pytest.raises(ValueError, match="not a section"):
        load(Settings, None, ["output=x", "output.y=1"])


def test_description_shows_comments_and_defaults():
    text = describe(Settings)
    assert "output: (required)" in text
    assert "# step size of the optimizer," in text
    assert "# after warm-up" in text
    assert "learning_rate: 0.0001" in text
    assert "rank: 8" in text


@dataclass(frozen=True, kw_only=True)
class Gas:
    kind: Literal["gas"] = "gas"
    flames: int = 4


@dataclass(frozen=True, kw_only=True)
class Electric:
    kind: Literal["electric"] = "electric"
    watts: int = 2000


@dataclass(frozen=True, kw_only=True)
class Match:
    length: int = 5


@dataclass(frozen=True, kw_only=True)
class Switch:
    timer: bool = False


@dataclass(frozen=True, kw_only=True)
class House:
    stove: Annotated[Gas | Electric, Choice({"gas": Gas, "electric": Electric})] = field(default_factory=Gas)
    starter: Annotated[Match | Switch, Choice({"gas": Match, "electric": Switch}, of="stove")] = field(
        default_factory=Match
    )


def test_the_keys_of_a_section_depend_on_its_kind():
    assert build(House, {}) == House()
    assert build(House, {"starter": {"length": 7}}) == House(starter=Match(length=7))
    electric = House(stove=Electric(watts=3), starter=Switch())
    assert build(House, {"stove": {"kind": "electric", "watts": 3}}) == electric
    assert build(House, {"stove": Electric(watts=3)}) == electric
    assert build(House, to_dict(electric)) == electric
    assert load(House, None, ["stove.kind=electric", "starter.timer=true"]).starter == Switch(timer=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stove": {"kind": "wood"}}, r"stove\.kind is 'wood'; expected one of gas, electric"),
        ({"stove": {"watts": 3}}, r"unknown key stove\.watts"),
        ({"stove": {"kind": "electric", "wats": 3}}, r"did you mean stove\.watts\?"),
        ({"stove": {"kind": "electric"}, "starter": {"length": 3}}, r"unknown key starter\.length: .*timer"),
        ({"stove": {"kind": "electric", "watts": "many"}}, r"stove\.watts is 'many'"),
    ],
)
def test_errors_name_keys_of_the_kind_that_was_chosen(values, message):
    with pytest.raises(ValueError, match=message):
        build(House, values)


def test_every_kind_is_described():
    text = describe(House)
    assert text.index("kind: gas") < text.index("flames: 4") < text.index("kind: electric") < text.index("watts: 2000")
    assert "with stove.kind: electric" in text
