"""Scorers: how good is a sample, as one number. Higher is better.

A scorer maps samples to finite numbers, one each, or raises; it never hands on a NaN. Weights are read from local files
only: nothing here downloads, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from mmalign.core.types import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
Scorer = Callable[[Sequence[Sample]], list[float]]


def clip_score(
    weights: str | Path, architecture: str = "ViT-B-32", device: str = "cpu", batch_size: int = 32
) -> ClipScore:
    """A scorer: 100 x the cosine of a picture and its prompt in CLIP's space (arXiv 2104.08718, without its 2.5 and its
    cut at zero).

    `weights` is a local file, .safetensors or a torch file of tensors. `architecture` is a name that open_clip knows,
    e.g. ViT-H-14 or ViT-B-32-quickgelu, or the path of a model config in open_clip's JSON format. Raises
    FileNotFoundError without weights, ValueError where weights and architecture do not fit, or where the architecture
    would fetch a text tower or tokenizer from a model hub.
    """
    import open_clip

    path = Path(weights).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no CLIP weights at {path}; give a local file, nothing is downloaded")
    if path.suffix not in WEIGHT_FILES:
        raise ValueError(f"CLIP weights come as {', '.join(WEIGHT_FILES)}; got {path.name}")
    name = _known_architecture(architecture)
    try:
        # The absolute path cannot be taken for one of open_clip's tags, which would start a download.
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(path), device=device)
        _check_positions(path, model)
    except (RuntimeError, KeyError, AssertionError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ValueError(f"the weights in {path} do not fit the architecture {architecture}: {reason}") from error
    tokenizer = open_clip.get_tokenizer(name)
    return ClipScore(model.eval().requires_grad_(False), transform, tokenizer, device, batch_size)


def _check_positions(path: Path, model: Any) -> None:
    """open_clip stretches the position embeddings of another picture size or context length to fit, without a word."""
    from open_clip.factory import load_state_dict

    stored: Any = load_state_dict(str(path))
    wanted = model.state_dict()
    for key in ("visual.positional_embedding", "positional_embedding"):
        if key in stored and key in wanted and stored[key].shape != wanted[key].shape:
            raise RuntimeError(f"{key} is {tuple(stored[key].shape)}, expected {tuple(wanted[key].shape)}")


@final
class ClipScore:
    """A CLIP model as a scorer. `truncated_prompts` counts the prompts whose end the text tower never saw."""

    def __init__(self, model: Any, transform: Any, tokenizer: Any, device: str, batch_size: int):
        self._model, self._transform, self._tokenizer = model, transform, tokenizer
        self._device, self._batch_size = device, batch_size
        self.truncated_prompts = 0

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(samples), self._batch_size):
            scores += self._score(samples[start : start + self._batch_size])
        return scores

    def _score(self, samples: Sequence[Sample]) -> list[float]:
        pixels = torch.stack([self._transform(_picture_of(sample)) for sample in samples]).to(self._device)
        tokens = self._tokenizer([_text_of(sample) for sample in samples]).to(self._device)
        self.truncated_prompts += sum(self._is_truncated(sample.prompt) for sample in samples)
        pictures = self._model.encode_image(pixels, normalize=True).float()
        texts = self._model.encode_text(tokens, normalize=True).float()
        scores = (100 * (pictures * texts).sum(-1)).tolist()
        for sample, score in zip(samples, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(f"CLIP scores sample {sample.key} as {score}; are the weights damaged?")
        return scores

    def _is_truncated(self, prompt: str) -> bool:
        return len(self._tokenizer.encode(prompt)) + 2 > self._tokenizer.context_length


def _picture_of(sample: Sample) -> Image:
    if sample.image is None:
        raise ValueError(f"sample {sample.key} has no image; CLIP scores pictures")
    return sample.image


def _text_of(sample: Sample) -> str:
    if not isinstance(sample.prompt, str):
        raise ValueError(f"the prompt of sample {sample.key} is a {type(sample.prompt).__name__}; CLIP reads text")
    return sample.prompt


def _known_architecture(architecture: str) -> str:
    """The name under which open_clip knows the architecture, which must need nothing from a hub."""
    import open_clip

    name = architecture
    if architecture.endswith(".json"):
        name = _register(Path(architecture))
    if name not in open_clip.list_models():
        raise ValueError(
            f"open_clip has no architecture {architecture!r}; expected a name such as ViT-B-32, ViT-L-14 or ViT-H-14, "
            "or the path of a model config ending in .json"
        )
    text_tower = (open_clip.get_model_config(name) or {})["text_cfg"]
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text_tower.get(key):
            raise ValueError(
                f"architecture {architecture} would fetch {text_tower[key]!r} ({key}) from a model hub; "
                "use one with CLIP's own text tower, e.g. ViT-B-32, ViT-L-14 or ViT-H-14"
            )
    if "siglip" in name.lower():
        raise ValueError(f"architecture {architecture} would fetch SigLIP's tokenizer; use e.g. ViT-B-32 or ViT-H-14")
    return name


def _register(path: Path) -> str:
    import open_clip

    if not path.is_file():
        raise FileNotFoundError(f"no CLIP model config at {path}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config if isinstance(config, dict) else ())
    if missing:
        raise ValueError(f"{path} is not an open_clip model config: it lacks {', '.join(sorted(missing))}")
    open_clip.add_model_config(path)
    return path.stem
