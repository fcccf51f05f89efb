"""How a network is divided where its weights are sharded."""

from __future__ import annotations

import torch
from torch import nn

from mmalign.modalities import memory
from mmalign.modalities.adapters import LoraSettings
from mmalign.modalities.diffusion_loading import DiffusionSettings
from mmalign.modalities.units import LARGEST_SHARE, parameters_by_unit, units
from tests.test_memory import SD15
from tests.tiny_modality import TinyNetwork


def sizes(network: nn.Module) -> list[int]:
    return [sum(parameter.numel() for parameter in part) for part in parameters_by_unit(network)]


def test_every_parameter_is_in_one_unit_or_in_the_root():
    network = TinyNetwork()
    assert units(network) == list(network.blocks)
    parts = parameters_by_unit(network)
    assert [parameter for part in parts for parameter in part] != []
    assert sum(map(len, parts)) == len({parameter for part in parts for parameter in part})
    # places 6 x 16, prompt 8 x 16, head 16 x 10 + 10
    assert sizes(network) == [16 * 16 + 16, 16 * 16 + 16, 6 * 16 + 8 * 16 + 16 * 10 + 10]


def test_a_unet_has_units_everywhere_and_none_is_large():
    for lora in (None, LoraSettings()):
        network = memory.meta_network(DiffusionSettings(path="nowhere", lora=lora), SD15, torch.float32)
        *parts, root = sizes(network)
        whole = sum(parts) + root
        assert whole == sum(parameter.numel() for parameter in network.parameters())
        assert max(parts) < LARGEST_SHARE * whole
        assert root < 0.01 * whole
        inside = {module for unit in units(network) for module in unit.modules()}
        assert set(network.mid_block.resnets) < inside
        assert set(network.mid_block.attentions) < inside


def test_a_large_block_is_divided_and_keeps_what_its_lists_leave_over():
    """Weights: 100 in the large block's list, 4 beside it, 9 in the small block, 2 in the head."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(5, 10, bias=False), nn.Linear(10, 5, bias=False)])
            self.rest = nn.Linear(2, 2, bias=False)

    large, small = Large(), nn.Linear(3, 3, bias=False)
    network = nn.Sequential(nn.ModuleList([large, small]), nn.Linear(2, 1, bias=False))
    assert units(network) == [*large.inner, large, small]
    assert sizes(network) == [50, 50, 4, 9, 2]
