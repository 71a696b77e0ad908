"""The posts of a split are sorted by their shuffled order and written as the data set's objects."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emotion_train.data.index import Auxiliary, Split
from emotion_train.data.lengths import Lengths, recorded
from emotion_train.data.targets import AUXILIARY, TargetKind
from emotion_train.errors import WrongRequest
from emotion_train.preparation.auxiliary import AuxiliaryPosts
from emotion_train.preparation.shards import SplitWriter, schema_of
from emotion_train.preparation.spill import Spill
from emotion_train.preparation.work import Work
from emotion_train.progress import ProgressLine
from emotion_train.storage.store import Store


class Written(NamedTuple):
    """A split as the index describes it, and the lengths of its posts."""

    split: Split
    lengths: dict[str, int]


def write_split(
    work: Work, store: Store | None, name: str, shuffled: Spill, rows: int, labels: int
) -> Written:
    """Write the posts of a split; without a store, only below the folder of `work`. `shuffled` is
    emptied on the way.

    Raises `WrongRequest` for an id of two posts.
    """
    options = work.options
    schema = schema_of(options.targets, work.weighted, kept=options.keep_columns)
    characters = size = Lengths.of([])
    done = 0
    with (
        _writer(work, store, name, rows, labels, options.targets) as writer,
        ProgressLine(f"writing {name}", rows, "posts") as line,
    ):
        for partition in range(shuffled.partitions):
            batches = list(shuffled.read(partition))
            if not batches:
                continue
            table = pa.Table.from_batches(batches).combine_chunks()
            del batches
            shuffled.remove(partition)
            order = table.column("order").to_numpy()
            by_order = np.lexsort((table.column("place").to_numpy(), order))
            table = table.select(schema.names).take(pa.array(by_order))
            _refuse_doubled_ids(table, np.flatnonzero(np.diff(order[by_order]) == 0), options.id_column)
            writer.add(table.cast(schema))
            texts = table.column("text")
            characters += Lengths.of(pc.utf8_length(texts).to_numpy())
            size += Lengths.of(pc.binary_length(texts).to_numpy())
            done += len(table)
            line.update(done)
        return Written(writer.finish(), recorded(characters, size))


def write_auxiliary(work: Work, store: Store | None, posts: AuxiliaryPosts | None) -> Auxiliary | None:
    """Write the auxiliary posts; returns their entry in the index, or None where there are none."""
    if posts is None or not posts.rows:
        return None

    def new_writer(rows: int, labels: int, kind: TargetKind) -> SplitWriter:
        return _writer(work, store, AUXILIARY, rows, labels, kind)

    return posts.write(new_writer, work.weighted)


def _writer(
    work: Work, store: Store | None, name: str, rows: int, labels: int, kind: TargetKind
) -> SplitWriter:
    auxiliary = name == AUXILIARY
    return SplitWriter(
        store,
        name,
        rows,
        labels,
        work.options.rows_per_group,
        work.options.rows_per_object,
        work.folder,
        kind,
        work.weighted,
        kept=() if auxiliary else work.options.keep_columns,
        auxiliary=auxiliary,
    )


def _refuse_doubled_ids(table: Any, places: Any, id_column: str | None) -> None:
    """Raises `WrongRequest` for an id of two posts. Equal ids have equal hashes, so they are
    neighbours, at `places`.
    """
    ids = table.column("id")
    for place in places:
        if ids[int(place)] == ids[int(place) + 1]:
            raise WrongRequest(
                f"Two posts of one split have the id {ids[int(place)].as_py()!r}; ids in column"
                f" {id_column!r} must be unique."
            )
