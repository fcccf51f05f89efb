"""The jobs that work shard by shard: what is done is not done again, shares add up to the whole, nothing is mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mmalign
from mmalign.data import Candidate, Manifest, Record, ShardWriter
from mmalign.jobs import judge, models
from mmalign.jobs.shards import by_name, remaining
from mmalign.jobs.sources import device_of
from mmalign.modalities import tiny
from mmalign.world import Object, Scene, render


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def candidates(tmp_path_factory) -> Path:
    """Four shards of one prompt each, with a right and a wrong picture."""
    right = render(Scene((Object("circle", "red", "small", "top left"),)))
    wrong = render(Scene((Object("square", "blue", "large", "top left"),)))
    folder = tmp_path_factory.mktemp("shards") / "candidates"
    with ShardWriter(folder, records_per_shard=1) as writer:
        for index in range(4):
            writer.write(Record(f"{index:04d}", "a red circle", [Candidate(image=wrong), Candidate(image=right)]))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def drawing(model: Path, folder: Path, *prompts: str) -> dict[str, Any]:
    """Settings that draw one picture of each prompt, a shard each."""
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return {
        "output": str(folder / "drawn"),
        "prompts": str(folder / "prompts.txt"),
        "candidates": 1,
        "records_per_shard": 1,
        "model": {"path": str(model)},
        "sampling": {"inference_steps": 1},
        "device": "cpu",
    }


def test_generate_loads_its_model_only_for_shards_that_are_missing(model, tmp_path, monkeypatch):
    loads, load = [], models.load

    def counted(*given: Any, **named: Any) -> Any:
        loads.append(given)
        return load(*given, **named)

    monkeypatch.setattr(models, "load", counted)
    settings = drawing(model, tmp_path, "a fox", "a hare", "an owl")
    folder = mmalign.generate(settings)
    drawn = contents(folder)
    assert set(drawn) == {"000000.tar", "000001.tar", "000002.tar", "shards.json"}
    assert len(loads) == 1
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    mmalign.generate({**settings, "model": {"path": "/nowhere"}})
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    assert len(loads) == 1
    (folder / "000001.tar").unlink()
    mmalign.generate(settings)
    assert len(loads) == 2
    assert contents(folder) == drawn


def test_a_manifest_of_fewer_shards_follows_the_count(model, tmp_path):
    settings = drawing(model, tmp_path, "a fox", "a hare")
    assert Manifest.read(mmalign.generate(settings)).records == 2
    assert Manifest.read(mmalign.generate({**settings, "count": 1})).records == 1


@pytest.mark.parametrize("verb", ["judge", "encode"])
def test_shares_add_up_to_the_whole(verb, candidates, model, tmp_path):
    job = getattr(mmalign, verb)
    settings: dict[str, Any] = {"shards": str(candidates), "device": "cpu"}
    if verb == "encode":
        settings["model"] = {"path": str(model)}
    whole = job({**settings, "output": str(tmp_path / "whole")})
    parts = tmp_path / "parts"
    job({**settings, "output": str(parts), "share": [0, 3]})
    job({**settings, "output": str(parts), "share": [2, 3]})
    assert set(contents(parts)) == {"000000.tar", "000002.tar", "000003.tar"}
    job({**settings, "output": str(parts), "share": [1, 3]})
    assert contents(parts) == contents(whole)
    assert (Manifest.read(parts).encoder is not None) == (verb == "encode")


def test_a_share_that_is_none_is_refused(candidates, tmp_path):
    with pytest.raises(ValueError, match=r"share is \[3, 3\]; expected \[place, of how many\]"):
        mmalign.judge({"shards": str(candidates), "output": str(tmp_path / "x"), "share": [3, 3]})
    assert not (tmp_path / "x").exists()


def test_without_a_share_the_launcher_divides(monkeypatch, tmp_path):
    names = [f"{index}.tar" for index in range(5)]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert remaining(tmp_path, names) == ["1.tar", "3.tar"]
    assert remaining(tmp_path, names, (0, 1)) == names
    (tmp_path / "3.tar").touch()
    assert remaining(tmp_path, names) == ["1.tar"]


def test_latents_of_another_encoder_are_not_mixed_in(candidates, model, tmp_path):
    settings = {"shards": str(candidates), "output": str(tmp_path / "latents"), "device": "cpu"}
    folder = mmalign.encode({**settings, "model": {"path": str(model)}})
    before = contents(folder)
    other = tiny.stable_diffusion(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="another encoder made"):
        mmalign.encode({**settings, "model": {"path": str(other)}})
    assert contents(folder) == before


def test_shards_of_one_name_in_two_folders_stay_apart(candidates, tmp_path):
    both = [str(candidates), str(candidates)]
    folder = mmalign.judge({"shards": both, "output": str(tmp_path / "pairs")})
    assert Manifest.read(folder).records == 8
    assert sorted(by_name(Manifest.read(both)))[:3] == ["0-000000.tar", "1-000001.tar", "2-000002.tar"]


def test_a_scorer_is_not_loaded_when_every_shard_is_judged(candidates, tmp_path, monkeypatch):
    settings = {"shards": str(candidates), "output": str(tmp_path / "pairs")}
    mmalign.judge(settings)
    monkeypatch.setattr(judge, "load_scorer", lambda *given: pytest.fail("the scorer was loaded"))
    mmalign.judge(settings)


def test_processes_of_one_machine_take_an_accelerator_each(monkeypatch):
    assert device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of("auto") == torch.device("cuda:3")
    assert device_of("cuda:1") == torch.device("cuda:1")
