"""Data sets made from another data set: a split written anew from posts in memory, a split copied
byte for byte, and the index created last.

The same content always gives the same bytes, so two processes may write at once, and a stopped one
resumes. The price: a split that is written anew is held in memory, about 1 kB per post.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from emotion_train.data.index import INDEX_KEY, Auxiliary, Index, Split, read_index
from emotion_train.data.reader import RowGroupReader, Rows
from emotion_train.data.targets import WEIGHT, TargetKind, kept_name, largest
from emotion_train.errors import AlreadyExists, StorageError, WrongRequest
from emotion_train.preparation.existing import same_posts
from emotion_train.preparation.shards import SplitWriter, place, schema_of
from emotion_train.storage.document import version_of
from emotion_train.storage.store import Store

_ROWS_PER_OBJECT = 262_144
_GROUPS_AHEAD = 8


def read_split(store: Store, index: Index, name: str) -> Rows:
    """All posts of a split in their stored order. Raises as `RowGroupReader.rows`."""
    split = index.split(name)
    groups = len(split.row_groups)
    parts = []
    with RowGroupReader(store, split, capacity=16, kept=index.kept_columns) as reader:
        for group in range(groups):
            reader.ask(range(group, min(group + _GROUPS_AHEAD, groups)))
            parts.append(reader.rows(group))
    return Rows(*([value for part in column for value in part] for column in zip(*parts, strict=True)))


def chosen_rows(rows: Rows, numbers: Iterable[int]) -> Rows:
    """The posts of these numbers, in that order."""
    picked = list(numbers)
    return Rows(*([column[row] for row in picked] for column in rows))  # type: ignore[arg-type]


def write_split(
    index: Index, name: str, rows: Rows, targets: TargetKind, store: Store, folder: Path
) -> Split:
    """A split of these posts, written at `store` with the row group size, weights and kept columns
    of `index`. `folder` is for local files.
    """
    import pyarrow as pa

    columns: dict[str, Any] = {"id": rows.ids, "text": rows.texts, **_labels(rows, targets)}
    if index.weighted:
        columns[WEIGHT] = rows.weights
    for place_of, column in enumerate(index.kept_columns):
        columns[kept_name(column)] = [values[place_of] for values in rows.kept]
    group = max(stored.rows for stored in index.split("train").row_groups)
    kept = index.kept_columns
    writer = SplitWriter(
        store,
        name,
        len(rows.ids),
        len(index.labels),
        group,
        _ROWS_PER_OBJECT,
        folder,
        targets,
        index.weighted,
        False,
        kept,
    )
    with writer:
        writer.add(pa.table(columns, schema=schema_of(targets, index.weighted, False, kept)))
        return writer.finish()


def _labels(rows: Rows, targets: TargetKind) -> dict[str, list[Any]]:
    pairs = [target or () for target in rows.targets]
    if targets == "one":
        return {"label": [largest(target) for target in pairs]}
    columns: dict[str, list[Any]] = {"labels": [[label for label, _ in target] for target in pairs]}
    if targets == "shares":
        columns["shares"] = [[share for _, share in target] for target in pairs]
    return columns


def copied(source: Store, split: Split, store: Store) -> Split:
    """The split at `store`, its objects copied byte for byte from `source`."""
    objects = []
    with tempfile.TemporaryDirectory(prefix="emotion-train-copy-") as name:
        for described in split.objects:
            path = Path(name) / "object"
            path.write_bytes(source.read(described.key))
            if path.stat().st_size != described.bytes:
                raise StorageError(f"{source.url_of(described.key)} changed while it was read; try again.")
            objects.append(place(store, described.model_copy(update={"etag": None}), path))
    return split.model_copy(update={"objects": tuple(objects)})


def copied_auxiliary(source: Store, index: Index, store: Store) -> Auxiliary | None:
    """The auxiliary posts, copied as a split is; None where there are none."""
    if index.auxiliary is None:
        return None
    return index.auxiliary.model_copy(update={"split": copied(source, index.auxiliary.split, store)})


def create_index(store: Store, made: Index, option: str) -> Index:
    """The index at `store`, created by this call or an earlier one. Raises `WrongRequest` where the
    store holds another data set; `option` is the option that names another place.
    """
    try:
        store.create(INDEX_KEY, made.to_bytes())
    except AlreadyExists:
        if not same_posts(read_index(store), made):
            raise WrongRequest(
                f"{store.url} holds another data set, which is never overwritten; give another {option}."
            ) from None
    return read_index(store)


def versions_now(index: Index) -> dict[str, str]:
    """The versions of a data set that is made from this one now."""
    own = {name: version_of(package) for name, package in _PACKAGES}
    return {**index.versions, **own}


_PACKAGES: Sequence[tuple[str, str]] = (("emotion_train", "emotion-train"), ("pyarrow", "pyarrow"))
