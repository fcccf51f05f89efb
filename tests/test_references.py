"""Every reference on the tiny network: what it is after some steps, after a resume, and on several processes."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmalign
from mmalign.config import build, load, to_yaml
from mmalign.core.merging import average
from mmalign.core.objectives import bind_objective
from mmalign.core.reference import Ema, FrozenCopy, Pool, Reference, Soup
from mmalign.core.types import Sample
from mmalign.jobs import references, train
from mmalign.jobs.references import ReferenceSettings
from mmalign.modalities import tiny
from mmalign.training import TIMING, TrainingSettings, launch, read_rows
from mmalign.training.checkpoint import Snapshots
from tests import data_sets
from tests.tiny_modality import TinyInputs, TinyModality, TinyNetwork, run, write_pairs

SETTINGS = TrainingSettings(max_steps=6, batch_size=8, micro_batch_size=4, learning_rate=1e-2, trackers=())
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "shards")


def samples() -> list[Sample]:
    return [Sample(str(index), str(index), group=index, draw=index, text="123") for index in range(3)]


def inputs(dtype: torch.dtype = torch.float32) -> TinyInputs:
    return TinyModality(dtype).prepare(samples())


def trained(network: nn.Module) -> Weights:
    return {name: weight.detach().clone() for name, weight in network.named_parameters() if weight.requires_grad}


def move(network: nn.Module, step: int) -> None:
    """A step to other weights, the same in every test."""
    with torch.no_grad():
        for index, weight in enumerate(weight for weight in network.parameters() if weight.requires_grad):
            generator = torch.Generator().manual_seed(100 * step + index)
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def at(network: TinyNetwork, weights: Weights) -> Tensor:
    """What a network like this one says with these weights, computed on a copy of its own."""
    twin = FrozenCopy(network).network
    twin.load_state_dict(weights, strict=False)
    return TinyModality().log_prob(twin, inputs()).values


def says(reference: Reference, network: nn.Module) -> Tensor:
    found = reference.log_prob(TinyModality(), network, inputs(), samples())
    assert found is not None
    assert not found.values.requires_grad
    return found.values


# -- ema ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
def test_ema_is_the_average_worked_out_by_hand(rank: int) -> None:
    """After three steps a_3 = d^3 w_0 + (1 - d)(d^2 w_1 + d w_2 + w_3), d = 0.9: .729, .081, .09, .1."""
    network = TinyNetwork(rank=rank)
    ema = Ema(network, 0.9)
    ema.advance(network, 0)
    seen = [trained(network)]
    assert torch.equal(says(ema, network), at(network, seen[0]))
    for step in (1, 2, 3):
        move(network, step)
        ema.advance(network, step)
        seen.append(trained(network))
    shares = (0.729, 0.081, 0.09, 0.1)
    expected = {
        name: torch.stack([share * past[name] for share, past in zip(shares, seen, strict=True)]).sum(0)
        for name in seen[0]
    }
    torch.testing.assert_close(ema.state_dict(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(says(ema, network), at(network, expected), rtol=0, atol=1e-5)
    assert all(torch.equal(weight, seen[3][name]) for name, weight in trained(network).items())


def test_the_policy_is_untouched_to_the_bit_even_after_an_error() -> None:
    network = TinyNetwork(dropout=0.5)
    ema = Ema(network, 0.5)
    ema.advance(network, 0)
    move(network, 1)
    before, state = trained(network), {name: tensor.clone() for name, tensor in ema.state_dict().items()}

    class Broken(TinyModality):
        def log_prob(self, network: nn.Module, inputs: TinyInputs) -> Any:
            assert not network.training
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        ema.log_prob(Broken(), network, inputs(), samples())
    assert network.training
    assert all(torch.equal(weight, before[name]) for name, weight in trained(network).items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in ema.state_dict().items())


# -- pools -------------------------------------------------------------------------------------------------------------


def pooled(network: TinyNetwork, choice: Any, folder: Path, seed: int = 0) -> Pool:
    return Pool(network, choice, every=2, seed=seed, shelf=Snapshots(folder, launch(cpu=True)))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("choice", ["first", "latest", "uniform"])
def test_a_pool_returns_to_the_checkpoint_it_names(tmp_path: Path, choice: str, rank: int) -> None:
    network = TinyNetwork(rank=rank)
    pool = pooled(network, choice, tmp_path)
    snapshots = []
    for step in range(9):
        if step:
            move(network, step)
        if step % 2 == 0:
            snapshots.append(trained(network))
        pool.advance(network, step)
        number = {"first": 0, "latest": step // 2, "uniform": pool.drawn(step // 2)}[choice]
        assert torch.equal(says(pool, network), at(network, snapshots[number]))


def test_the_draws_of_a_pool_are_uniform_and_depend_on_seed_and_period_alone(tmp_path: Path) -> None:
    network, shelf = TinyNetwork(), Snapshots(tmp_path, launch(cpu=True))

    def draws(seed: int) -> list[int]:
        pool = Pool(network, "uniform", 30, seed, shelf)
        return [pool.drawn(period) for period in range(40)]

    random.seed(5)
    once = draws(0)
    torch.manual_seed(3)
    assert draws(0) == once
    assert draws(1) != once
    assert once[0] == 0
    assert all(0 <= number <= period for period, number in enumerate(once))
    # Of 3,000 seeds some 1,000 draw each of the three: a standard deviation is 26.
    counts = Counter(Pool(network, "uniform", 1, seed, shelf).drawn(2) for seed in range(3000))
    assert sorted(counts) == [0, 1, 2]
    assert all(abs(count - 1000) < 130 for count in counts.values())


def test_a_pool_that_cannot_find_its_snapshots_says_where_they_are(tmp_path: Path) -> None:
    network = TinyNetwork()
    pool = pooled(network, "uniform", tmp_path / "here")
    pool.advance(network, 0)
    state = pool.state_dict()
    with pytest.raises(ValueError, match=r"no .*there/pool/step-0.safetensors; copy pool/ from the folder of the run"):
        pooled(network, "uniform", tmp_path / "there").load_state_dict(state)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "pool").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"could not write .*step-0.safetensors.*raise reference.every"):
        pooled(network, "uniform", tmp_path / "full").advance(network, 0)


# -- in the loop -------------------------------------------------------------------------------------------------------


def fit(pairs: Path, folder: Path, kind: str, rank: int = 0, resume: str | None = None, **changed: Any) -> Any:
    settings = dataclasses.replace(SETTINGS, **changed)
    network = TinyNetwork(rank=rank, dropout=0.2)
    return run(pairs, folder, settings, network=network, rank=rank, reference=kind, resume=resume)


def curve(folder: Path) -> list[dict[str, float]]:
    return [{key: row[key] for key in row if key not in TIMING} for row in read_rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["ema", "first", "latest", "uniform"])
def test_a_resume_is_exact(pairs: Path, tmp_path: Path, kind: str, rank: int) -> None:
    """Stopped between two snapshots, after a draw that the state must remember."""
    whole = fit(pairs, tmp_path / "whole", kind, rank)
    fit(pairs, tmp_path / "parts", kind, rank, max_steps=5)
    parts = fit(pairs, tmp_path / "parts", kind, rank, resume="latest")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    for name in ("model.safetensors", "reference.safetensors"):
        assert (whole.checkpoint / name).read_bytes() == (parts.checkpoint / name).read_bytes()


def test_micro_batches_change_nothing(pairs: Path, tmp_path: Path) -> None:
    for size in (2, 8):
        network = TinyNetwork().double()
        run(
            pairs,
            tmp_path / str(size),
            dataclasses.replace(SETTINGS, micro_batch_size=size),
            network=network,
            reference=Ema(network, 0.7),
        )
    assert curve(tmp_path / "2")[0]["loss"] == pytest.approx(math.log(2))
    for one, other in zip(curve(tmp_path / "2"), curve(tmp_path / "8"), strict=True):
        assert one == pytest.approx(other, abs=1e-10)


def test_a_run_goes_on_with_its_own_reference(pairs: Path, tmp_path: Path) -> None:
    fit(pairs, tmp_path, "latest", max_steps=2)
    with pytest.raises(ValueError, match=r"reference pool \(latest, every 2 steps\), this run has ema \(decay 0.8\)"):
        fit(pairs, tmp_path, "ema", resume="latest")


def test_a_soup_is_not_reported_as_a_reference_that_differs(pairs: Path, tmp_path: Path) -> None:
    result = run(pairs, tmp_path, SETTINGS, reference="soup")
    assert result.findings == []
    assert abs(curve(tmp_path)[0]["loss"] - math.log(2)) > 1e-4


# -- soup --------------------------------------------------------------------------------------------------------------


def test_a_soup_is_the_average_exactly() -> None:
    one, other = TinyNetwork(seed=1), TinyNetwork(seed=2)
    network = TinyNetwork(seed=3)
    for shares, parts in ((None, (0.5, 0.5)), ([3.0, 1.0], (0.75, 0.25))):
        soup = Soup(network, average([one.state_dict(), other.state_dict()], shares))
        expected = {
            name: (parts[0] * weight.double() + parts[1] * other.state_dict()[name].double()).float()
            for name, weight in one.state_dict().items()
        }
        assert all(torch.equal(weight, expected[name]) for name, weight in soup.network.state_dict().items())
        assert not any(weight.requires_grad for weight in soup.network.parameters())
        assert torch.equal(says(soup, network), at(network, expected))


def test_a_soup_of_other_networks_names_the_first_tensor_that_does_not_fit() -> None:
    small, large = TinyNetwork(width=8).state_dict(), TinyNetwork(width=16).state_dict()
    with pytest.raises(ValueError, match=r"model 1 does not fit model 0: places is \(6, 16\) in the one, \(6, 8\)"):
        average([small, large])
    with pytest.raises(ValueError, match="the soup does not fit the network: places"):
        Soup(TinyNetwork(width=16), small)
    adapters = TinyNetwork(rank=2).state_dict()
    with pytest.raises(ValueError, match="model 1 has blocks.0.down.weight, model 0 does not"):
        average([TinyNetwork().state_dict(), adapters])
    with pytest.raises(ValueError, match="cannot be shares of an average"):
        average([small, small], [1.0, -0.5])


# -- the config --------------------------------------------------------------------------------------------------------


def resolved(values: dict[str, Any]) -> str:
    settings = build(train.Settings, values)
    return references.resolve(settings.reference, bind_objective(settings.objective), settings.model)


def test_a_word_or_a_section(tmp_path: Path) -> None:
    assert build(train.Settings, {"reference": "ema"}).reference == ReferenceSettings(kind="ema")
    section = {"kind": "pool", "choice": "latest", "every": 7}
    settings = build(train.Settings, {"reference": section})
    assert settings.reference == ReferenceSettings(kind="pool", choice="latest", every=7)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    assert load(train.Settings, path) == settings
    overridden = load(train.Settings, None, ["reference.kind=ema", "reference.decay=0.5"])
    assert overridden.reference == ReferenceSettings(kind="ema", decay=0.5)


def test_every_kind_trains_a_diffusion_model_from_a_config(tmp_path: Path) -> None:
    base, other = (str(tiny.stable_diffusion(tmp_path / f"model{seed}", seed=seed)) for seed in (0, 1))
    data_sets.write_pairs(tmp_path / "pairs", 6)
    losses = {}
    for section, lora in (
        ("copy", None),
        ({"kind": "ema", "decay": 0.5}, None),
        ({"kind": "pool", "choice": "uniform", "every": 1}, {"rank": 2}),
        ({"kind": "soup", "models": [base, other]}, {"rank": 2}),
    ):
        kind = section if isinstance(section, str) else section["kind"]
        result = mmalign.train(
            {
                "output": str(tmp_path / kind),
                "data": {"shards": str(tmp_path / "pairs")},
                "model": {"path": base, "lora": lora},
                "objective": {"name": "dpo", "beta": 100},
                "reference": section,
                "training": {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "trackers": []},
                "device": "cpu",
            }
        )
        assert result.findings == []
        losses[kind] = [row["loss"] for row in curve(tmp_path / kind)]
        assert (result.checkpoint / "reference.safetensors").is_file() == (kind in ("ema", "pool"))
    assert all(losses[kind][0] == pytest.approx(math.log(2), abs=1e-5) for kind in ("copy", "ema", "pool"))
    # The average has gone half of the way that the policy went, so that half of the log-ratio is left.
    assert losses["copy"][1] < losses["ema"][1] < math.log(2)
    assert abs(losses["soup"][0] - math.log(2)) > 1e-3
    assert len(list((tmp_path / "pool" / "pool").iterdir())) == 4


def test_what_auto_stands_for() -> None:
    assert resolved({}) == "copy"
    assert resolved({"model": {"lora": {"rank": 2}}}) == "adapter_off"
    assert resolved({"objective": {"name": "sft"}}) == "none"
    assert resolved({"reference": "ema"}) == "ema"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reference": "none"}, "objective dpo needs one"),
        ({"reference": "adapter_off"}, r"set model\.lora"),
        ({"reference": "cached"}, "draws timestep and noise anew in each epoch"),
        ({"reference": "emma"}, r"reference\.kind is 'emma'"),
        ({"reference": {"kind": "ema", "decai": 0.9}}, r"did you mean reference\.decay\?"),
        ({"reference": {"kind": "ema", "decay": 1.0}}, "reference.decay is 1.0; expected a number between 0 and 1"),
        ({"reference": {"kind": "pool", "every": 0}}, "reference.every is 0"),
        (
            {"reference": {"kind": "pool", "decay": 0.9}},
            "reference.decay belongs to reference.kind ema; here it is pool",
        ),
        ({"reference": {"kind": "soup"}}, "list two or more in reference.models"),
        ({"reference": {"kind": "soup", "models": ["a", "b"], "weights": [1.0]}}, "expected 2 numbers of at least 0"),
        ({"reference": {"kind": "soup", "models": ["a"], "weights": [-1.0]}}, "expected 1 numbers of at least 0"),
    ],
)
def test_references_that_cannot_work_fail_when_the_config_is_read(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(values)


def test_a_pool_without_a_shelf_draws_nothing() -> None:
    with pytest.raises(ValueError, match="needs a shelf"):
        Pool(TinyNetwork(), "uniform", 3)
    with pytest.raises(ValueError, match=r"reference\.every is 0"):
        Pool(TinyNetwork(), "first", 0)
    with pytest.raises(ValueError, match=r"reference\.decay is 1"):
        Ema(TinyNetwork(), 1.0)
