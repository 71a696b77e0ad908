"""Writes one split as Parquet objects and describes them: byte ranges, label counts and hashes of
every row group.

An object's name holds a hash of its bytes, and objects are created and never overwritten, so that
two `prepare` at one place do not touch each other's bytes. Each object is made in a local file,
uploaded while the next one is made, and read back: its bytes cross the network twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emotion_train.data.index import MAX_LANES, DataObject, RowGroup, Split
from emotion_train.data.targets import KNOWN, SOURCE, WEIGHT, TargetKind, kept_name
from emotion_train.errors import AlreadyExists, ObjectNotFound, StorageError, WrongRequest
from emotion_train.storage.store import Store

_LABELS: dict[TargetKind, tuple[tuple[str, Any], ...]] = {
    "one": (("label", pa.int32()),),
    "several": (("labels", pa.list_(pa.int32())),),
    "shares": (("labels", pa.list_(pa.int32())), ("shares", pa.list_(pa.float64()))),
}
_FOOTER_TAIL = 8  # four bytes of length and PAR1


def schema_of(
    targets: TargetKind,
    weighted: bool,
    marked: bool = False,
    kept: Sequence[str] = (),
    auxiliary: bool = False,
) -> Any:
    """The columns of a split's objects. A post's label ids are in ascending order, and each share
    belongs to the label at its place. Column `source` is empty for a real post; `known` is the
    number of an auxiliary post's source in the index. Columns that were `kept` have texts, empty
    where a post has none, and come last: readers that do not know them skip them.
    """
    columns = [("id", pa.string()), ("text", pa.string()), *_LABELS[targets]]
    columns += [(WEIGHT, pa.float64())] if weighted else []
    columns += [(SOURCE, pa.string())] if marked else []
    columns += [(KNOWN, pa.int32())] if auxiliary else []
    columns += [(kept_name(name), pa.string()) for name in kept]
    return pa.schema([pa.field(name, kind, False) for name, kind in columns])


def label_counts_of(table: Any, classes: int) -> tuple[float, ...]:
    """The number of posts with each label in such a table, or the sums of its shares."""
    if "label" in table.column_names:
        return tuple(np.bincount(table.column("label").to_numpy(), minlength=classes).tolist())
    labels = pc.list_flatten(table.column("labels")).to_numpy()
    if "shares" not in table.column_names:
        return tuple(np.bincount(labels, minlength=classes).tolist())
    shares = pc.list_flatten(table.column("shares")).to_numpy()
    return tuple(np.bincount(labels, shares, minlength=classes).tolist())


def real_counts_of(table: Any, classes: int) -> tuple[float, ...] | None:
    """`label_counts_of` for real posts only; None for a table that marks no posts."""
    if SOURCE not in table.column_names:
        return None
    return label_counts_of(table.filter(pc.equal(table.column(SOURCE), "")), classes)


def balanced(rows: int, largest: int) -> list[int]:
    """Sizes, none above `largest` and all within one of each other, that add up to `rows`."""
    pieces = -(-rows // largest)
    return [rows // pieces + (i < rows % pieces) for i in range(pieces)]


class SplitWriter:
    """Takes the rows of a split in their final order; a with statement around `add` and `finish`.

    Without a store it only describes what it would have written. The local files stay in `folder`,
    named by `local_file`.
    """

    def __init__(
        self,
        store: Store | None,
        split: str,
        rows: int,
        labels: int,
        rows_per_group: int,
        rows_per_object: int,
        folder: Path,
        targets: TargetKind = "one",
        weighted: bool = False,
        marked: bool = False,
        kept: Sequence[str] = (),
        auxiliary: bool = False,
    ) -> None:
        self._store = store
        self._split = split
        self._labels = labels
        self._folder = folder
        self._sizes = balanced(rows, rows_per_group)
        self._groups_per_object = max(1, rows_per_object // rows_per_group)
        self._waiting: list[Any] = []
        self._waiting_rows = 0
        self._groups: list[RowGroup] = []
        self._objects: list[Future[DataObject]] = []
        # (rows, label counts, real posts' label counts) of the row groups in the unfinished object
        self._open_counts: list[tuple[int, tuple[float, ...], tuple[float, ...] | None]] = []
        self._schema = schema_of(targets, weighted, marked, kept, auxiliary)
        self._writer: Any = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._writer is not None:
            self._writer.close()
            self._file.close()

    def add(self, table: Any) -> None:
        self._waiting.append(table)
        self._waiting_rows += len(table)
        if self._waiting_rows >= self._next_size():
            whole = pa.concat_tables(self._waiting).combine_chunks()
            start = 0
            while self._done() < len(self._sizes) and len(whole) - start >= self._next_size():
                size = self._next_size()
                self._write_group(whole.slice(start, size))
                start += size
            self._waiting, self._waiting_rows = [whole.slice(start)], len(whole) - start

    def finish(self) -> Split:
        """The split's entry in the index, once all objects are in the store and were read back."""
        assert self._done() == len(self._sizes)
        assert not self._waiting_rows
        objects = tuple(future.result() for future in self._objects)
        counts = tuple(map(sum, zip(*(group.label_counts for group in self._groups), strict=True)))
        lanes = min(MAX_LANES, len(self._groups))
        return Split(
            rows=sum(self._sizes),
            label_counts=counts,
            lanes=lanes,
            objects=objects,
            row_groups=tuple(self._groups),
        )

    def _next_size(self) -> int:
        return self._sizes[min(self._done(), len(self._sizes) - 1)]

    def _done(self) -> int:
        return len(self._groups) + len(self._open_counts)

    def _write_group(self, table: Any) -> None:
        if self._writer is None:
            self._path = local_file(self._folder, self._split, len(self._objects))
            self._file = self._path.open("wb")
            self._writer = pq.ParquetWriter(
                self._file,
                self._schema,
                compression="zstd",
                use_dictionary=["label"] if "label" in self._schema.names else ["labels.list.element"],
                write_statistics=False,
                store_schema=False,
            )
        self._writer.write_table(table, row_group_size=len(table))
        self._open_counts.append(
            (len(table), label_counts_of(table, self._labels), real_counts_of(table, self._labels))
        )
        if len(self._open_counts) == self._groups_per_object or self._done() == len(self._sizes):
            self._close_object()

    def _close_object(self) -> None:
        self._writer.close()
        self._file.close()
        self._writer = None
        number = len(self._objects)
        metadata = pq.read_metadata(self._path)
        size = self._path.stat().st_size
        with self._path.open("rb") as file:
            for ordinal, (rows, counts, real) in enumerate(self._open_counts):
                start, end = _byte_range(metadata.row_group(ordinal))
                file.seek(start)
                sha256 = hashlib.sha256(file.read(end - start)).hexdigest()
                self._groups.append(
                    RowGroup(
                        object=number,
                        ordinal=ordinal,
                        start=start,
                        length=end - start,
                        rows=rows,
                        label_counts=counts,
                        real_counts=real,
                        sha256=sha256,
                    )
                )
            self._open_counts = []
            file.seek(size - _FOOTER_TAIL)
            footer_bytes = int.from_bytes(file.read(4), "little") + _FOOTER_TAIL
            file.seek(size - footer_bytes)
            footer_sha256 = hashlib.sha256(file.read()).hexdigest()
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        described = DataObject(
            key=f"{self._split}/part-{number:05}-{sha256[:16]}.parquet",
            bytes=size,
            etag=None,
            footer_bytes=footer_bytes,
            footer_sha256=footer_sha256,
        )
        if len(self._objects) >= 2:
            self._objects[-2].result()  # raises a store's failure before all objects are made
        self._objects.append(self._pool.submit(self._publish, self._path, described))

    def _publish(self, path: Path, described: DataObject) -> DataObject:
        return described if self._store is None else place(self._store, described, path)


