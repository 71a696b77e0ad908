"""Targets of posts: stored, read back, limited, and refused where they are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from emotion_train.data.index import Index, limited, read_index
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import KINDS, Target, TargetKind, is_target, kind_of, largest, requires
from emotion_train.errors import WrongRequest
from emotion_train.preparation.shards import SplitWriter, schema_of
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store

LABELS = ("calm", "fear", "joy")
TARGETS: dict[TargetKind, list[Target]] = {
    "one": [((2, 1.0),), ((0, 1.0),), ((1, 1.0),), ((2, 1.0),), ((2, 1.0),)],
    "several": [((0, 1.0), (2, 1.0)), (), ((1, 1.0),), ((0, 1.0), (1, 1.0), (2, 1.0)), ((2, 1.0),)],
    "shares": [
        ((0, 1 / 3), (2, 2 / 3)),
        ((1, 1.0),),
        ((0, 0.25), (1, 0.75)),
        ((2, 1.0),),
        ((0, 0.9), (1, 0.1)),
    ],
}
WEIGHTS = [1.0, 0.5, 2.0, 0.125, 3.0]


def table_of(kind: TargetKind, weights: list[float] | None, targets: list[Target] | None = None) -> Any:
    targets = TARGETS[kind] if targets is None else targets
    columns: dict[str, Any] = {
        "id": [f"post {row}" for row in range(len(targets))],
        "text": [f"text {row}" for row in range(len(targets))],
    }
    if kind == "one":
        columns["label"] = [target[0][0] for target in targets]
    else:
        columns["labels"] = [[label for label, _ in target] for target in targets]
    if kind == "shares":
        columns["shares"] = [[share for _, share in target] for target in targets]
    if weights is not None:
        columns["weight"] = weights
    return pa.table(columns, schema=schema_of(kind, weights is not None))


def stored(folder: Path, kind: TargetKind, weights: list[float] | None) -> FolderStore:
    """A data set whose train and validation splits hold the posts, two to a row group."""
    store = open_store(str(folder))
    splits = {}
    for name in ("train", "validation"):
        writer = SplitWriter(store, name, 5, 3, 2, 4, folder.parent, kind, weights is not None)
        with writer:
            writer.add(table_of(kind, weights))
            splits[name] = writer.finish()
    index = Index(
        labels=LABELS,
        requires=requires(kind, weights is not None),
        splits=splits,
        source={},
        seed=0,
        versions={},
    )
    store.create("index.json", index.to_bytes())
    assert isinstance(store, FolderStore)
    return store


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_come_back_as_they_were_stored(
    kind: TargetKind, weights: list[float] | None, tmp_path: Path
) -> None:
    store = stored(tmp_path / "data", kind, weights)
    index = read_index(store)
    assert (index.targets, index.weighted) == (kind, weights is not None)
    split = index.split("train")
    with RowGroupReader(store, split) as reader:
        rows = [reader.rows(group) for group in range(len(split.row_groups))]
    assert [target for part in rows for target in part.targets] == TARGETS[kind]
    assert [weight for part in rows for weight in part.weights] == (weights or [1.0] * 5)
    totals = np.zeros(3)
    for target in TARGETS[kind]:
        for label, share in target:
            totals[label] += share
    assert split.label_counts == pytest.approx(totals.tolist())
    assert all(isinstance(count, int) for count in split.label_counts) == (kind != "shares")


@pytest.mark.parametrize("kind", KINDS)
def test_a_limited_split_has_so_many_of_the_posts(kind: TargetKind, tmp_path: Path) -> None:
    store = stored(tmp_path / "data", kind, WEIGHTS)
    index = limited(read_index(store), 3)
    split = index.split("train")
    assert split.rows == sum(split.row_counts) == 3
    with RowGroupReader(store, split) as reader:
        rows = [reader.rows(group) for group in range(len(split.row_groups))]
    assert [len(part.targets) for part in rows] == list(split.row_counts)
    kept = [target for part in rows for target in part.targets]
    assert len(kept) == 3
    assert [target for target in TARGETS[kind] if target in kept][:3] == kept
    assert all(count > 0 for count in split.label_counts)


def test_a_feature_is_refused_by_name_by_a_reader_that_does_not_know_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path / "data", "several", None)
    monkeypatch.setattr("emotion_train.data.index.FEATURES", frozenset({"weight"}))
    with pytest.raises(WrongRequest, match="requires 'targets:several', which this version"):
        read_index(store)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_stored_weight_that_is_none_is_refused(weight: float, tmp_path: Path) -> None:
    store = stored(tmp_path / "data", "one", [1.0, weight, 1.0, 1.0, 1.0])
    with (
        RowGroupReader(store, read_index(store).split("train")) as reader,
        pytest.raises(WrongRequest, match="a post has a weight that is no number above 0"),
    ):
        reader.rows(0)


@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        (((1, 1.0),), ("one", "several", "shares")),
        ((), ("several",)),
        (((0, 1.0), (2, 1.0)), ("several",)),
        (((0, 0.5), (2, 0.5)), ("shares",)),
        (((0, 0.5), (2, 0.4)), ()),
        (((0, 1.5), (2, -0.5)), ()),
        (((2, 0.5), (0, 0.5)), ()),
        (((1, 0.5), (1, 0.5)), ()),
        (((3, 1.0),), ()),
        (((-1, 1.0),), ()),
        (None, ()),
        (((0, math.nan),), ()),
    ],
)
def test_what_is_a_target(target: object, kinds: tuple[str, ...]) -> None:
    assert tuple(kind for kind in KINDS if is_target(target, kind, 3)) == tuple(
        kind for kind in KINDS if kind in kinds
    )


def test_the_largest_share_is_the_first_of_equal_ones() -> None:
    assert largest(((0, 0.2), (3, 0.4), (4, 0.4))) == 3
    with pytest.raises(ValueError, match=r"max\(\)"):
        largest(())


def test_features_name_the_targets() -> None:
    for kind in KINDS:
        for weighted in (False, True):
            assert kind_of(requires(kind, weighted)) == kind
    assert requires("one", False) == ()
