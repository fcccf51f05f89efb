"""What a user names as a trained model, for merges and soups: a pipeline, LoRA weights, or a checkpoint of a run.

Tensors are read when they are needed, one model at a time. Refused: the folder of a whole run, which holds several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmalign.core.merging import LowRankUpdates, WeightSum, normalised
from mmalign.jobs.models import with_shipped_model
from mmalign.modalities.adapters import WEIGHTS_FILE
from mmalign.modalities.diffusion import DiffusionSettings
from mmalign.modalities.merging import load_network, low_rank_updates, read_adapter

Method = Literal["average", "add"]
MODEL_FILE, STATE_FILE = "model.safetensors", "state.json"


@dataclass(frozen=True)
class Ingredient:
    """A trained model and how much of it is wanted."""

    path: str
    weight: float
    kind: Literal["pipeline", "adapter", "checkpoint", "adapter checkpoint"]

    @staticmethod
    def find(path: str, weight: float = 1.0) -> Ingredient:
        """What is at `path`; `world` is the pipeline that ships with mmalign. Reads no tensors."""
        folder = Path(path)
        if (folder / WEIGHTS_FILE).is_file():
            return Ingredient(path, weight, "adapter")
        if (folder / STATE_FILE).is_file():
            with safe_open(folder / MODEL_FILE, "pt") as file:
                is_adapter = any(".lora_A." in name for name in file.keys())  # noqa: SIM118  no mapping
            return Ingredient(path, weight, "adapter checkpoint" if is_adapter else "checkpoint")
        if (folder / "metrics.jsonl").is_file():
            raise ValueError(f"{path} is the folder of a whole run; name {folder / 'model'}, or one of its checkpoints")
        return Ingredient(with_shipped_model(DiffusionSettings(path=path)).path, weight, "pipeline")

    @property
    def is_adapter(self) -> bool:
        return self.kind in ("adapter", "adapter checkpoint")

    def weights(self) -> dict[str, Tensor]:
        """All weights of the network, on the CPU."""
        if self.kind == "checkpoint":
            return load_file(Path(self.path) / MODEL_FILE)
        return load_network(self.path).state_dict()

    def updates(self) -> LowRankUpdates:
        """What an adapter changes, by the name of the weight."""
        if self.kind == "adapter":
            return read_adapter(Path(self.path))
        alpha = _alpha(Path(self.path))
        return low_rank_updates(load_file(Path(self.path) / MODEL_FILE), lambda module, rank: alpha, self.path)


def _alpha(checkpoint: Path) -> float:
    """A checkpoint holds the factors alone; how they are scaled stands in the config of its run."""
    config = checkpoint.resolve().parent / "config.yaml"
    found = yaml.safe_load(config.read_text()) if config.is_file() else {}
    try:
        return float(found["model"]["lora"]["alpha"])
    except (KeyError, TypeError):
        raise ValueError(
            f"{checkpoint} is a checkpoint of adapters, and no {config} says their alpha; use the model/ of the run"
        ) from None


def mixed(method: Method, parts: Sequence[Ingredient], base: str | None) -> dict[str, Tensor]:
    """The weights of the network that `parts` make: their weighted `average`, or their differences from `base`
    `add`ed to it. An adapter is the difference itself, from `base`."""
    shares = normalised([part.weight for part in parts]) if method == "average" else [part.weight for part in parts]
    wanted = [(part, share) for part, share in zip(parts, shares, strict=True) if share]
    # Both ways come down to one sum: so much of the base, the models, and the updates.
    of_adapters = sum((share for part, share in wanted if part.is_adapter), 0.0)
    of_models = sum((share for part, share in wanted if not part.is_adapter), 0.0)
    of_base = of_adapters if method == "average" else 1.0 - of_models
    if base is None and (of_base or method == "add"):
        what = "add needs what to add to" if method == "add" else "adapters are differences from a model"
        raise ValueError(f"base is missing: {what}; set base to the pipeline that the models were trained from")
    total = WeightSum()
    if base is not None and of_base:
        total.add(base, Ingredient.find(base).weights(), of_base)
    for part, share in wanted:
        if not part.is_adapter:
            total.add(part.path, part.weights(), share)
    for part, share in wanted:
        if part.is_adapter:
            total.add_updates(part.path, part.updates(), share)
    return total.result()
