"""Prepared data sets whose posts have the targets that a test names, by the program's writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from emotion_train.data.index import Index
from emotion_train.data.targets import Target, TargetKind, requires
from emotion_train.preparation.shards import SplitWriter, schema_of
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

LABELS = ("calm", "fear", "joy")
Post = tuple[str, Target]  # its text and its target


def having(*labels: int) -> Target:
    """The target of a post that has these of several labels."""
    return tuple((label, 1.0) for label in labels)


def write_targets(
    url: str,
    kind: TargetKind,
    splits: Mapping[str, Sequence[Post]],
    work: Path,
    labels: Sequence[str] = LABELS,
) -> Store:
    """The data set, whose posts are called "train 0", "train 1" …"""
    store = open_store(url)
    written = {}
    for name, posts in splits.items():
        with SplitWriter(store, name, len(posts), len(labels), 8, 4, work, kind, False) as writer:
            writer.add(_table(kind, name, posts))
            written[name] = writer.finish()
    index = Index(
        labels=tuple(labels),
        requires=requires(kind, False),
        splits=written,
        source={},
        seed=0,
        versions={},
    )
    store.create("index.json", index.to_bytes())
    return store


def _table(kind: TargetKind, name: str, posts: Sequence[Post]) -> Any:
    columns: dict[str, Any] = {
        "id": [f"{name} {row}" for row in range(len(posts))],
        "text": [text for text, _ in posts],
    }
    if kind == "one":
        columns["label"] = [target[0][0] for _, target in posts]
    else:
        columns["labels"] = [[label for label, _ in target] for _, target in posts]
    if kind == "shares":
        columns["shares"] = [[share for _, share in target] for _, target in posts]
    return pa.table(columns, schema=schema_of(kind, False))
