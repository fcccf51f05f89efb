"""Loading pipelines: folders and settings that cannot be trained are refused with one clear message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.core.types import Sample
from mmalign.modalities import diffusion, tiny
from mmalign.modalities.diffusion import DiffusionModality, DiffusionSampling, DiffusionSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("pipeline"))


def load(path: Path, **settings: Any) -> tuple[DiffusionModality, Any]:
    chosen = {"gradient_checkpointing": "off", **settings}
    return diffusion.load(DiffusionSettings(path=str(path), **chosen), CPU)


def test_bad_folders_are_refused(folder, tmp_path):
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub name"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        load(tmp_path / "empty")
    other = damaged("other")
    edit(other / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match="is a FluxPipeline; expected a StableDiffusionPipeline or a"):
        load(other)
    inpainting = damaged("inpainting")
    edit(inpainting / "unet" / "config.json", in_channels=9)
    with pytest.raises(ValueError, match="reads 9 channels and its VAE makes 4"):
        load(inpainting)
    direct = damaged("direct")
    edit(direct / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        load(direct)
    incomplete = damaged("incomplete")
    (incomplete / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is incomplete"):
        load(incomplete)
    bare = damaged("bare")
    (bare / "unet" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no configuration of its unet"):
        load(bare)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flash"}, "model.attention is 'flash'; expected one of auto, sdpa, xformers"),
        ({"crop": "left"}, "model.crop is 'left'"),
        ({"gradient_checkpointing": "maybe"}, "model.gradient_checkpointing is 'maybe'"),
        ({"flip": 2.0}, r"model.flip is 2.0; expected a share in \[0, 1\]"),
        ({"caption_dropout": -0.1}, "model.caption_dropout is -0.1"),
        ({"resolution": 0}, "model.resolution is 0"),
        ({"resolution": 15}, "model.resolution is 15; this VAE needs a multiple of 2"),
        ({"weighting": "snr"}, "model.weighting is 'snr'"),
    ],
)
def test_bad_settings_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **settings)


def test_bad_sampling_is_refused(folder):
    modality, network = load(folder)
    with pytest.raises(ValueError, match="sampling.inference_steps is 0"):
        DiffusionSampling(inference_steps=0)
    with pytest.raises(ValueError, match="2 prompts came with 1 seeds"):
        modality.generate(network, ["a", "b"], [1], DiffusionSampling())


def test_attention_backends(folder):
    _, automatic = load(folder)
    _, fused = load(folder, attention="sdpa")
    modality, _ = load(folder)
    tensors = {"mean": torch.zeros(4, 8, 8), "std": torch.ones(4, 8, 8)}
    inputs = modality.prepare([Sample("k", "a", 0, 1, tensors=tensors)])
    assert torch.equal(modality.log_prob(automatic, inputs).values, modality.log_prob(fused, inputs).values)
    with pytest.raises(ValueError, match="which is not installed"):
        load(folder, attention="xformers")
