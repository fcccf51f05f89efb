"""What an objective costs beside the networks: loss, metrics and the gradient down to the log-probs, as a share of a
training step of the demo (24 pairs of latents, policy forward and backward, frozen reference forward, AdamW).

    python scripts/benchmark_objectives.py

CPU time, medians, one thread, one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mmalign.core.labels import Labels
from mmalign.core.objectives import FAMILIES, bind_objective
from mmalign.core.reference import FrozenCopy
from mmalign.core.types import LogProbs, Sample
from mmalign.jobs.models import with_shipped_model
from mmalign.modalities.diffusion import DiffusionSettings, load

PAIRS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed")
    parser.add_argument("--repeats", type=int, default=50, help="evaluations of each objective")
    args = parser.parse_args()
    torch.set_num_threads(1)
    step, policy, reference, samples = training_step()
    seconds = median_of(step, args.steps)
    print(f"a step of {PAIRS} pairs: {seconds * 1e3:.0f} ms")
    labels = Labels.of(samples)
    worst = 0.0
    for table in FAMILIES.values():
        for name in table:
            objective = bind_objective({"name": name})

            def evaluate(objective=objective) -> None:
                values = policy.values.detach().requires_grad_()
                loss, _ = objective(LogProbs(values, policy.weight), reference, labels)
                torch.autograd.grad(loss, values)

            share = median_of(evaluate, args.repeats) / seconds
            worst = max(worst, share)
            print(f"{name:16} {share:.3%}")
    print(f"at most {worst:.3%}")


def training_step() -> tuple[Callable[[], None], LogProbs, LogProbs, list[Sample]]:
    """A step of the shipped pipeline on made-up latents, and log-probs of its samples."""
    modality, network = load(with_shipped_model(DiffusionSettings()), torch.device("cpu"), need_vae=False)
    anchor = FrozenCopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    objective = bind_objective({"name": "dpo", "beta": 150})
    samples = [sample(index % PAIRS, desirable=index < PAIRS) for index in range(2 * PAIRS)]
    labels = Labels.of(samples)

    def log_probs() -> tuple[LogProbs, LogProbs]:
        inputs = modality.prepare(samples)
        reference = anchor.log_prob(modality, network, inputs, samples)
        return modality.log_prob(network, inputs), reference

    def step() -> None:
        policy, reference = log_probs()
        objective(policy, reference, labels)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    policy, reference = log_probs()
    return step, policy.detach(), reference, samples


def sample(group: int, desirable: bool) -> Sample:
    generator = torch.Generator().manual_seed(2 * group + desirable)
    latents = {"mean": torch.randn(4, 8, 8, generator=generator), "std": torch.full((4, 8, 8), 0.01)}
    return Sample(
        str(group), "a red circle", group, group, tensors=latents, desirable=desirable, score=float(desirable)
    )


def median_of(run: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
