"""Rows from a loader worker to the training process: all tensors of a micro-batch travel as one.

Each tensor that crosses between processes costs a file descriptor and a trip over a socket. A micro-batch of pairs of
latents has hundreds, which is slow and, with a few workers, more than a process may have open. Values are untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmalign.core.types import Sample
from mmalign.data.errors import RecordError

Row = tuple[Sample, ...] | RecordError
# Views of a buffer must start at a multiple of their element size; 16 bytes suit every dtype.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Slice:
    """Where a tensor lies in the buffer."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """Rows without their tensors, the place of each tensor by row, sample and name, and the bytes of all."""

    rows: list[Row]
    slices: list[list[dict[str, Slice]]]
    buffer: Tensor


def pack(rows: Sequence[Row]) -> Packed:
    """Runs in the worker. Tensors that samples share are sent once."""
    parts: list[Tensor] = []
    placed: dict[int, Slice] = {}
    size = 0
    bare: list[Row] = []
    slices: list[list[dict[str, Slice]]] = []
    for row in rows:
        samples = () if isinstance(row, RecordError) else row
        for tensor in (tensor for sample in samples for tensor in sample.tensors.values()):
            if id(tensor) not in placed:
                content = tensor.contiguous().reshape(-1).view(torch.uint8)
                padding = -len(content) % _ALIGNMENT
                placed[id(tensor)] = Slice(size, tensor.dtype, tuple(tensor.shape))
                parts += [content, content.new_zeros(padding)]
                size += len(content) + padding
        slices.append([{name: placed[id(item)] for name, item in sample.tensors.items()} for sample in samples])
        bare.append(row if isinstance(row, RecordError) else tuple(replace(sample, tensors={}) for sample in row))
    return Packed(bare, slices, torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8))


def unpack(packed: Packed) -> list[Row]:
    """The rows as they were; their tensors are views of the buffer."""
    return [
        row
        if isinstance(row, RecordError)
        else tuple(
            replace(sample, tensors={name: _view(packed.buffer, place) for name, place in named.items()})
            for sample, named in zip(row, slices, strict=True)
        )
        for row, slices in zip(packed.rows, packed.slices, strict=True)
    ]


def _view(buffer: Tensor, place: Slice) -> Tensor:
    length = place.dtype.itemsize
    for extent in place.shape:
        length *= extent
    return buffer[place.start : place.start + length].view(place.dtype).view(place.shape)
