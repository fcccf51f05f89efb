"""Where the jobs get prompts, models and devices from: names that a user types, resolved to things."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from mmalign.world.datasets import SPLITS, prompts


def read_prompts(source: str, count: int | None, seed: int) -> list[str]:
    """`world:<split>`, a .txt file (a prompt a line), or a .jsonl file ({"prompt": ...} a line). At most `count`."""
    name, _, split = source.partition(":")
    if name == "world" and split in SPLITS:
        if count is None:
            raise ValueError(f"prompts {source!r} are endless; set count")
        return [str(caption) for caption in prompts(count, seed, split)]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts: {source!r} is no file; expected a .txt or .jsonl file, or world:{{{','.join(SPLITS)}}}"
        )
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_prompt_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not lines:
        raise ValueError(f"prompts: {path} holds no prompt")
    return lines[:count]


def _prompt_of(line: str, place: str) -> str:
    try:
        return json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f'{place}: expected {{"prompt": "..."}}, got {line[:80]!r}') from None


def device_of(name: str) -> torch.device:
    """`auto` takes an accelerator if there is one; processes that torchrun starts side by side take one each."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def seed_of(*parts: object) -> int:
    """A stable 63-bit seed for a named draw, e.g. (run seed, prompt number, candidate number)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
