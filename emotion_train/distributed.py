"""What the ranks of a run tell each other. With one process every call returns its argument.

All of it goes over a CPU (gloo) group of its own, in step order, so that it never waits for the compute stream of a GPU.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The processes of this run: `rank` 0 to `world_size` - 1. Make one per process, after the process group exists."""

    def __init__(self) -> None:
        self._many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self._many else 0
        self.world_size = dist.get_world_size() if self._many else 1
        # two groups: the loader's thread and the main thread must not mix their calls
        self._loader_group = dist.new_group(backend="gloo") if self._many else None
        self._main_group = dist.new_group(backend="gloo") if self._many else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, packs: int, weight_sum: float) -> tuple[int, float]:
        """Maximum number of packs and sum of weights over the ranks; called by the loader's thread."""
        if not self._many:
            return packs, weight_sum
        sent = torch.zeros(self.world_size, 2, dtype=torch.float64)
        sent[self.rank] = torch.tensor([packs, weight_sum], dtype=torch.float64)
        dist.all_reduce(sent, group=self._loader_group)
        return int(sent[:, 0].max()), float(sent[:, 1].sum())

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Element-wise sum over the ranks, in float64."""
        total = torch.from_numpy(np.array(values, np.float64))
        if self._many:
            dist.all_reduce(total, group=self._main_group)
        return total.numpy()

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if not self._many:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._main_group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order on rank 0, an empty list elsewhere."""
        if not self._many:
            return [value]
        box: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, box, dst=0, group=self._main_group)
        return box or []
