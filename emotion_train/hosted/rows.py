"""The posts of a benchmark: a whole split, or a stratified part of it, the same for all models.

Letters: N posts, C labels.
"""

# ruff: noqa: N802 - arrays end in their shape

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emotion_train.data.index import Index
from emotion_train.data.targets import Target, TargetKind, largest
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.floors import posts
from emotion_train.storage.store import Store


@dataclass(frozen=True)
class Rows:
    """Posts with their true labels; for shares, the label of the largest share. `of` is the number
    of posts in the split.
    """

    data_url: str
    split: str
    labels: tuple[str, ...]
    kind: TargetKind
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    truth: list[tuple[int, ...]]
    of: int

    @property
    def truth_NC(self) -> NDArray[np.bool_]:
        is_in_NC = np.zeros((len(self.ids), len(self.labels)), bool)
        for row, labels in enumerate(self.truth):
            is_in_NC[row, list(labels)] = True
        return is_in_NC


def rows_of(store: Store, index: Index, split: str, count: int | None, seed: int) -> Rows:
    """All posts of a split in their stored order, or `count` of them. Raises `WrongRequest` for a
    split without posts, and for a `count` above its number of posts.
    """
    read = list(posts(store, index.split(split)))
    if count is not None and count > len(read):
        raise WrongRequest(f"--rows is {count:,}, and {split} has {len(read):,} posts; give that or fewer.")
    truth = [_labels_of(target, index.targets) for _, _, target in read]
    chosen = range(len(read)) if count is None else stratified(truth, count, seed)
    return Rows(
        store.url,
        split,
        index.labels,
        index.targets,
        tuple(read[row][0] for row in chosen),
        tuple(read[row][1] for row in chosen),
        [truth[row] for row in chosen],
        len(read),
    )


def _labels_of(target: Target, kind: TargetKind) -> tuple[int, ...]:
    return tuple(label for label, _ in target) if kind == "several" else (largest(target),)


def stratified(truth: Sequence[tuple[int, ...]], count: int, seed: int) -> list[int]:
    """`count` rows in ascending order, with each label in its share: rows are sorted by their
    rarest label, in random order within a label, and taken at even distances.
    """
    times: dict[int, int] = {}
    for labels in truth:
        for label in labels:
            times[label] = times.get(label, 0) + 1
    draw = random.Random(f"rows {seed}")
    keys = [
        (min(labels, key=lambda one: (times[one], one)) if labels else -1, draw.random()) for labels in truth
    ]
    ordered = sorted(range(len(truth)), key=keys.__getitem__)
    return sorted(ordered[(2 * place + 1) * len(ordered) // (2 * count)] for place in range(count))
