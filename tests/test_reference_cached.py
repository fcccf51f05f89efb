"""Log-probs of the reference that lie in the shards: read through stream and collate, padded, refused when stale."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.core.objectives import bind_objective
from mmalign.core.reference import Cached, FrozenCopy
from mmalign.core.types import Sample
from mmalign.data import (
    Candidate,
    DataSettings,
    Manifest,
    Record,
    RecordStream,
    ShardWriter,
    preference_pair,
    read_shard,
)
from mmalign.training import TIMING, TrainingSettings, read_rows, train
from tests.tiny_modality import LENGTH, TinyInputs, TinyModality, TinyNetwork, run, write_pairs

SETTINGS = TrainingSettings(max_steps=6, batch_size=8, micro_batch_size=4, learning_rate=1e-2, trackers=())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "shards")


def curve(folder: Path) -> list[dict[str, float]]:
    return [{key: row[key] for key in row if key not in TIMING} for row in read_rows(folder / "metrics.jsonl")]


def fingerprint(network: nn.Module) -> dict[str, Any]:
    digest = hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in network.state_dict().values()))
    return {"network": digest.hexdigest(), "length": LENGTH}


def columns(inputs: TinyInputs) -> int:
    return inputs.digits.shape[1]


def stored_pairs(pairs: Path, folder: Path, network: nn.Module) -> Path:
    """The same pairs with the log-probs of `network`, each as long as its text."""
    manifest, modality = Manifest.read(str(pairs)), TinyModality()
    with ShardWriter(folder, records_per_shard=24, encoder={"reference": fingerprint(network)}) as writer:
        for record in itertools.chain.from_iterable(read_shard(shard, frozenset()) for shard in manifest.shards):
            assert isinstance(record, Record)
            candidates = []
            for one in record.candidates:
                rows = [Sample(record.key, record.prompt, group=0, draw=0, text=one.text)]
                with torch.no_grad():
                    found = modality.log_prob(network, modality.prepare(rows))
                length = len(one.text or "")
                tensors = {"reference_values": found.values[0, :length], "reference_weight": found.weight[0, :length]}
                candidates.append(Candidate(text=one.text, tensors=tensors))
            writer.write(dataclasses.replace(record, candidates=candidates, shard=""))
    return folder


def test_stored_log_probs_give_the_curve_of_a_frozen_copy(pairs: Path, tmp_path: Path) -> None:
    """Through shards, stream and collate; also where reading is left to worker processes."""
    network = TinyNetwork()
    shards = stored_pairs(pairs, tmp_path / "stored", network)
    manifest = Manifest.read(str(shards))
    for name, workers, reference in (
        ("copy", 0, FrozenCopy(network)),
        ("cached", 0, Cached(manifest.encoder, fingerprint(network), columns)),
        ("workers", 1, Cached(manifest.encoder, fingerprint(network), columns)),
    ):
        settings = DataSettings(shards=str(shards), workers=workers)
        stream = RecordStream(manifest, settings, 0, frozenset({"latent"}), preference_pair)
        bound = bind_objective({"name": "dpo"})
        train(TinyModality(), TinyNetwork(), reference, bound, stream, SETTINGS, tmp_path / name)
    for other in ("cached", "workers"):
        for row, twin in zip(curve(tmp_path / "copy"), curve(tmp_path / other), strict=True):
            assert row == pytest.approx(twin, abs=1e-5)
    assert curve(tmp_path / "copy")[5]["loss"] < 0.68


def test_stored_rows_are_padded_with_actions_that_do_not_count() -> None:
    tensors = {"reference_values": torch.tensor([-1.0, -2.0]).half(), "reference_weight": torch.ones(2)}
    sample = Sample("a", "1", group=0, draw=0, text="12", tensors=tensors)
    network = TinyNetwork()
    cached = Cached({"reference": fingerprint(network)}, fingerprint(network), columns)
    found = cached.log_prob(TinyModality(), network, TinyModality().prepare([sample]), [sample])
    assert found.values.tolist() == [[-1.0, -2.0, 0.0, 0.0, 0.0, 0.0]]
    assert found.weight.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    assert found.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "record a has no stored reference_values"),
        ({"reference_values": torch.zeros(7), "reference_weight": torch.ones(7)}, r"\(7,\), but there are 6 actions"),
        ({"reference_values": torch.zeros(1, 2)}, r"\(1, 2\), but there are 6 actions"),
    ],
)
def test_stored_rows_that_cannot_be_used(tensors: dict[str, Tensor], message: str) -> None:
    sample = Sample("a", "1", group=0, draw=0, text="12", tensors=tensors)
    cached = Cached({"reference": {}}, {}, columns)
    with pytest.raises(ValueError, match=message):
        cached.log_prob(TinyModality(), TinyNetwork(), TinyModality().prepare([sample]), [sample])


def test_stored_log_probs_of_something_else_are_refused(pairs: Path, tmp_path: Path) -> None:
    known = fingerprint(TinyNetwork())
    for encoder in (None, {"kind": "vae_posterior"}):
        with pytest.raises(ValueError, match="these shards hold no reference log-probs"):
            Cached(encoder, known, columns)
    with pytest.raises(ValueError, match="stale: their network is '[0-9a-f]{64}', now it is"):
        Cached({"reference": fingerprint(TinyNetwork(seed=1))}, known, columns)
    with pytest.raises(ValueError, match="stale: their length is 6, now it is 8"):
        Cached({"reference": known}, {**known, "length": 8}, columns)
    with pytest.raises(ValueError, match="kto pairs answers with the prompts of other records"):
        run(pairs, tmp_path, SETTINGS, objective="kto", reference=Cached({"reference": known}, known, columns))
