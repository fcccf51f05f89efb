"""Rollouts: what is drawn, where rewards stand, the sign of the KL, advantages over real actions, exact resumes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from mmalign.core.advantage import leave_one_out, normalise
from mmalign.core.objectives import bind_objective
from mmalign.core.reference import Cached, FrozenCopy, NoReference
from mmalign.core.types import LogProbs, Sample
from mmalign.data.reader import Geometry, Step
from mmalign.training import TIMING, read_rows, shaping, train
from mmalign.training.critic import Critic, CriticSettings
from mmalign.training.drawn import placed
from mmalign.training.rollout import Rollouts, RolloutSettings
from mmalign.training.rollout_settings import check_published
from tests.tiny_modality import TinyNetwork
from tests.tiny_rollouts import (
    CRITIC,
    PROMPTS,
    ROLLOUT,
    TRAINING,
    PickyModality,
    ValueNetwork,
    arguments,
    matches,
    new_critic,
    rollouts,
    run,
    values_of,
)
from tests.two_processes import run_on_two

GEOMETRY = Geometry(rank=0, ranks=1, micro_batch_size=4, accumulation=2)
PLAIN = dataclasses.replace(ROLLOUT, kl_coefficient=0.0, whiten=False)


def steps(source: Rollouts, count: int) -> list[Step]:
    return list(itertools.islice(source.steps(GEOMETRY), count))


def samples_of(found: list[Step]) -> list[Sample]:
    return [sample for step in found for rows in step.micro_batches for (sample,) in rows]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def row(*values: float) -> LogProbs:
    return LogProbs(tensor(*values)[None], torch.ones(1, len(values), dtype=torch.float64))


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_an_iteration_is_every_sample_once_per_epoch_and_samples_of_a_prompt_stay_together() -> None:
    found = steps(rollouts(TinyNetwork()), 8)  # 4 prompts x 4 samples / 8 per step = 2 steps, twice: an iteration of 4
    for first in (0, 4):
        passes = [samples_of(found[first : first + 2]), samples_of(found[first + 2 : first + 4])]
        texts = [sorted((sample.group, sample.text) for sample in one) for one in passes]
        assert texts[0] == texts[1]
        for one in passes:
            groups = [sample.group for sample in one]
            assert len(set(groups)) == 4
            assert [len(list(run)) for _, run in itertools.groupby(groups)] == [4] * 4
    groups = [{sample.group for sample in samples_of(found[first : first + 4])} for first in (0, 4)]
    assert groups == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    # 8 prompts, 4 in an iteration: two iterations ask each once
    assert {sample.key for sample in samples_of(found)} == {sample.key for sample in PROMPTS}
    assert [step.position for step in found] == list(range(0, 64, 8))
    assert len({sample.text for sample in samples_of(found[:2])}) > 4


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    one, again = (steps(rollouts(TinyNetwork()), 4) for _ in range(2))
    other = steps(rollouts(TinyNetwork(), training=dataclasses.replace(TRAINING, seed=1)), 4)
    chunks = steps(rollouts(TinyNetwork(), dataclasses.replace(ROLLOUT, generate_batch_size=16)), 4)
    texts = [[sample.text for sample in samples_of(found)] for found in (one, again, other, chunks)]
    assert texts[0] == texts[1] == texts[3]
    assert texts[0] != texts[2]


def test_samples_carry_what_was_measured_of_real_actions() -> None:
    network = TinyNetwork()
    sample = next(s for s in samples_of(steps(rollouts(network, critic=new_critic()), 2)) if len(s.text or "") < 6)
    actions = len(sample.text or "")
    kept = {"old_values", "reference_values", "critic_values", "advantage", "returns", "reward"}
    assert set(sample.tensors) == kept
    assert {tuple(one.shape) for one in sample.tensors.values()} == {(actions,)}
    logits = network(torch.tensor([int(sample.prompt)]))[0].log_softmax(-1)
    expected = [logits[place, int(digit)].item() for place, digit in enumerate(sample.text or "")]
    assert sample.tensors["old_values"].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(sample.tensors["old_values"], sample.tensors["reference_values"])
    assert sample.score == (sample.text or "").count(sample.prompt)


def test_the_policy_samples_without_dropout_and_trains_on() -> None:
    network = TinyNetwork(dropout=0.5).train()
    plain = TinyNetwork()
    plain.load_state_dict(network.state_dict())
    found, expected = (samples_of(steps(rollouts(one), 1)) for one in (network, plain))
    assert network.training
    for sample, twin in zip(found, expected, strict=True):
        assert torch.equal(sample.tensors["old_values"], twin.tensors["old_values"])


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_a_dense_score_stays_where_it_is_and_a_single_number_stands_at_the_last_action() -> None:
    assert placed(torch.tensor(2.5), 4, "a").tolist() == [0, 0, 0, 2.5]
    assert placed(torch.tensor(2.5), 1, "a").tolist() == [2.5]
    assert placed(torch.tensor([1.0, -1.0, 0.0]), 3, "a").tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match=r"score of sample a has the shape \(2,\); expected \(3,\)"):
        placed(torch.tensor([1.0, 2.0]), 3, "a")
    with pytest.raises(ValueError, match="score of sample b is not finite"):
        placed(torch.tensor([1.0, math.nan]), 2, "b")


def test_dense_and_terminal_rewards_give_the_advantages_of_their_places() -> None:
    """Without critic, KL and whitening the advantage at gamma = lambda = 1 is the reward that is still to come."""
    dense = samples_of(steps(rollouts(TinyNetwork(), PLAIN), 2))
    for sample in dense:
        hits = [float(digit == sample.prompt) for digit in sample.text or ""]
        assert sample.tensors["advantage"].tolist() == [sum(hits[place:]) for place in range(len(hits))]

    def total(samples):
        return [one.sum() for one in matches(samples)]

    terminal = samples_of(steps(rollouts(TinyNetwork(), PLAIN, score=total), 2))
    for sample, twin in zip(terminal, dense, strict=True):
        assert sample.text == twin.text
        assert sample.tensors["reward"].tolist() == [0.0] * (len(sample.text or "") - 1) + [sample.score]
        assert sample.tensors["advantage"].tolist() == [sample.score] * len(sample.text or "")
    different = [
        one.tensors["advantage"].tolist() != two.tensors["advantage"].tolist()
        for one, two in zip(dense, terminal, strict=True)
    ]
    assert any(different)


def test_gae_runs_over_real_actions_alone() -> None:
    """delta = r + gamma v' - v and A = delta + gamma lambda A' by hand, for responses of several lengths."""
    network, critic = TinyNetwork(), Critic(ValueNetwork(), values_of)
    torch.nn.init.normal_(critic.network.get_parameter("head.weight"), generator=torch.Generator().manual_seed(0))
    settings = dataclasses.replace(PLAIN, gamma=0.9, lambda_=0.7)
    found = samples_of(steps(rollouts(network, settings, critic=critic), 2))
    assert len({len(sample.text or "") for sample in found}) > 1
    for sample in found:
        rewards, values = sample.tensors["reward"].tolist(), [*sample.tensors["critic_values"].tolist(), 0.0]
        advantage = 0.0
        for place in reversed(range(len(rewards))):
            advantage = rewards[place] + 0.9 * values[place + 1] - values[place] + 0.9 * 0.7 * advantage
            assert sample.tensors["advantage"][place].item() == pytest.approx(advantage, abs=1e-5)
            assert sample.tensors["returns"][place].item() == pytest.approx(advantage + values[place], abs=1e-5)


def test_whitening_looks_at_all_real_actions_of_the_rollout() -> None:
    found = samples_of(steps(rollouts(TinyNetwork(), dataclasses.replace(PLAIN, whiten=True)), 2))
    plain = samples_of(steps(rollouts(TinyNetwork(), PLAIN), 2))
    together = torch.cat([sample.tensors["advantage"] for sample in found])
    raw = torch.cat([sample.tensors["advantage"] for sample in plain])
    assert len(together) < 16 * 6
    assert together.tolist() == pytest.approx(((raw - raw.mean()) / raw.std(correction=0)).tolist(), abs=1e-5)


def test_rewards_of_groups_are_compared_without_a_critic() -> None:
    for name, function in (("normalise", normalise), ("leave_one_out", leave_one_out)):
        settings = dataclasses.replace(PLAIN, advantage=name)
        found = samples_of(steps(rollouts(TinyNetwork(), settings), 2))
        scores = torch.tensor([sample.score for sample in found])
        expected = function(scores, torch.tensor([sample.group for sample in found]))
        advantages = torch.stack([sample.tensors["advantage"] for sample in found])
        assert advantages.tolist() == pytest.approx(expected.tolist())


# -- the KL ------------------------------------------------------------------------------------------------------------


def test_the_kl_costs_reward() -> None:
    """Scores 1, 0, 2; l_old - l_ref = 0.5, -1, 0; kappa 0.1: what became likelier loses, what became rarer gains, or
    nothing where the penalty is one-sided."""
    scores, old, reference = row(1.0, 0.0, 2.0), row(-1.0, -2.0, -3.0), row(-1.5, -1.0, -3.0)
    assert shaping.penalised(scores.values, old, reference, 0.1)[0].tolist() == pytest.approx([0.95, 0.1, 2.0])
    one_sided = shaping.penalised(scores.values, old, reference, 0.1, one_sided=True)
    assert one_sided[0].tolist() == pytest.approx([0.95, 0.0, 2.0])
    padded = LogProbs(old.values, tensor(1.0, 1.0, 0.0)[None])
    assert shaping.penalised(scores.values, padded, reference, 0.1)[0].tolist() == pytest.approx([0.95, 0.1, 0.0])
    assert torch.equal(shaping.penalised(scores.values, old, None, 0.1), scores.values)


@pytest.mark.parametrize("one_sided", [False, True])
def test_a_policy_that_has_drifted_gets_less_reward(one_sided: bool) -> None:
    """The reward of a whole sample is then -kappa sum(l_old - l_ref), on average -kappa KL: below 0."""
    network = TinyNetwork()
    reference = FrozenCopy(network)
    with torch.no_grad():
        network.head.bias[3] += 2.0
    settings = dataclasses.replace(PLAIN, kl_coefficient=0.5, one_sided=one_sided, prompts=16)

    def nothing(samples):
        return [torch.tensor(0.0) for _ in samples]

    found = steps(rollouts(network, settings, reference=reference, score=nothing), 8)
    rewards = []
    for sample in samples_of(found):
        drift = sample.tensors["old_values"] - sample.tensors["reference_values"]
        expected = -0.5 * (drift.clamp_min(0) if one_sided else drift).sum()
        rewards.append(sample.tensors["advantage"][0].item())
        assert rewards[-1] == pytest.approx(expected.item(), abs=1e-5)
    kl = found[0].metrics["rollout/kl"]
    assert kl > 0.5
    assert sum(rewards) / len(rewards) <= -0.5 * kl + 1e-6


def test_an_adaptive_coefficient_follows_its_target() -> None:
    """e is (KL - target)/target, at most 0.2 either way; kappa <- kappa (1 + 0.1 e)."""
    assert shaping.adapted(0.1, 6.6, 6.0) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert shaping.adapted(0.1, 60.0, 6.0) == pytest.approx(0.1 * 1.02)
    assert shaping.adapted(0.1, 0.0, 6.0) == pytest.approx(0.1 * 0.98)
    source = rollouts(TinyNetwork(), dataclasses.replace(ROLLOUT, kl="adaptive"))
    found = steps(source, 5)
    assert [step.metrics["rollout/kl_coefficient"] for step in found] == pytest.approx([0.05] * 4 + [0.05 * 0.98])


def test_explained_variance_in_numbers() -> None:
    returns = tensor(1.0, 2.0, 3.0)  # variance 2/3
    assert shaping.explained_variance(returns, returns) == 1.0
    assert shaping.explained_variance(returns, tensor(2.0, 2.0, 2.0)) == 0.0
    assert shaping.explained_variance(returns, tensor(1.0, 2.0, 4.0)) == pytest.approx(1 - (2 / 9) / (2 / 3))
    assert shaping.explained_variance(tensor(1.0, 1.0), tensor(0.0, 3.0)) == 0.0
    assert shaping.whitened(row(3.0).values, torch.ones(1, 1, dtype=torch.bool)).tolist() == [[0.0]]


def test_without_a_reference_there_is_no_penalty() -> None:
    sample = samples_of(steps(rollouts(TinyNetwork(), PLAIN, reference=NoReference()), 1))[0]
    assert "reference_values" not in sample.tensors
    with pytest.raises(ValueError, match="kl_coefficient is 0.05, but there is no reference"):
        rollouts(TinyNetwork(), reference=NoReference())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": 0}, "rollout.prompts is 0; expected 1 or more"),
        ({"gamma": 1.5}, r"rollout.gamma is 1.5; expected a number in \[0, 1\]"),
        ({"kl_coefficient": -0.1}, "rollout.kl_coefficient is -0.1"),
        ({"kl_coefficient": 0.0, "kl": "adaptive"}, "above 0, for it is multiplied"),
        ({"advantage": "normalise", "samples_per_prompt": 1}, "samples_per_prompt is 1; set it to 2 or more"),
        ({"reproduce_published": True}, "rollout.prompts is 4, published is 512"),
    ],
)
def test_settings_that_cannot_work(changed, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ROLLOUT, **changed)


def test_the_published_constants_are_the_defaults() -> None:
    settings = RolloutSettings(reproduce_published=True)
    training = dataclasses.replace(TRAINING, learning_rate=1e-7)
    settings.check(training, CriticSettings())
    with pytest.raises(ValueError, match=r"training.learning_rate is 0.01, published is 1e-07"):
        settings.check(TRAINING, CriticSettings())
    with pytest.raises(ValueError, match=r"critic.clip is None, published is 0.2"):
        settings.check(training, CriticSettings(clip=None))
    with pytest.raises(ValueError, match="needs a value model"):
        settings.check(training, None)
    ppo = bind_objective({"name": "ppo"}).terms[0]
    check_published({"objective": {"name": ppo.name, **ppo.parameters}})
    with pytest.raises(ValueError, match="objective.name is 'grpo'"):
        check_published({"objective": {"name": "grpo"}})


def test_what_does_not_go_together_is_refused_before_anything_is_drawn() -> None:
    network = TinyNetwork()
    with pytest.raises(ValueError, match="4 x samples_per_prompt 3 is no multiple of training.batch_size 8"):
        rollouts(network, dataclasses.replace(ROLLOUT, samples_per_prompt=3))
    with pytest.raises(ValueError, match="uses no value model"):
        rollouts(network, dataclasses.replace(ROLLOUT, advantage="centre"), critic=new_critic())
    with pytest.raises(ValueError, match="fp16 does not go with a value model"):
        rollouts(network, training=dataclasses.replace(TRAINING, mixed_precision="fp16"), critic=new_critic())
    with pytest.raises(ValueError, match="no prompts"):
        rollouts(network, prompts=[])
    with pytest.raises(ValueError, match="nothing is stored for rollouts"):
        rollouts(network, reference=Cached({"reference": {}}, {}, len))


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="gave 1 scores for 16 samples"):
        steps(rollouts(TinyNetwork(), score=lambda samples: [torch.tensor(0.0)]), 1)
    with pytest.raises(ValueError, match="score of sample prompt-"):
        steps(rollouts(TinyNetwork(), score=lambda samples: [torch.zeros(7) for _ in samples]), 1)


def test_samples_that_the_modality_refuses_are_counted_and_left_out(tmp_path: Path) -> None:
    """Of 8 prompts with 4 samples each, two are refused; the others are those that are drawn without them."""
    network, modality = TinyNetwork(), PickyModality()
    critic = new_critic(dataclasses.replace(CRITIC, warmup_epochs=1))
    source = rollouts(network, critic=critic, modality=modality)
    found = samples_of(steps(source, 2))
    assert {sample.prompt for sample in found}.isdisjoint({"3", "5"})
    plain = {sample.text for sample in samples_of(steps(rollouts(TinyNetwork()), 2))}
    assert {sample.text for sample in found} <= plain
    source = rollouts(network, critic=new_critic(), modality=modality)
    result = train(modality, network, NoReference(), bind_objective({"name": "ppo"}), source, TRAINING, tmp_path)
    assert result.errors == {"missing_image": 4, "overlong": 4}
    assert any("8 records were skipped" in finding for finding in result.findings)
    assert all(math.isfinite(row["loss"]) for row in curve(tmp_path))
    only = [sample for sample in PROMPTS if sample.prompt in "35"]
    with pytest.raises(ValueError, match="none of the 16 samples of a rollout can be used; the first: "):
        steps(rollouts(network, prompts=only, modality=modality), 1)


# -- resumes and processes ---------------------------------------------------------------------------------------------


def curve(folder: Path) -> list[dict[str, float]]:
    return [{key: row[key] for key in row if key not in TIMING} for row in read_rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("stop", "with_critic"), [(4, True), (6, True), (6, False)])
def test_resume_is_exact_between_rollouts_and_inside_one(tmp_path: Path, stop: int, with_critic: bool) -> None:
    """An iteration has 4 steps. Weights, moments, critic, samples and the adaptive coefficient: all to the bit."""
    training = dataclasses.replace(TRAINING, max_steps=10, warmup_steps=3)
    rollout = dataclasses.replace(ROLLOUT, kl="adaptive", kl_target=0.01)

    def go(name: str, training=training, resume=None):
        critic = new_critic(dropout=0.2) if with_critic else None
        return run(tmp_path / name, training, rollout, critic=critic, network=TinyNetwork(dropout=0.2), resume=resume)

    whole = go("whole")
    go("parts", dataclasses.replace(training, max_steps=stop))
    held = (tmp_path / "parts" / f"checkpoint-{stop}" / "rollout.safetensors").is_file()
    assert held == (with_critic or stop == 6)
    torch.manual_seed(99)
    parts = go("parts", resume="latest")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    for file in whole.checkpoint.iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (parts.checkpoint / file.name).read_bytes(), file.name


def test_a_resume_with_other_rollouts_is_refused(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(TRAINING, max_steps=1))
    with pytest.raises(ValueError, match="has rollout.epochs 2, this run 3; set it back"):
        run(tmp_path, rollout=dataclasses.replace(ROLLOUT, epochs=3), resume="latest")
    with pytest.raises(ValueError, match="has critic False, this run True"):
        run(tmp_path, critic=new_critic(), resume="latest")


def test_rows_tell_of_the_rollout(tmp_path: Path) -> None:
    result = run(tmp_path, dataclasses.replace(TRAINING, log_every=3), critic=new_critic())
    names = {"reward", "reward_std", "length", "kl", "kl_coefficient"}
    names |= {f"{kind}_seconds" for kind in ("generate", "score", "measure", "train")}
    for found in read_rows(tmp_path / "metrics.jsonl"):
        assert {f"rollout/{name}" for name in names} <= found.keys()
        assert {"critic/loss", "critic/explained_variance", "clip_fraction", "kl"} <= found.keys()
        assert found["data_wait"] < 0.5
    assert result.findings == []


def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    training = dataclasses.replace(TRAINING, max_steps=6, micro_batch_size=2)
    network = TinyNetwork().double()
    run(tmp_path / "one", training, critic=new_critic(dtype=torch.float64), network=network)
    half = dataclasses.replace(training, max_steps=3)
    run_on_two(
        "tests.tiny_rollouts",
        arguments(tmp_path / "two", half, ROLLOUT, True),
        arguments(tmp_path / "two", training, ROLLOUT, True, resume="latest"),
    )
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) == 6
    for found, twin in zip(one, two, strict=True):
        # values are kept in fp32
        assert found == pytest.approx(twin, abs=1e-5)
