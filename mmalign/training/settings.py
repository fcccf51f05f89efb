"""The `training:` section of a config, checked when it is read. Refuses values that could only fail later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmalign.data.reader import Geometry


@dataclass(frozen=True)
class TrainingSettings:
    # seeds the order of the records and every random draw
    seed: int = 0
    # optimizer steps in all, those before a resume included
    max_steps: int = 1000
    # pairs (or liked samples) per optimizer step, over all processes
    batch_size: int = 16
    # pairs per forward pass of one process; null: batch_size / processes, without gradient accumulation
    micro_batch_size: int | None = None
    # at its highest, after the warm-up
    learning_rate: float = 1e-5
    # adamw_8bit needs bitsandbytes and a GPU
    optimizer: Literal["adamw", "adafactor", "adamw_8bit"] = "adamw"
    # decay of the two moments of adamw
    betas: tuple[float, float] = (0.9, 0.999)
    # decoupled from the gradient
    weight_decay: float = 0.01
    # steps in which the learning rate rises linearly from 0
    warmup_steps: int = 0
    # after the warm-up: constant, or falling to 0 at max_steps along a line or half a cosine
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    # gradients are scaled down to this norm; null: never
    max_grad_norm: float | None = 1.0
    # precision of the forward passes; the trainable weights themselves stay in float32
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    # with several processes: ddp keeps a whole copy in each, fsdp2 shards weights, gradients and optimizer
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    # optimizer steps between checkpoints; one is always written at the end and on SIGTERM
    checkpoint_every: int = 500
    # the newest ones that stay on disk
    keep_checkpoints: int = 2
    # optimizer steps between rows of metrics.jsonl; a row holds the values of its own step
    log_every: int = 1
    # optimizer steps between sample grids; null: none
    sample_every: int | None = None
    # the prompts of the sample grids
    sample_prompts: tuple[str, ...] = ()
    # one row of pictures per seed
    sample_seeds: tuple[int, ...] = (0,)
    # steps without a finite loss and gradient, or without any valid record, before the run stops
    max_skipped_steps: int = 10
    # where metrics go besides metrics.jsonl: tensorboard, wandb
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        for key in ("max_steps", "batch_size", "checkpoint_every", "keep_checkpoints", "log_every"):
            _check(key, getattr(self, key), getattr(self, key) >= 1, "1 or more")
        for key in ("micro_batch_size", "sample_every"):
            value = getattr(self, key)
            _check(key, value, value is None or value >= 1, "1 or more, or null")
        for key in ("weight_decay", "warmup_steps", "max_skipped_steps", "seed"):
            _check(key, getattr(self, key), getattr(self, key) >= 0, "0 or more")
        _check("learning_rate", self.learning_rate, self.learning_rate > 0, "above 0")
        _check("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        _check("max_grad_norm", self.max_grad_norm, self.max_grad_norm is None or self.max_grad_norm > 0, "above 0")
        _check("sample_prompts", self.sample_prompts, self.sample_every is None or self.sample_prompts, "some prompts")
        _check("sample_seeds", self.sample_seeds, self.sample_every is None or self.sample_seeds, "some seeds")
        if self.sharding == "fsdp2" and (self.mixed_precision == "fp16" or self.optimizer != "adamw"):
            raise ValueError(
                f"training.sharding fsdp2 with optimizer {self.optimizer} and mixed_precision {self.mixed_precision}: "
                "sharded weights need optimizer adamw and mixed_precision no or bf16"
            )

    def geometry(self, rank: int = 0, ranks: int = 1) -> Geometry:
        """How one optimizer step is divided among processes and micro-batches."""
        micro = self.micro_batch_size or max(self.batch_size // ranks, 1)
        accumulation, rest = divmod(self.batch_size, micro * ranks)
        if rest or not accumulation:
            raise ValueError(
                f"training.batch_size {self.batch_size} is not a multiple of micro_batch_size {micro} x {ranks} "
                f"processes; set training.batch_size to {max(accumulation, 1) * micro * ranks}, "
                "or another training.micro_batch_size"
            )
        return Geometry(rank=rank, ranks=ranks, micro_batch_size=micro, accumulation=accumulation)


def _check(key: str, value: object, valid: object, expected: str) -> None:
    if not valid:
        raise ValueError(f"training.{key} is {value!r}; expected {expected}")
