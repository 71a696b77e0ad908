"""A frozen base cut over the processes: each holds its part of every block and puts the whole of
two together, the one that computes and the one that comes next.

Parts are bytes, so 4-bit codes travel as they are, a quarter of what bfloat16 takes. A block's
weights lie at the same places in one of two buffers, by the parity of its number; what computes
with them keeps views of the buffer. The next block is gathered while this one computes, upwards in
a forward pass, downwards in a backward pass, which so begins with the two blocks that are there.
Gradients exist for adapter and head alone, so nothing of the base is ever reduced.

Every process has to ask for the same blocks in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# PyTorch 2.13 renamed it and warns of the old name
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_ALIGNMENT = 256  # bytes; float8 products want 16, and readers of whole lines more


class _Place(NamedTuple):
    """Where a tensor lies in the bytes of its block."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class GatheredBlocks:
    """The parts of all blocks that this process holds, and the two buffers.

    `cut` takes the blocks in their order; `need` is called before a block computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._processes, self._rank = dist.get_world_size(), dist.get_rank()
        self._places: list[_Place] = []
        self._parts: list[torch.Tensor] = []
        self._buffers: list[torch.Tensor] = []
        self._held: list[int | None] = [None, None]
        self._coming: list[Any] = [None, None]

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Keep this process's part of the next block, whose frozen tensors these are; returns what
        stands for them from now on. All blocks have tensors of the same shapes.
        """
        places, end = [], 0
        for tensor in tensors:
            places.append(_Place(end, tuple(tensor.shape), tensor.dtype))
            end += -(-places[-1].bytes // _ALIGNMENT) * _ALIGNMENT
        size = -(-end // (_ALIGNMENT * self._processes)) * _ALIGNMENT
        if not self._parts:
            self._places = places
            self._buffers = [
                torch.zeros(size * self._processes, dtype=torch.uint8, device=self._device) for _ in range(2)
            ]
        assert places == self._places, "blocks of one decoder have the same shapes"
        number = len(self._parts)
        whole = torch.zeros(size * self._processes, dtype=torch.uint8, device=self._device)
        for place, tensor in zip(places, tensors, strict=True):
            whole[place.start : place.start + place.bytes] = _as_bytes(tensor)
        self._parts.append(whole[self._rank * size :][:size].clone())
        buffer = self._buffers[number % 2]
        return [
            buffer[place.start : place.start + place.bytes].view(place.dtype).view(place.shape)
            for place in places
        ]

    def need(self, number: int, following: int) -> None:
        """Wait until block `number` is whole in its buffer, and begin to put `following` together,
        a neighbour; nothing where there is no such block.
        """
        self._gather(number)
        if (coming := self._coming[number % 2]) is not None:
            coming.wait()  # on a GPU the stream waits, not this thread
            self._coming[number % 2] = None
        if 0 <= following < len(self._parts):
            self._gather(following)

    def _gather(self, number: int) -> None:
        """Begin once what was computed with the buffer's block before is done: the collective waits
        for all work that the current stream was given.
        """
        slot = number % 2
        if self._held[slot] == number:
            return
        assert self._coming[slot] is None, "a block was gathered that nothing waited for"
        self._held[slot] = number
        self._coming[slot] = _ALL_GATHER(self._buffers[slot], self._parts[number], async_op=True)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
