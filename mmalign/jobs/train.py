"""Aligns a model on shards of preferences.

    mmalign train configs/world_dpo.yaml
    mmalign train configs/sd15_dpo.yaml training.max_steps=100 --resume
    torchrun --nproc-per-node 8 -m mmalign train configs/sdxl_dpo_lora.yaml

Writes checkpoints, metrics.jsonl, config.yaml and, at the end, the finished model under `model/`: a whole pipeline, or
with LoRA the file that diffusers loads. Shards that `mmalign encode` made are trained from without a VAE in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from mmalign.config import to_dict
from mmalign.core.objectives import BoundObjective, bind_objective
from mmalign.core.reference import AdapterOff, FrozenCopy, NoReference, Reference
from mmalign.data import DataSettings, Manifest, RecordStream, liked, preference_pair
from mmalign.jobs.sources import with_shipped_model
from mmalign.modalities.diffusion import DiffusionModality, DiffusionSampling, DiffusionSettings, load
from mmalign.training import TrainingResult, TrainingSettings, launch
from mmalign.training import train as run_loop

POSITIONAL = ""
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    # the folder of the run
    output: str = "runs/train"
    data: DataSettings = field(default_factory=DataSettings)
    model: DiffusionSettings = field(default_factory=DiffusionSettings)
    # name: dpo, hinge, ipo, ln_dpo, sft; the other keys are the parameters of that objective
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "dpo"})
    # copy (a second network), adapter_off (LoRA), none; auto: what the objective and the model call for
    reference: Literal["auto", "copy", "adapter_off", "none"] = "auto"
    training: TrainingSettings = field(default_factory=TrainingSettings)
    # how the sample grids are drawn (training.sample_every)
    sampling: DiffusionSampling = field(default_factory=DiffusionSampling)
    # latest, or the path of a checkpoint; null starts anew
    resume: str | None = None
    # cpu, or auto: the accelerator of this process if there is one
    device: Literal["auto", "cpu"] = "auto"


def run(settings: Settings) -> TrainingResult:
    objective = bind_objective(settings.objective)
    kind = reference_kind(settings, objective)
    manifest = Manifest.read(settings.data.shards, settings.data.cache)
    from_latents = manifest.encoder is not None
    processes = launch(cpu=settings.device == "cpu")
    geometry = settings.training.geometry(processes.rank, processes.ranks)
    modality, network = load(
        with_shipped_model(settings.model),
        processes.device,
        DTYPES[settings.training.mixed_precision],
        need_vae=not from_latents or settings.training.sample_every is not None,
        samples=geometry.micro_batch_size * (1 if objective.chosen_only else 2),
        optimizer=settings.training.optimizer,
        frozen_copy=kind == "copy",
        seed=settings.training.seed,
    )
    if from_latents:
        modality.check_fingerprint(manifest.encoder)
    stream = RecordStream(
        manifest,
        settings.data,
        settings.training.seed,
        need=frozenset({"latent"}) if from_latents else frozenset({"image"}),
        collate=liked if objective.chosen_only else preference_pair,
    )
    return run_loop(
        modality=modality,
        network=network,
        reference=build_reference(kind, modality, network),
        objective=objective,
        stream=stream,
        settings=settings.training,
        folder=Path(settings.output),
        resume=settings.resume,
        describe=to_dict(settings),
        console=Console(),
        sampling=settings.sampling,
    )


def reference_kind(settings: Settings, objective: BoundObjective) -> str:
    """What `reference: auto` stands for; combinations that cannot work raise ValueError before anything is loaded."""
    has_adapter = settings.model.lora is not None
    kind = settings.reference
    if kind == "auto":
        kind = "none" if not objective.needs_reference else "adapter_off" if has_adapter else "copy"
    if kind == "none" and objective.needs_reference:
        raise ValueError(f"reference is none, but objective {objective.name} needs one; use auto, copy or adapter_off")
    if kind == "adapter_off" and not has_adapter:
        raise ValueError("reference is adapter_off, but nothing can be switched off; set model.lora or reference: copy")
    return kind


def build_reference(kind: str, modality: DiffusionModality, network: torch.nn.Module) -> Reference:
    if kind == "none":
        return NoReference()
    if kind == "copy":
        return FrozenCopy(network)
    assert modality.reference_switch is not None
    return AdapterOff(modality.reference_switch)
