"""Writes an augmented data set: the training split with added, marked posts, and exact copies of
the held-out splits and the auxiliary posts.

The training split is held in memory and written anew, with the added posts at random places, as
`prepare` shuffles. Validation and test objects are copied byte for byte, so that both data sets are
scored on the same posts.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emotion_train.data.index import SPLITS, Index, Split
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import SOFT, SOURCE, WEIGHT, Target, largest, requires
from emotion_train.errors import WrongRequest
from emotion_train.hosted.prompts import TrainingPosts
from emotion_train.preparation.derived import copied, copied_auxiliary, create_index, versions_now
from emotion_train.storage.store import Store

_ROWS_PER_OBJECT = 262_144


class Added(NamedTuple):
    """A post to add. `source` says where it comes from, and is never empty."""

    post_id: str
    text: str
    target: Target
    weight: float
    source: str


def require_plain(index: Index, url: str) -> None:
    """Raises `WrongRequest` for a data set that already holds added posts: an augmentation counts
    real posts only.
    """
    if index.marked or SOFT in index.requires:
        what = "augmented" if index.marked else "distilled"
        raise WrongRequest(f"{url} was {what} already; give the data set that it was made from.")


def write(
    source: Store,
    index: Index,
    posts: TrainingPosts,
    added: Sequence[Added],
    store: Store,
    *,
    seed: int,
    facts: dict[str, str | int | float | None],
) -> Index:
    """Write the data set at `store` and return its index. The same content always gives the same
    bytes, so two processes may write at once.

    Raises `WrongRequest` where the store holds another data set, and `StorageError`.
    """
    splits: dict[str, Split] = {}
    with tempfile.TemporaryDirectory(prefix="emotion-train-augment-") as name:
        for split in SPLITS:
            if split not in index.splits:
                continue
            if split == "train":
                splits[split] = _write_train(index, posts, added, store, Path(name), seed)
            else:
                splits[split] = copied(source, index.splits[split], store)
    auxiliary = copied_auxiliary(source, index, store)
    made = Index(
        labels=index.labels,
        requires=requires(index.targets, weighted=True, marked=True, auxiliary=auxiliary is not None),
        splits=splits,
        auxiliary=auxiliary,
        source={**index.source, "augmented_from": index.sha256(), **facts},
        seed=index.seed,
        versions=versions_now(index),
    )
    return create_index(store, made, "NEW_DATA_URL")


def _write_train(
    index: Index, posts: TrainingPosts, added: Sequence[Added], store: Store, folder: Path, seed: int
) -> Split:
    import pyarrow as pa

    from emotion_train.preparation.shards import SplitWriter, schema_of

    rows: list[tuple[str, str, Target, float, str]] = [
        (*post, "") for post in zip(posts.ids, posts.texts, posts.targets, posts.weights, strict=True)
    ]
    rows = _mixed(rows, added, seed)
    columns: dict[str, Any] = {"id": [row[0] for row in rows], "text": [row[1] for row in rows]}
    if index.targets == "one":
        columns["label"] = [largest(row[2]) for row in rows]
    else:
        columns["labels"] = [[label for label, _ in row[2]] for row in rows]
    if index.targets == "shares":
        columns["shares"] = [[share for _, share in row[2]] for row in rows]
    columns[WEIGHT] = [row[3] for row in rows]
    columns[SOURCE] = [row[4] for row in rows]
    group = max(stored.rows for stored in index.split("train").row_groups)
    writer = SplitWriter(
        store,
        "train",
        len(rows),
        len(index.labels),
        group,
        _ROWS_PER_OBJECT,
        folder,
        index.targets,
        True,
        True,
    )
    with writer:
        writer.add(pa.table(columns, schema=schema_of(index.targets, True, True)))
        return writer.finish()


def _mixed(own: Sequence[Any], added: Sequence[Any], seed: int) -> list[Any]:
    """All rows: the added ones at places drawn by the seed, the others in their order."""
    total = len(own) + len(added)
    draw = random.Random(f"places {seed}")
    places = draw.sample(range(total), len(added))
    mixed: list[Any] = [None] * total
    for place, row in zip(places, added, strict=True):
        mixed[place] = row
    rest = iter(own)
    return [next(rest) if row is None else row for row in mixed]


class Marked(NamedTuple):
    """Label and weight of an added post of a data set."""

    label: int
    weight: float


def sources_of(store: Store, index: Index) -> list[Marked]:
    """The added posts of an augmented training split."""
    marked = []
    split = index.split("train")
    with RowGroupReader(store, split, capacity=16) as reader:
        for group in range(len(split.row_groups)):
            rows = reader.rows(group)
            marked += [
                Marked(largest(target), weight)
                for target, weight, source in zip(rows.targets, rows.weights, rows.sources, strict=True)
                if source and target
            ]
    return marked


def repeated(posts: TrainingPosts, like: Sequence[Marked], seed: int) -> list[Added]:
    """For each added post, a repeated real post of the same label and weight: shows what more posts
    alone would bring.
    """
    turns: dict[int, list[int]] = {}
    used: Counter[int] = Counter()
    copies = []
    for label, weight in like:
        if label not in turns:
            turns[label] = posts.with_label(label)
            random.Random(f"repeated {seed} {label}").shuffle(turns[label])
        turn, rows = used[label], turns[label]
        used[label] += 1
        row, times = rows[turn % len(rows)], turn // len(rows) + 1
        own = posts.ids[row]
        copies.append(
            Added(
                f"{own}#again-{label}-{times}",
                posts.texts[row],
                posts.targets[row],
                weight,
                f"repeated/{own}",
            )
        )
    return copies