def local_file(folder: Path, split: str, number: int) -> Path:
    """The path at which a `SplitWriter` makes the split's object of that number."""
    return folder / f"{split}-{number:05}.parquet"


def place(store: Store, described: DataObject, path: Path) -> DataObject:
    """The object with its ETag, once the store holds the file's bytes under its key. An existing
    object is kept.

    Raises `WrongRequest` when the key had other bytes, and `StorageError` when the store does not
    hold what was written to it.
    """
    key, url = described.key, store.url_of(described.key)
    try:
        info, written = store.stat(key), False
    except ObjectNotFound:
        try:
            info, written = store.create(key, path), True
        except AlreadyExists:  # another process wrote other bytes meanwhile
            raise _other_bytes(url) from None
    if store.holds(key, path):
        return described.model_copy(update={"etag": info.etag})
    if written:
        raise StorageError(
            f"{url} does not hold what was written to it; prepare again, or use another store."
        )
    raise _other_bytes(url)


def _other_bytes(url: str) -> WrongRequest:
    return WrongRequest(
        f"{url} is damaged: its bytes do not have the hash in its name, and nothing is overwritten; delete"
        " it and type the same command again."
    )


def _byte_range(group: Any) -> tuple[int, int]:
    """Start and end of a row group's column chunks."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    starts = [
        min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
        for chunk in chunks
    ]
    return min(starts), max(
        start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True)
    )
