"""Which parts of a network are gathered as one while its weights are sharded over processes.

A unit must be called as a module, by its own forward pass, and share no weight with the rest: the entries of module
lists are such parts in every network that is built of blocks. What is outside of them (embeddings that may be tied to
the head, first and last layers) stays with the root.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# A block with more than this share of the weights is divided at the lists inside it.
LARGEST_SHARE = 1 / 8


def units(network: nn.Module) -> list[nn.Module]:
    """The entries of the outermost module lists, and those of the lists inside large entries; inner ones come first."""
    return list(_units(network, LARGEST_SHARE * _count(network)))


def parameters_by_unit(network: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each unit, and as the last entry those of the root."""
    taken: set[nn.Parameter] = set()
    found = []
    for module in (*units(network), network):
        found.append([parameter for parameter in module.parameters() if parameter not in taken])
        taken.update(found[-1])
    return found


def _units(module: nn.Module, limit: float) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield from _units(child, limit)
            continue
        for block in child:
            if _count(block) > limit:
                yield from _units(block, limit)
            yield block


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
