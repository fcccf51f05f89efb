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
from typing import Annotated, Any, Literal

import torch
from rich.console import Console

from mmalign.config import short_form, to_dict
from mmalign.core.objectives import bind_objective
from mmalign.data import DataSettings, Manifest, RecordStream, collate_for
from mmalign.jobs import references
from mmalign.jobs.feedback import check_feedback
from mmalign.jobs.references import ReferenceSettings
from mmalign.jobs.sources import with_shipped_model
from mmalign.modalities.diffusion import DiffusionSampling, DiffusionSettings, load
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
    # name: dpo, ...; the other keys are its parameters (see `mmalign objectives`). A list of such sections, each with
    # a weight, adds their losses: [{name: dpo, weight: 0.8}, {name: bco_pair, weight: 0.2}, {name: sft, weight: 1}]
    objective: dict[str, Any] | list[dict[str, Any]] = field(default_factory=lambda: {"name": "dpo"})
    # what the policy is held against
    reference: Annotated[ReferenceSettings, short_form("kind")] = field(default_factory=ReferenceSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    # how the sample grids are drawn (training.sample_every)
    sampling: DiffusionSampling = field(default_factory=DiffusionSampling)
    # latest, or the path of a checkpoint; null starts anew
    resume: str | None = None
    # cpu, or auto: the accelerator of this process if there is one
    device: Literal["auto", "cpu"] = "auto"


def run(settings: Settings) -> TrainingResult:
    objective = bind_objective(settings.objective)
    kind = references.resolve(settings.reference, objective, settings.model)
    manifest = Manifest.read(settings.data.shards, settings.data.cache)
    check_feedback(objective, manifest, settings.data, settings.training.seed)
    if objective.condition_dropout and settings.model.caption_dropout:
        raise ValueError(
            f"objective.condition_dropout {objective.condition_dropout} and model.caption_dropout "
            f"{settings.model.caption_dropout} would both take prompts away; set one of them to 0"
        )
    from_latents = manifest.encoder is not None
    processes = launch(cpu=settings.device == "cpu")
    geometry = settings.training.geometry(processes.rank, processes.ranks)
    modality, network = load(
        with_shipped_model(settings.model),
        processes.device,
        DTYPES[settings.training.mixed_precision],
        need_vae=not from_latents or settings.training.sample_every is not None,
        samples=geometry.micro_batch_size * objective.samples_per_row,
        optimizer=settings.training.optimizer,
        frozen_copy=references.holds_a_network(kind, settings.model),
        seed=settings.training.seed,
        ranks=processes.ranks if settings.training.sharding == "fsdp2" else 1,
    )
    if from_latents:
        modality.check_fingerprint(manifest.encoder)
    stream = RecordStream(
        manifest,
        settings.data,
        settings.training.seed,
        need=frozenset({"latent"}) if from_latents else frozenset({"image"}),
        collate=collate_for(objective.row, manifest.records, settings.data.curriculum, settings.data.reward_prompt),
    )
    return run_loop(
        modality=modality,
        network=network,
        reference=references.build(
            settings.reference,
            kind,
            modality,
            network,
            seed=settings.training.seed,
            folder=Path(settings.output),
            processes=processes,
        ),
        objective=objective,
        stream=stream,
        settings=settings.training,
        folder=Path(settings.output),
        resume=settings.resume,
        describe=to_dict(settings),
        console=Console(),
        sampling=settings.sampling,
    )
