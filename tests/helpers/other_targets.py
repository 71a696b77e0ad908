"""The posts of a tiny run with several labels each, or with shares of labels, and with weights of
their own.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from emotion_train.data.index import Index, read_index
from emotion_train.data.targets import Target, TargetKind, largest, requires
from emotion_train.evaluation.floors import posts
from emotion_train.preparation.shards import SplitWriter, schema_of
from emotion_train.storage.folder import FolderStore
from tests.helpers.tiny_runs import tiny_config


def tiny_folder(folder: Path, kind: TargetKind) -> Path:
    """A folder for `tiny_config` whose data set has such targets; of one label it is the usual
    one.
    """
    tiny_config(folder)
    if kind != "one":
        (folder / "data").rename(folder / "of-one-label")
        relabel(FolderStore(folder / "of-one-label"), FolderStore(folder / "data"), kind, True)
    return folder


def relabel(
    source: FolderStore, store: FolderStore, kind: TargetKind, weighted: bool, mixed: bool = True
) -> None:
    """Write the posts of a data set with one label each as a data set of these targets, in the same
    order; without `mixed` each keeps its one label.
    """
    index, splits = read_index(source), {}
    classes = len(index.labels)
    for name, split in index.splits.items():
        rows = [
            (post_id, text, target_of(text, largest(target), classes, kind) if mixed else target)
            for post_id, text, target in posts(source, split)
        ]
        columns: dict[str, Any] = {"id": [row[0] for row in rows], "text": [row[1] for row in rows]}
        if kind == "one":
            columns["label"] = [largest(row[2]) for row in rows]
        else:
            columns["labels"] = [[label for label, _ in row[2]] for row in rows]
        if kind == "shares":
            columns["shares"] = [[share for _, share in row[2]] for row in rows]
        if weighted:
            columns["weight"] = [weight_of(text) for text in columns["text"]]
        folder = Path(store.url).parent
        group = max(group.rows for group in split.row_groups)
        writer = SplitWriter(store, name, len(rows), classes, group, 1000, folder, kind, weighted)
        with writer:
            writer.add(pa.table(columns, schema=schema_of(kind, weighted)))
            splits[name] = writer.finish()
    made = Index(
        labels=index.labels,
        requires=requires(kind, weighted),
        splits=splits,
        source=index.source,
        seed=index.seed,
        versions=index.versions,
    )
    store.create("index.json", made.to_bytes())


def target_of(text: str, label: int, classes: int, kind: TargetKind) -> Target:
    """Its own label, and by its text another one too, or of several none."""
    draw = zlib.crc32(text.encode())
    other = (label + 1 + draw % (classes - 1)) % classes
    if kind == "one" or draw % 3 == 0:
        return ((label, 1.0),)
    if kind == "several":
        return () if draw % 7 == 0 else tuple(sorted([(label, 1.0), (other, 1.0)]))
    return tuple(sorted([(label, 0.75), (other, 0.25)]))


def weight_of(text: str) -> float:
    return 0.25 + zlib.crc32(text.encode()) % 8 / 4
