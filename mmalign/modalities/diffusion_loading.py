"""Loading a Stable Diffusion pipeline (1.x, 2.x, XL) from a folder or a hub name, and making its network trainable.

Refused, each with one clear message: a path without a pipeline, another kind of pipeline, a network that needs inputs
which preference training does not have (inpainting, image conditions), and weights that are not safetensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmalign.modalities.adapters import LoraSettings, add_lora

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class DiffusionSettings:
    """The keys of `model:` for a diffusion model."""

    kind: Literal["diffusion"] = "diffusion"
    # folder or hub name of a diffusers pipeline; `world` is the one that ships with mmalign
    path: str = "world"
    # folder with pytorch_lora_weights.safetensors, merged into the network when it is loaded; null: none
    adapter: str | None = None
    # auto | sdpa | xformers
    attention: str = "auto"
    # auto (by a memory estimate) | on | off
    gradient_checkpointing: str | bool = "auto"
    # adapters to train instead of the whole network
    lora: LoraSettings | None = None
    # auto | eps_equivalent | native | elbo: the weight of each timestep; a beta holds for one weighting only
    weighting: str = "auto"
    # the share of samples that train with the empty prompt
    caption_dropout: float = 0.0
    # the share of samples that are mirrored
    flip: float = 0.0
    # centre | random: where an image that is not square is cropped
    crop: str = "centre"
    # side of the square that images are brought to, in pixels; null: what the network was made for
    resolution: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("attention", ("auto", "sdpa", "xformers")), ("crop", ("centre", "random"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.gradient_checkpointing not in ("auto", "on", "off", True, False):
            raise ValueError(
                f"model.gradient_checkpointing is {self.gradient_checkpointing!r}; expected auto, on or off"
            )
        for name in ("caption_dropout", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; expected a share in [0, 1]")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"model.resolution is {self.resolution}; expected pixels, or null")


@dataclass(frozen=True)
class PipelineConfig:
    """What the small JSON files of a pipeline say; no weights are read."""

    kind: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]

    @property
    def scale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def resolution(self, settings: DiffusionSettings) -> int:
        resolution = settings.resolution or self.unet["sample_size"] * self.scale
        if resolution % self.scale:
            raise ValueError(f"model.resolution is {resolution}; this VAE needs a multiple of {self.scale}")
        return resolution


def read_config(path: str) -> PipelineConfig:
    """The configuration of the pipeline at a folder or hub name, checked to be one that mmalign can train."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = _pipeline_kind(path)
    unet = _part_config(UNet2DConditionModel, path, "unet")
    vae = _part_config(AutoencoderKL, path, "vae")
    _check_network(path, kind, unet, vae)
    folders = ("text_encoder", "text_encoder_2") if kind == "StableDiffusionXLPipeline" else ("text_encoder",)
    return PipelineConfig(kind, unet, vae, tuple(_text_config(path, folder) for folder in folders))


def _part_config(part: Any, path: str, folder: str) -> dict[str, Any]:
    try:
        return dict(part.load_config(path, subfolder=folder))
    except OSError as error:
        raise FileNotFoundError(
            f"model.path {path} is incomplete: no configuration of its {folder} ({error})"
        ) from None


def _pipeline_kind(path: str) -> str:
    from diffusers import DiffusionPipeline

    folder, on_hub = Path(path), path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"model.path {path} has no model_index.json; expected the folder of a diffusers pipeline"
        )
    if not folder.is_dir() and not on_hub:
        raise FileNotFoundError(f"model.path {path} is neither a folder nor a hub name (owner/name)")
    try:
        index: Any = DiffusionPipeline.load_config(path)
        kind = index["_class_name"]
    except (OSError, KeyError) as error:
        raise FileNotFoundError(f"model.path {path} could not be read as a diffusers pipeline: {error}") from None
    if kind not in PIPELINES:
        raise ValueError(f"model.path {path} is a {kind}; expected a {' or a '.join(PIPELINES)}")
    return kind


def _check_network(path: str, kind: str, unet: dict[str, Any], vae: dict[str, Any]) -> None:
    expected = "text_time" if kind == "StableDiffusionXLPipeline" else None
    given, encoded, added = unet["in_channels"], vae["latent_channels"], unet.get("addition_embed_type")
    problems = (
        (given != encoded, f"reads {given} channels and its VAE makes {encoded} (an inpainting model?)"),
        (added != expected, f"has addition_embed_type {added!r} where a {kind} has {expected!r}"),
        (unet.get("class_embed_type") is not None, "has class embeddings"),
        (unet.get("time_cond_proj_dim") is not None, "expects a guidance embedding (a distilled model?)"),
        (vae.get("latents_mean") is not None, "has latents that are normalised by channel"),
    )
    for found, problem in problems:
        if found:
            raise ValueError(f"model.path {path}: the network {problem}; such models cannot be trained here")


def _text_config(path: str, folder: str) -> dict[str, Any]:
    from transformers import CLIPTextConfig

    return CLIPTextConfig.from_pretrained(path, subfolder=folder).to_dict()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Loading and saving without the libraries' own progress bars."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    shown = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown[0]:
            diffusers_logging.enable_progress_bar()
        if shown[1]:
            transformers_logging.enable_progress_bar()


def load_pipeline(path: str, config: PipelineConfig, network_dtype: torch.dtype, need_vae: bool) -> Any:
    """The pipeline on the CPU: the network in `network_dtype`, everything else in fp32; no VAE unless needed."""
    import diffusers

    left_out: dict[str, Any] = {} if need_vae else {"vae": None}
    if config.kind == "StableDiffusionPipeline":
        left_out |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with no_progress_bars():
            pipeline = getattr(diffusers, config.kind).from_pretrained(
                path,
                dtype={"unet": network_dtype, "default": torch.float32},
                use_safetensors=True,
                low_cpu_mem_usage=True,
                **left_out,
            )
    except OSError as error:
        raise FileNotFoundError(f"model.path {path} is incomplete (only safetensors are read): {error}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_vae(path: str) -> Any:
    from diffusers import AutoencoderKL

    with no_progress_bars():
        vae = AutoencoderKL.from_pretrained(path, subfolder="vae", dtype=torch.float32, use_safetensors=True)
    return vae.requires_grad_(False).eval()


def make_trainable(network: Any, settings: DiffusionSettings, checkpointing: bool, seed: int) -> nn.Module:
    """Adapters or all weights, the attention backend, and gradient checkpointing."""
    _set_attention(network, settings.attention)
    if settings.lora is None:
        network.requires_grad_(True)
    else:
        add_lora(network, settings.lora, seed)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()


def _set_attention(network: Any, attention: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    if attention == "sdpa":
        network.set_attn_processor(AttnProcessor2_0())
    if attention == "xformers":
        if importlib.util.find_spec("xformers") is None:
            raise ValueError(
                "model.attention is xformers, which is not installed; pip install 'mmalign[gpu]' or use sdpa"
            )
        network.enable_xformers_memory_efficient_attention()
