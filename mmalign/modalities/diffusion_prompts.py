"""Prompts to embeddings, with one CLIP text encoder (SD 1.x, 2.x) or two (SDXL), as the diffusers pipelines do it.

The encoders are frozen and in fp32: they are a fraction of a percent of the work, and training and sampling then read
the same numbers. Prompts that are too long are cut as CLIP cuts them, and counted. Refused: prompts that are not text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the network attends to. `pooled` is SDXL's; `truncated` counts the distinct prompts that were too long."""

    tokens: Float[Tensor, "prompt token channel"]
    pooled: Float[Tensor, "prompt pooled_channel"] | None
    truncated: int


@final
class PromptEncoder:
    """One or two frozen text encoders with their tokenizers."""

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[nn.Module], device: torch.device):
        self.tokenizers = tuple(tokenizers)
        self.encoders = tuple(encoder.requires_grad_(False).eval().to(device) for encoder in encoders)
        self.device = device

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> PromptEmbeddings:
        """One row per prompt; each distinct prompt passes through the encoders once."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"a diffusion model reads text prompts; this one is a {type(prompt).__name__}")
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([distinct[prompt] for prompt in prompts], device=self.device)
        cut: set[int] = set()
        tokens, pooled = [], None
        with torch.autocast(self.device.type, enabled=False):
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
                ids = _token_ids(tokenizer, list(distinct), cut).to(self.device)
                if len(self.encoders) == 1:
                    tokens.append(encoder(ids)[0])
                else:
                    encoded = encoder(ids, output_hidden_states=True)
                    tokens.append(encoded.hidden_states[-2])
                    pooled = encoded[0]  # the last encoder's projected embedding is the one that stays
        return PromptEmbeddings(torch.cat(tokens, -1)[rows], None if pooled is None else pooled[rows], len(cut))


def _token_ids(tokenizer: Any, prompts: list[str], cut: set[int]) -> Tensor:
    """Token ids, padded to the encoder's length; adds the places of prompts that were too long to `cut`."""
    encoded = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_overflowing_tokens=True,
        return_tensors="pt",
    )
    place = encoded["overflow_to_sample_mapping"]
    first = torch.cat([place.new_ones(1, dtype=torch.bool), place[1:] != place[:-1]])
    cut.update(place[~first].tolist())
    return encoded["input_ids"][first]
