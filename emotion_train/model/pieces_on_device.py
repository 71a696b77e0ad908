"""Pieces of a staged base go to the GPU as they are read, while libraries are imported: copying
them there holds up no Python.

On the GPU they are together as in the objects, 512 MiB each, and an object is gone once its tensors
are made: while the model is loaded it takes the memory of the base, its largest tensor and an
object. A GPU that another program uses is left alone, since the run may yet be refused.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emotion_train.bases.ahead import BaseAhead
from emotion_train.bases.pieces_ahead import Place, Put
from emotion_train.bases.staged import StagedBase, StagedIndex
from emotion_train.config import Precision
from emotion_train.processes.machine import memory_of, whole_memory_of
from emotion_train.sizing.memory import GIB

_SHARDS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_ON_CPU = "ACCELERATE_USE_CPU"


def gpu_of_process(environment: Mapping[str, str]) -> torch.device:
    """The GPU that `accelerate launch`, whose environment this is, gives the process; the CPU where
    the process gets none, or may hold only a part of the base there.
    """
    if any(environment.get(name, "").lower() in ("true", "1", "yes") for name in (*_SHARDS, _ON_CPU)):
        return torch.device("cpu")
    return torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))


def bring_to(ahead: BaseAhead, device: torch.device, precision: Precision) -> None:
    """From now on bring what is read ahead to `device`, in a thread, where that is a GPU that no
    other program uses and the base is used there as it was staged. Where it fails nothing changes.
    """
    if device.type != "cuda":
        return
    if str(device) == "cuda":  # the current one, of which each thread has its own: at first the first
        begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        device = torch.device("cuda", torch.cuda.current_device() if begun else 0)

    def put_for(staged: StagedBase) -> Put | None:
        if not torch.cuda.is_available() or (precision == "nf4") != (staged.index.precision == "nf4"):
            return None
        whole, free = whole_memory_of(device), memory_of(device)
        if whole - free > GIB or 4 * staged.index.bytes > 3 * free:
            return None
        return PiecesOnDevice(staged.index, device).put

    ahead.move(put_for)


class PiecesOnDevice:
    """A copy of each object on `device`, piece by piece."""

    def __init__(self, index: StagedIndex, device: torch.device) -> None:
        self._index, self._device = index, device
        self._objects: dict[int, torch.Tensor] = {}  # until their last piece has come
        self._missing = {number: len(one.pieces) for number, one in enumerate(index.shards)}
        self._lock = threading.Lock()

    def put(self, place: Place, piece_B: npt.NDArray[np.uint8]) -> torch.Tensor:
        """The piece on the device. Raises `torch.OutOfMemoryError`."""
        number, at = place
        with self._lock:
            if number not in self._objects:
                self._objects[number] = self._empty(self._index.shards[number].bytes)
            start = at * self._index.piece_bytes
            target_B = self._objects[number][start : start + len(piece_B)]
        target_B.copy_(torch.from_numpy(piece_B))
        with self._lock:
            self._missing[number] -= 1
            if not self._missing[number]:
                del self._objects[number]
        return target_B

    def _empty(self, size: int) -> Any:
        return torch.empty(size, dtype=torch.uint8, device=self._device)
