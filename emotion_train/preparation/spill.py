"""Rows on disk in partitions, so that more rows than fit in memory can be grouped or sorted, one
partition at a time.

Each row is written once and read once per use. The number of partitions follows the memory budget,
so no result may depend on it.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


def partitions_for(total_bytes: int, memory_bytes: int) -> int:
    """The number of partitions, a power of two, so that a partition with its copies takes about a
    quarter of the memory.
    """
    wanted = total_bytes * 1.5 / (min(memory_bytes, 4 << 30) / 12)
    return 1 << min(12, max(0, int(np.ceil(np.log2(max(wanted, 1))))))


def partition_of(hashes_N: Any, partitions: int) -> Any:
    """The partition of each 64-bit hash, by its leading bits, so that partitions in order hold
    hashes in order.
    """
    return (hashes_N >> np.uint64(48)).astype(np.int64) * partitions >> 16


class Spill:
    """Partitions of record batches below `folder`."""

    def __init__(self, folder: Path, partitions: int, memory_bytes: int) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True)
        self.partitions = partitions
        self._limit = memory_bytes // 6
        self._pending: defaultdict[int, list[Any]] = defaultdict(list)
        self._pending_bytes = 0
        self._options = pa.ipc.IpcWriteOptions(compression="lz4")

    def add(self, batch: Any, partition_N: Any) -> None:
        """Append each row of the batch to the partition of that number."""
        by_partition = np.argsort(partition_N, kind="stable")
        counts = np.bincount(partition_N, minlength=self.partitions)
        ends = np.cumsum(counts)
        batch = batch.take(pa.array(by_partition))
        for partition in np.flatnonzero(counts):
            self._pending[int(partition)].append(
                batch.slice(ends[partition] - counts[partition], counts[partition])
            )
        self._pending_bytes += batch.nbytes
        if self._pending_bytes > self._limit:
            self.flush()

    def flush(self) -> None:
        """Write the rows held in memory. A partition's file is open only here, since there may be
        more partitions than files may be open.
        """
        for partition, batches in self._pending.items():
            buffer = io.BytesIO()
            with pa.ipc.new_stream(buffer, batches[0].schema, options=self._options) as writer:
                writer.write_batch(pa.Table.from_batches(batches).combine_chunks().to_batches()[0])
            with self._path(partition).open("ab") as file:
                file.write(buffer.getbuffer())
        self._pending.clear()
        self._pending_bytes = 0

    def read(self, partition: int, columns: list[int] | None = None) -> Iterator[Any]:
        """The partition's batches in the order of `add`, with all columns or those at the given
        positions.
        """
        path = self._path(partition)
        if not path.exists():
            return
        options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
        with path.open("rb") as file:
            while file.peek(1):
                with pa.ipc.open_stream(file, options=options) as reader:
                    yield from reader

    def remove(self, partition: int) -> None:
        self._path(partition).unlink(missing_ok=True)

    def _path(self, partition: int) -> Path:
        return self._folder / f"{partition:04}.arrows"
