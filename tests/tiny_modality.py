"""The smallest real modality: texts of digits, and a network that knows their exact log-probs given the prompt.

A text of up to LENGTH digits is a sequence of actions; shorter ones are padded with weight 0. The network is a real
one, with blocks, dropout and adapters, so that DDP, FSDP2, LoRA-style references and resumes can be tried in seconds.
Run as a script it trains on shards, so that tests can kill it and launch it on several processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmalign.core.merging import average
from mmalign.core.objectives import bind_objective
from mmalign.core.reference import AdapterOff, Ema, FrozenCopy, NoReference, Pool, Reference, Soup
from mmalign.core.types import LogProbs, Pair, Sample, Unusable
from mmalign.data import ROWS, Candidate, DataSettings, Manifest, Record, RecordStream, ShardWriter
from mmalign.training import TrainingSettings, launch, train
from mmalign.training.checkpoint import Snapshots
from mmalign.training.distributed import leave
from mmalign.training.trainer import TrainingResult

DIGITS, LENGTH = 10, 6


class Block(nn.Module):
    def __init__(self, width: int, rank: int, dropout: float):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(width, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, width, bias=False) if rank else None
        self.adapter_on = True

    def forward(self, hidden: Tensor) -> Tensor:
        update = self.inner(hidden)
        if self.down is not None and self.up is not None and self.adapter_on:
            update = update + self.up(self.down(hidden))
        return hidden + self.dropout(torch.tanh(update))


class TinyNetwork(nn.Module):
    """Logits of the digit at every place, from the prompt's number. With a rank only the adapters learn."""

    def __init__(self, seed: int = 0, width: int = 16, rank: int = 0, dropout: float = 0.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.places = nn.Parameter(torch.randn(LENGTH, width))
            self.prompt = nn.Embedding(8, width)
            self.blocks = nn.ModuleList(Block(width, rank, dropout) for _ in range(2))
            self.head = nn.Linear(width, DIGITS)
        if rank:
            for name, weight in self.named_parameters():
                weight.requires_grad_(".down." in name or ".up." in name)
            for block in self.blocks:
                nn.init.zeros_(block.up.weight)  # pyright: ignore

    def forward(self, prompt: Int[Tensor, " sample"]) -> Float[Tensor, "sample place digit"]:
        hidden = self.prompt(prompt)[:, None] + self.places
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


@contextlib.contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    for block in blocks:
        block.adapter_on = False
    try:
        yield
    finally:
        for block in blocks:
            block.adapter_on = True


@dataclass(frozen=True)
class TinyInputs:
    prompt: Int[Tensor, " sample"]
    digits: Int[Tensor, "sample place"]
    weight: Float[Tensor, "sample place"]


class TinyModality:
    """`poison`: keys whose samples get a NaN, as a broken record would. `pause`: seconds that a batch takes longer.
    `refuse`: numbers of records that it cannot use."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        poison: Sequence[str] = (),
        pause: float = 0.0,
        refuse: Sequence[int] = (),
    ):
        self.truncated_prompts = 0
        self.empty_prompt = "0"
        self.dtype = dtype
        self.poison = poison
        self.pause = pause
        self.refuse = tuple(f"{number:06d}" for number in refuse)

    def prepare(self, samples: Sequence[Sample]) -> TinyInputs:
        time.sleep(self.pause)
        for sample in samples:
            if self.refuse and sample.key.endswith(self.refuse):
                raise Unusable("overlong", "too long", sample.key)
        self.truncated_prompts += sum(len(sample.text or "") > LENGTH for sample in samples)
        texts = [(sample.text or "")[:LENGTH] for sample in samples]
        weight = torch.tensor([[float(place < len(text)) for place in range(LENGTH)] for text in texts])
        for row, sample in enumerate(samples):
            if sample.key in self.poison:
                weight[row] = torch.nan
        return TinyInputs(
            prompt=torch.tensor([int(sample.prompt) for sample in samples]),
            digits=torch.tensor([[int(digit) for digit in text.ljust(LENGTH, "0")] for text in texts]),
            weight=weight.to(self.dtype),
        )

    def log_prob(self, network: nn.Module, inputs: TinyInputs) -> LogProbs:
        log_probs = network(inputs.prompt).to(self.dtype).log_softmax(-1)
        return LogProbs(log_probs.gather(-1, inputs.digits[..., None])[..., 0], inputs.weight)

    @torch.no_grad()
    def generate(self, network: nn.Module, prompts: Sequence[Any], seeds: Sequence[int], sampling: Any) -> list[Sample]:
        """The drawn digits, and a strip of grey values that shows them."""
        samples = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            probabilities = network(torch.tensor([int(prompt)]))[0].softmax(-1)
            digits = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))[:, 0].tolist()
            image = Image.frombytes("L", (LENGTH, 1), bytes(25 * digit for digit in digits)).convert("RGB")
            text = "".join(map(str, digits))
            samples.append(Sample(str(index), prompt, index, seed, image=image.resize((48, 48)), text=text))
        return samples

    def metrics(self, inputs: TinyInputs, policy: Pair, reference: Pair | None) -> dict[str, Tensor]:
        return {"length": inputs.weight.sum(-1).mean()}

    def export(self, network: nn.Module, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: dict[str, Any] = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            save_file(state, folder / "model.safetensors")


def write_pairs(folder: Path, count: int = 96, shards: int = 4, bad: Sequence[int] = ()) -> Path:
    """Pairs in which the chosen text repeats the prompt's number; records in `bad` carry no preference."""
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, records_per_shard=-(-count // shards)) as writer:
        for index in range(count):
            prompt = index % 8
            length = int(torch.randint(2, LENGTH + 1, (), generator=generator))
            noise = torch.randint(0, DIGITS, (length,), generator=generator).tolist()
            texts = (str(prompt) * length, "".join(map(str, noise)))
            writer.write(
                Record(
                    key=f"{index:06d}",
                    prompt=str(prompt),
                    candidates=[Candidate(text=text) for text in texts],
                    preferred=[] if index in bad else [(0, 1)],
                )
            )
    return folder


def soup(network: TinyNetwork) -> Soup:
    """The average of two other networks."""
    down = network.state_dict().get("blocks.0.down.weight")
    rank = 0 if down is None else len(down)
    return Soup(network, average([TinyNetwork(seed=seed, rank=rank).state_dict() for seed in (1, 2)]))


# References that tests and their processes call by name: made of the policy and the folder of the run.
REFERENCES: dict[str, Callable[[TinyNetwork, Path], Reference]] = {
    "ema": lambda network, folder: Ema(network, 0.8),
    "first": lambda network, folder: Pool(network, "first", every=2),
    "latest": lambda network, folder: Pool(network, "latest", every=2),
    "uniform": lambda network, folder: Pool(network, "uniform", 2, 3, Snapshots(folder, launch(cpu=True))),
    "soup": lambda network, folder: soup(network),
}


def run(
    shards: str | Path,
    folder: str | Path,
    settings: TrainingSettings,
    *,
    objective: Any = "dpo",
    rank: int = 0,
    workers: int = 0,
    resume: str | Path | None = None,
    poison: Sequence[str] = (),
    refuse: Sequence[int] = (),
    network: TinyNetwork | None = None,
    console: Any = None,
    max_bad_share: float = 0.5,
    pause: float = 0.0,
    reference: Reference | str | None = None,
) -> TrainingResult:
    """Trains a tiny network on shards of pairs. `pause` slows every step down, so that a test can interrupt it."""
    bound = bind_objective({"name": objective} if isinstance(objective, str) else objective)
    network = network or TinyNetwork(seed=settings.seed, rank=rank)
    dtype = next(network.parameters()).dtype
    stream = RecordStream(
        Manifest.read(str(shards)),
        DataSettings(shards=str(shards), workers=workers, window=2, max_bad_share=max_bad_share),
        settings.seed,
        need=frozenset(),
        collate=ROWS[bound.row],
    )
    modality = TinyModality(dtype, poison, pause, refuse)
    if isinstance(reference, str):
        reference = REFERENCES[reference](network, Path(folder))
    elif reference is None and not bound.needs_reference:
        reference = NoReference()
    elif reference is None:
        reference = AdapterOff(adapters_off) if rank else FrozenCopy(network)
    return train(
        modality,
        network,
        reference,
        bound,
        stream,
        settings,
        folder,
        resume=resume,
        describe={"training": asdict(settings)},
        console=console,
        sampling="greedy",
    )


def main() -> None:
    """One or more trainings, one after the other: arguments of `run` as JSON, `settings` as a mapping."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainings", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for text in args.trainings:
        options = json.loads(text)
        settings = TrainingSettings(**{"trackers": (), **options.pop("settings")})
        network = TinyNetwork(seed=settings.seed, rank=options.get("rank", 0), dropout=options.pop("dropout", 0.0)).to(
            getattr(torch, options.pop("dtype", "float32"))
        )
        result = run(**options, settings=settings, network=network)
        weights = list(network.parameters())
        report = {
            "steps": result.steps,
            "stopped": result.stopped,
            "errors": result.errors,
            "findings": result.findings,
            "held": sum(_local(weight).numel() for weight in weights) / sum(weight.numel() for weight in weights),
        }
        if launch().main:
            print(json.dumps(report), flush=True)
    leave()


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


if __name__ == "__main__":
    main()
