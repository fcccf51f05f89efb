"""LoRA adapters (PEFT) on a diffusers network: adding them, switching them off, and the files that diffusers loads.

Refused: target modules that the network does not have, and switching off adapters where there are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters, arXiv 2106.09685."""

    # rank of the update of each target module
    rank: int = 8
    # the update is scaled by alpha / rank
    alpha: float = 8.0
    # endings of the names of the modules that get an adapter
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    # dropout before the adapter, in training only; the reference never sees it
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"model.lora.rank is {self.rank}; expected a whole number of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout is {self.dropout}; expected a number in [0, 1)")


def add_lora(network: nn.Module, settings: LoraSettings, seed: int = 0) -> None:
    """Adds trainable fp32 adapters to a diffusers network and freezes everything else.

    The update starts at zero, so the network computes what it did before. `seed` alone decides the starting weights.
    """
    from peft import LoraConfig

    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  a fraction is fine: only alpha / r is used
        target_modules=list(settings.target_modules),
        lora_dropout=settings.dropout,
    )
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network.add_adapter(lora)  # pyright: ignore[reportCallIssue]
        except ValueError as error:
            names = sorted({name.rsplit(".", 1)[-1] for name, part in network.named_modules() if _adaptable(part)})
            raise ValueError(
                f"model.lora.target_modules {list(settings.target_modules)} fit no module of this network; "
                f"it has {', '.join(names)} ({error})"
            ) from None
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The network without its adapters, for the length of a with-block: exactly the weights training started from.

    Works on the network itself and on DDP and FSDP2 wrappers of it. Which parameters train is unchanged afterwards.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError("reference is adapter_off, but the network has no adapters; set model.lora or reference: copy")
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def save_lora(network: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` with its rank and alpha, as `pipeline.load_lora_weights` reads it.

    `weights` is the network's whole state dict, gathered from all ranks where it is sharded.
    """
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    # Under PEFT's own names: diffusers has others for attention alone, and loads nothing of those from a mixed file.
    adapter: dict[str, Any] = get_peft_model_state_dict(network, state_dict=dict(weights))
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=adapter,
        unet_lora_adapter_metadata=network.peft_config["default"].to_dict(),  # pyright: ignore
    )


def merge_lora(pipeline: Any, folder: Path) -> None:
    """Adds the update of a LoRA file to the weights of a diffusers pipeline: the network then is the merged one."""
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"model.adapter: no {WEIGHTS_FILE} in {folder}")
    pipeline.load_lora_weights(folder, weight_name=WEIGHTS_FILE)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()


def load_lora(network: nn.Module, folder: Path) -> None:
    """Reads a file of `save_lora` into the adapters that `add_lora` added."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}; expected a folder with {WEIGHTS_FILE}")
    weights = {name.removeprefix("unet."): value for name, value in load_file(path).items()}
    fitted = set_peft_model_state_dict(network, convert_unet_state_dict_to_peft(weights))
    if fitted.unexpected_keys:
        raise ValueError(
            f"the adapter {path} does not fit model.lora: unknown weights such as {fitted.unexpected_keys[0]}"
        )
