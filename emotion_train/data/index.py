"""The index of a prepared data set: what lies where in the bucket, and how to know that it is still
the same.

`index.json` is written last and create-only, so its presence means that every object it names is
whole. It holds one entry per row group: 10 million posts make about 10,000 entries and 2 MB of
JSON, read once per process in 0.1 s and 40 MiB.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field, model_validator

from emotion_train.errors import ObjectNotFound, WrongRequest
from emotion_train.storage.document import FrozenModel, Manifest, read_manifest
from emotion_train.storage.store import Store

INDEX_KEY = "index.json"
SCHEMA: Literal["emotion-train/index/1"] = "emotion-train/index/1"
MAX_LANES = 64
SPLITS = ("train", "validation", "test")


class DataObject(FrozenModel):
    """One Parquet file. The footer (Parquet's file metadata with its 8 trailing bytes) is the
    file's last `footer_bytes` bytes.
    """

    key: str
    bytes: int = Field(gt=0)
    etag: str | None = Field(description="None on a folder, which has none.")
    footer_bytes: int = Field(gt=0)
    footer_sha256: str


class RowGroup(FrozenModel):
    """One row group: `length` bytes of `split.objects[object]` from `start`, holding `rows`
    posts.
    """

    object: int = Field(ge=0, description="Position in the split's objects.")
    ordinal: int = Field(ge=0, description="Position in that Parquet file.")
    start: int = Field(ge=0)
    length: int = Field(gt=0)
    rows: int = Field(gt=0)
    label_counts: tuple[int, ...]
    sha256: str


class Split(FrozenModel):
    rows: int = Field(ge=0)
    label_counts: tuple[int, ...]
    lanes: int = Field(ge=0, le=MAX_LANES, description="min(64, number of row groups); 0 for an empty split.")
    objects: tuple[DataObject, ...]
    row_groups: tuple[RowGroup, ...]

    @property
    def row_counts(self) -> tuple[int, ...]:
        return tuple(group.rows for group in self.row_groups)

    @model_validator(mode="after")
    def _adds_up(self) -> Split:
        if sum(group.rows for group in self.row_groups) != self.rows or sum(self.label_counts) != self.rows:
            raise ValueError("the row groups or label counts do not add up to the number of rows")
        if self.lanes != min(MAX_LANES, len(self.row_groups)):
            raise ValueError(
                f"lanes is {self.lanes} and must be min({MAX_LANES}, {len(self.row_groups)} row groups)"
            )
        if any(group.object >= len(self.objects) for group in self.row_groups):
            raise ValueError("a row group names an object that is not listed")
        return self


class Index(Manifest):
    """Everything a reader needs to know about a prepared data set. Label ids are positions in
    `labels`.
    """

    schema_version: Literal["emotion-train/index/1"] = SCHEMA
    labels: tuple[str, ...] = Field(min_length=2)
    splits: dict[str, Split]
    source: dict[str, str | int | float | None] = Field(
        description="Where the posts came from and what cleaning did to them."
    )
    seed: int
    versions: dict[str, str]

    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def split(self, name: str) -> Split:
        """The split of this name; raises `WrongRequest` when it is missing or empty."""
        split = self.splits.get(name)
        if split is None or split.rows == 0:
            present = ", ".join(key for key, value in self.splits.items() if value.rows)
            raise WrongRequest(
                f"The data set has no posts in split {name!r}; it has {present}. Name one of these, or"
                " prepare the data again."
            )
        return split


def require_trainable(index: Index) -> None:
    """Raises `WrongRequest` when a label has no training post, or there is no validation post to
    choose a checkpoint by.
    """
    index.split("validation")
    for label, count in zip(index.labels, index.split("train").label_counts, strict=True):
        if count == 0:
            raise WrongRequest(
                f"No training post has the label {label!r}; prepare the data with the labels that occur."
            )


def read_index(store: Store) -> Index:
    """Read and check `index.json`.

    Raises `WrongRequest` when it is missing (an unfinished or absent data set), damaged, or of an
    unknown schema.
    """
    try:
        return read_manifest(
            Index,
            store,
            INDEX_KEY,
            other_schema="Prepare the data again.",
            damaged="Prepare the data again into an empty prefix.",
        )
    except ObjectNotFound:
        raise WrongRequest(
            f"There is no prepared data set at {store.url}: {INDEX_KEY} is missing (it is written last). "
            f"Type `emotion-train prepare YOUR_POSTS {store.url}`."
        ) from None
