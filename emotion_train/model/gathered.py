"""A frozen base cut over the processes: each holds its part of every block and puts the whole of
two together, the one that computes and the one that comes next.

Parts are bytes, so 4-bit codes travel as they are, a quarter of what bfloat16 takes. A block's
weights lie at the same places in one of two buffers, by the parity of its number; what computes
with them keeps views of the buffer. The next block is gathered while this one computes, upwards in
a forward pass, downwards in a backward pass, which so begins with the two blocks that are there.
Gradients exist for adapter and head alone, so nothing of the base is ever reduced.

On GPUs of one host that reach each other's memory, every process reads the others' parts straight
out of it: the copy engines do that, where NCCL's kernels would take multiprocessors from the
products. Elsewhere a collective puts a block together, for which every process has to ask for the
same blocks in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Protocol

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


class _Coming(Protocol):
    def wait(self) -> object:
        """What the current stream is given from now on finds the block whole."""


class _Parts(Protocol):
    """This process's parts of the blocks, and how they become whole."""

    def keep(self, part: torch.Tensor) -> None:
        """Copy the part of the next block."""

    def gather(self, number: int, whole: torch.Tensor) -> _Coming:
        """Begin to put block `number` into `whole`, behind all work that the current stream was
        given.
        """


class _PartsByCollective:
    def __init__(self) -> None:
        self._own: list[torch.Tensor] = []

    def keep(self, part: torch.Tensor) -> None:
        self._own.append(part.clone())

    def gather(self, number: int, whole: torch.Tensor) -> _Coming:
        coming: _Coming = _ALL_GATHER(whole, self._own[number], async_op=True)
        return coming


class _PartsOfPeers:
    """Parts in memory that every process maps. They never change, so nobody waits for anybody."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._own: list[torch.Tensor] = []
        self._everyones: list[list[torch.Tensor]] = []

    def keep(self, part: torch.Tensor) -> None:
        own = _shared(part.numel(), self._device)
        own.copy_(part)
        self._own.append(own)

    def gather(self, number: int, whole: torch.Tensor) -> _Coming:
        if not self._everyones:
            self._everyones = [_by_rank(own) for own in self._own]
            torch.cuda.synchronize(self._device)
            dist.barrier()  # every part is written
        parts = self._everyones[number]
        processes, rank = len(parts), dist.get_rank()
        size = whole.numel() // processes
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for step in range(processes):  # each begins with another one
                other = (rank + step) % processes
                whole[other * size :][:size].copy_(parts[other], non_blocking=True)
            return _Copied(self._stream.record_event())


class _Copied(NamedTuple):
    done: torch.cuda.Event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.done)


def reach_each_other(device: torch.device) -> bool:
    """Whether all processes have GPUs of one host and map each other's memory; every process calls
    it and gets the same answer.
    """
    processes = dist.get_world_size()
    if device.type != "cuda" or processes == 1:
        return False
    # mapping waits for every process, so all have to begin it
    return _all(_neighbours(device, processes), device) and _all(_maps_memory(device), device)


def _all(own: bool, device: torch.device) -> bool:
    """Whether the answer of every process is yes; every process calls it."""
    answer = torch.tensor(int(own), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer.item())


def _neighbours(device: torch.device, processes: int) -> bool:
    own = torch.cuda.current_device() if device.index is None else device.index
    return (
        os.environ.get("LOCAL_WORLD_SIZE") == str(processes)
        and torch.cuda.device_count() >= processes
        and all(torch.cuda.can_device_access_peer(own, other) for other in range(processes) if other != own)
    )


def _maps_memory(device: torch.device) -> bool:
    """Whether another process can map memory of this one, by trying; containers can forbid it."""
    try:
        _by_rank(_shared(_ALIGNMENT, device))
    except (RuntimeError, ImportError, AttributeError):
        return False
    return True


def _shared(size: int, device: torch.device) -> torch.Tensor:
    """`size` bytes that other processes can map; counted as PyTorch's memory."""
    from torch.distributed._symmetric_memory import get_mem_pool

    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here needs it
    with torch.cuda.use_mem_pool(get_mem_pool(device)):
        return torch.empty(size, dtype=torch.uint8, device=device)


def _by_rank(own: torch.Tensor) -> list[torch.Tensor]:
    """Every process's tensor in the place of `own`; every process calls it."""
    from torch.distributed._symmetric_memory import rendezvous

    assert dist.group.WORLD is not None
    met = rendezvous(own, dist.group.WORLD)
    return [
        own if rank == met.rank else met.get_buffer(rank, own.shape, own.dtype)
        for rank in range(met.world_size)
    ]


class GatheredBlocks:
    """The parts of all blocks that this process holds, and the two buffers.

    `cut` takes the blocks in their order; `need` is called before a block computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._processes, self._rank = dist.get_world_size(), dist.get_rank()
        self._places: list[_Place] = []
        self._parts: _Parts = _PartsOfPeers(device) if reach_each_other(device) else _PartsByCollective()
        self._blocks = 0
        self._buffers: list[torch.Tensor] = []
        self._held: list[int | None] = [None, None]
        self._coming: list[_Coming | None] = [None, None]

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Keep this process's part of the next block, whose frozen tensors these are; returns what
        stands for them from now on. All blocks have tensors of the same shapes.
        """
        places, end = [], 0
        for tensor in tensors:
            places.append(_Place(end, tuple(tensor.shape), tensor.dtype))
            end += -(-places[-1].bytes // _ALIGNMENT) * _ALIGNMENT
        size = -(-end // (_ALIGNMENT * self._processes)) * _ALIGNMENT
        if not self._blocks:
            self._places = places
            self._buffers = [
                torch.zeros(size * self._processes, dtype=torch.uint8, device=self._device) for _ in range(2)
            ]
        assert places == self._places, "blocks of one decoder have the same shapes"
        whole = torch.zeros(size * self._processes, dtype=torch.uint8, device=self._device)
        for place, tensor in zip(places, tensors, strict=True):
            whole[place.start : place.start + place.bytes] = _as_bytes(tensor)
        self._parts.keep(whole[self._rank * size :][:size])
        buffer = self._buffers[self._blocks % 2]
        self._blocks += 1
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
        if 0 <= following < self._blocks:
            self._gather(following)

    def _gather(self, number: int) -> None:
        """Begin once what was computed with the buffer's block before is done."""
        slot = number % 2
        if self._held[slot] == number:
            return
        assert self._coming[slot] is None, "a block was gathered that nothing waited for"
        self._held[slot] = number
        self._coming[slot] = self._parts.gather(number, self._buffers[slot])


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
