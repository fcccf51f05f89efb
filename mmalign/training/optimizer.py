"""The optimizer of a run, and the learning rate as a pure function of the step: nothing of the schedule is state."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import nn

from mmalign.training.settings import TrainingSettings


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name. Raises ValueError where there are none, or not in full precision."""
    found = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    if not found:
        raise ValueError("the network has no trainable parameter; check model.lora")
    low = {weight.dtype for weight in found.values()} - {torch.float32, torch.float64}
    if low:
        raise ValueError(
            f"trainable parameters are {', '.join(map(str, low))}: small updates would be rounded away; "
            "load them in float32 and set training.mixed_precision for speed"
        )
    return found


def build_optimizer(weights: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Raises ValueError where the optimizer cannot run on this machine."""
    learning_rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=learning_rate, betas=settings.betas, weight_decay=decay)
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(weights, lr=learning_rate, weight_decay=decay)
    if importlib.util.find_spec("bitsandbytes") is None or weights[0].device.type == "cpu":
        raise ValueError("training.optimizer adamw_8bit needs a GPU and bitsandbytes (mmalign[gpu]); try adamw")
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(weights, lr=learning_rate, betas=settings.betas, weight_decay=decay)


def learning_rate_at(settings: TrainingSettings, step: int) -> float:
    """The learning rate of the update that follows `step` earlier ones; never 0 before the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(settings.max_steps - settings.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.learning_rate * factor[settings.lr_scheduler_type]
