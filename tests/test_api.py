"""The journey from Python, at its smallest: candidates, judgement, latents, training, LoRA, evaluation."""

import json
from pathlib import Path

import pytest

import mmalign
from mmalign.data import Manifest


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("journey")
    mmalign.generate(
        {
            "output": str(folder / "candidates"),
            "count": 12,
            "candidates": 3,
            "guidance": [3, 2, 1],
            "records_per_shard": 6,
            "sampling": {"inference_steps": 4},
            "device": "cpu",
        }
    )
    mmalign.judge({"shards": str(folder / "candidates"), "output": str(folder / "pairs")})
    return folder / "pairs"


def test_candidates_became_pairs(pairs):
    assert Manifest.read(pairs.parent / "candidates").records == 12
    assert 1 <= Manifest.read(pairs).records <= 12
    assert mmalign.inspect({"shards": str(pairs)}).feedback["preferred"] == Manifest.read(pairs).records


def test_latents_train_as_the_pictures_do_and_the_result_is_evaluated(pairs, tmp_path):
    mmalign.encode({"shards": str(pairs), "output": str(tmp_path / "latents"), "device": "cpu"})
    losses = {}
    for source in (pairs, tmp_path / "latents"):
        run = tmp_path / f"run-{source.name}"
        result = mmalign.train(
            {
                "output": str(run),
                "device": "cpu",
                "data": {"shards": str(source)},
                "objective": {"name": "dpo", "beta": 100},
                "training": {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-4, "trackers": []},
            }
        )
        assert result.findings == []
        losses[source.name] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses["latents"] == pytest.approx(losses["pairs"], rel=1e-4)
    rows = mmalign.evaluate(
        {
            "output": str(tmp_path / "evaluation"),
            "models": [{"name": "base", "path": "world"}, {"name": "dpo", "path": str(run / "model"), "seed": 0}],
            "count": 4,
            "guidance": [1.0],
            "sampling": {"inference_steps": 2},
            "device": "cpu",
        }
    )
    assert [row.name for row in rows] == ["base", "dpo"]
    table = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert table[1]["gain"]["value"] == pytest.approx(table[1]["accuracy"]["value"] - table[0]["accuracy"]["value"])
    assert "<html" in (tmp_path / "evaluation" / "report.html").read_text()


def test_an_adapter_is_trained_and_merged_into_its_base(pairs, tmp_path):
    result = mmalign.train(
        {
            "output": str(tmp_path / "lora"),
            "device": "cpu",
            "model": {"lora": {"rank": 4}},
            "data": {"shards": str(pairs)},
            "training": {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "trackers": []},
        }
    )
    assert result.model is not None
    assert (result.model / "pytorch_lora_weights.safetensors").is_file()
    drawn = {}
    for name, adapter in (("base", None), ("lora", str(result.model))):
        folder = mmalign.generate(
            {
                "output": str(tmp_path / name),
                "count": 1,
                "candidates": 1,
                "model": {"adapter": adapter},
                "sampling": {"inference_steps": 2},
                "device": "cpu",
            }
        )
        drawn[name] = (folder / "000000.tar").read_bytes()
    assert drawn["base"] != drawn["lora"]


def test_stale_latents_are_refused(pairs, tmp_path):
    folder = mmalign.encode({"shards": str(pairs), "output": str(tmp_path / "latents"), "device": "cpu"})
    manifest = json.loads((folder / "shards.json").read_text())
    manifest["encoder"]["encoder_sha256"] = "0" * 64
    (folder / "shards.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="encode"):
        mmalign.train({"output": str(tmp_path / "run"), "device": "cpu", "data": {"shards": str(folder)}})


def test_overrides_belong_to_files():
    with pytest.raises(ValueError, match="config file"):
        mmalign.train({"output": "x"}, "training.max_steps=1")
