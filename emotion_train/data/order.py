"""The step at which each post is trained: a pure function of (row counts, lanes, seed, epoch).

Nothing here opens a file or knows the number of GPUs, so (epoch, step) is a complete cursor. The
price is a shuffle that is not uniform over all permutations: a step draws from `lanes` row groups
at a time (up to 64 x 1024 posts); `prepare` has shuffled their posts once over the whole set.

Letters: G row groups, P positions, R rows of one row group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
_GROUPS, _ROWS = 0, 1  # streams of the counter hash


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators").
    """
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def counter_hash(*words: int | Ints) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits for each tuple of words (broadcast); the same on every machine and
    version.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = splitmix64(state ^ np.asarray(word, dtype=np.uint64))
    return state


@dataclass(frozen=True)
class Order:
    """The order of one split. `row_counts` are the rows of each row group, `lanes` the number of
    row groups read side by side.
    """

    row_counts: tuple[int, ...]
    lanes: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.lanes <= max(1, len(self.row_counts)) or min(self.row_counts, default=0) < 1:
            raise ValueError(
                f"lanes is {self.lanes} for row groups of {self.row_counts[:8]} rows; each lane and row group"
                " needs a row"
            )

    @cached_property
    def rows(self) -> int:
        return sum(self.row_counts)

    @cached_property
    def first_posts(self) -> Ints:
        """The number within the split of each row group's first post."""
        return np.cumsum((0, *self.row_counts), dtype=np.int64)[:-1]

    def steps(self, global_batch_size: int) -> int:
        """Optimizer steps of one epoch; the last one may be smaller."""
        return -(-self.rows // global_batch_size)

    def positions(self, step: int, global_batch_size: int) -> range:
        return range(step * global_batch_size, min((step + 1) * global_batch_size, self.rows))

    def epoch(self, epoch: int) -> EpochOrder:
        return EpochOrder(self, epoch)


class EpochOrder:
    """The order of one epoch, in 24 bytes per row group, whatever the number of posts."""

    def __init__(self, order: Order, epoch: int) -> None:
        self.order = order
        self.epoch = epoch
        hashes_G = counter_hash(order.seed, epoch, _GROUPS, np.arange(len(order.row_counts)))
        self.groups_G: Ints = np.argsort(hashes_G, kind="stable")
        self._counts_G = np.asarray(order.row_counts, np.int64)[self.groups_G]
        self._ends_G: Ints = np.cumsum(self._counts_G)
        self._rows_R = lru_cache(maxsize=4 * order.lanes)(self._permute_rows)

    def locate(self, positions: Sequence[int] | Ints) -> tuple[Ints, Ints]:
        """The row group of each position and the row inside it: `(groups_P, rows_P)`."""
        positions_P = np.asarray(positions, np.int64)
        quotient, remainder = divmod(self.order.rows, self.order.lanes)
        lanes_P, offsets_P = positions_P % self.order.lanes, positions_P // self.order.lanes
        axis_P = lanes_P * quotient + np.minimum(lanes_P, remainder) + offsets_P
        places_P = np.searchsorted(self._ends_G, axis_P, side="right")
        groups_P = self.groups_G[places_P]
        inside_P = axis_P - (self._ends_G[places_P] - self._counts_G[places_P])
        rows_P = np.fromiter(
            (self._rows_R(int(group))[inside] for group, inside in zip(groups_P, inside_P, strict=True)),
            np.int64,
            len(positions_P),
        )
        return groups_P, rows_P

    def _permute_rows(self, group: int) -> Ints:
        hashes_R = counter_hash(
            self.order.seed, self.epoch, _ROWS, group, np.arange(self.order.row_counts[group])
        )
        return np.argsort(hashes_R, kind="stable")
