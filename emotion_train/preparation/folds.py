"""The folds of a training split, each a data set of its own. Its training split is all other folds,
and its test split is the fold itself, so that a run on it publishes a model's answers for posts
that the model did not see.

A post's fold follows only from its text (by the hash that finds equal texts) and the number of
folds: no list is stored, and posts with equal texts stay together. The price: the training posts
are stored once more for each fold.

Letters: N posts, C labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emotion_train.data.index import SCHEMA, Index, Split
from emotion_train.data.reader import Rows
from emotion_train.data.targets import SOFT, Target
from emotion_train.data.text_filter import keys_of
from emotion_train.errors import WrongRequest
from emotion_train.preparation.derived import (
    chosen_rows,
    copied,
    copied_auxiliary,
    create_index,
    versions_now,
    write_split,
)
from emotion_train.storage.store import Store

_LEAST_SHARE = 1e-4  # smaller shares of a post are left out


def folds_of_texts(texts: Sequence[str], folds: int) -> NDArray[np.int64]:
    """`fold_N`, the fold of each text."""
    return (keys_of(texts)[:, 0] % np.uint64(folds)).astype(np.int64)


def require_foldable(index: Index, rows: Rows, folds: int, url: str) -> None:
    """Raises `WrongRequest` for posts that cannot be distilled, and where one fold has all posts of
    a label.
    """
    if index.targets == "several":
        raise WrongRequest(
            f"The posts of {url} have several labels, and a teacher gives shares; distil a data set whose"
            " posts have one label, or shares of labels."
        )
    if index.marked or SOFT in index.requires:
        what = "was augmented" if index.marked else "was distilled already"
        raise WrongRequest(f"{url} {what}; give the data set that it was made from.")
    fold_N = folds_of_texts(_texts(rows), folds)
    in_folds: dict[int, set[int]] = {}
    for target, fold in zip(rows.targets, fold_N.tolist(), strict=True):
        for label, _ in target or ():
            in_folds.setdefault(label, set()).add(fold)
    for label, name in enumerate(index.labels):
        if len(in_folds.get(label, ())) < 2:
            raise WrongRequest(
                f"All training posts of the label {name!r} are in one of {folds} folds, and that fold's"
                " teacher would not know the label; give another number of --folds, or more posts of it."
            )


def write_fold(
    source: Store, index: Index, rows: Rows, fold: int, folds: int, store: Store, option: str
) -> Index:
    """The data set of one fold at `store`; `rows` is the training split of `index` at `source`.
    Raises as `create_index`.
    """
    fold_N = folds_of_texts(_texts(rows), folds)
    parts = {
        "train": chosen_rows(rows, np.flatnonzero(fold_N != fold).tolist()),
        "test": chosen_rows(rows, np.flatnonzero(fold_N == fold).tolist()),
    }
    splits: dict[str, Split] = {}
    with tempfile.TemporaryDirectory(prefix="emotion-launch-fold-") as name:
        splits["train"] = write_split(index, "train", parts["train"], index.targets, store, Path(name))
        splits["validation"] = copied(source, index.split("validation"), store)
        splits["test"] = write_split(index, "test", parts["test"], index.targets, store, Path(name))
    made = index.model_copy(
        update={
            "schema_version": SCHEMA,
            "splits": splits,
            "auxiliary": copied_auxiliary(source, index, store),
            "source": {**index.source, "fold_of": index.sha256(), "fold": fold, "folds": folds},
            "versions": versions_now(index),
        }
    )
    return create_index(store, made, option)


def write_soft(
    source: Store,
    index: Index,
    rows: Rows,
    prob_by_id: Mapping[str, NDArray[np.float64]],
    own: float,
    facts: Mapping[str, str | int | float | None],
    store: Store,
    option: str,
) -> Index:
    """The data set with shares for training posts: a part `own` of each from its own labels, the
    rest from `prob_by_id`. Validation and test keep their bytes. Raises as `create_index`.
    """
    soft = rows._replace(
        targets=[
            softened(target or (), prob_by_id[post_id], own)
            for post_id, target in zip(rows.ids, rows.targets, strict=True)
        ]
    )
    splits: dict[str, Split] = {}
    with tempfile.TemporaryDirectory(prefix="emotion-launch-soft-") as name:
        for split, stored in index.splits.items():
            splits[split] = (
                write_split(index, split, soft, "shares", store, Path(name))
                if split == "train"
                else copied(source, stored, store)
            )
    made = index.model_copy(
        update={
            "schema_version": SCHEMA,
            "requires": (*index.requires, *((SOFT,) if index.targets == "one" else ())),
            "splits": splits,
            "auxiliary": copied_auxiliary(source, index, store),
            "source": {**index.source, "distilled_from": index.sha256(), **facts},
            "versions": versions_now(index),
        }
    )
    return create_index(store, made, option)


def softened(target: Target, prob_C: NDArray[np.float64], own: float) -> Target:
    """The shares of a post: a part `own` from its own labels, the rest in proportion to `prob_C`.
    Shares below 1e-4 are left out, and the others add up to 1.
    """
    share_C = (1 - own) * np.asarray(prob_C, np.float64)
    for label, share in target:
        share_C[label] += own * share
    share_C = np.where(share_C / share_C.sum() < _LEAST_SHARE, 0.0, share_C)
    share_C = share_C / share_C.sum()
    return tuple((label, float(share_C[label])) for label in np.flatnonzero(share_C).tolist())


def _texts(rows: Rows) -> list[str]:
    return [text or "" for text in rows.texts]
