"""The index of a prepared data set: every object with its place, size and checksums.

`index.json` is written last and created only once, so its presence means that every object it names
is whole. It holds one entry per row group: 10 million posts make about 10,000 entries and 2 MB of
JSON, read once per process in 0.1 s and 40 MiB.

The index is checked three times. Its digest shows an edit by hand; its numbers must add up and fit
the objects that it names; and rows and label counts are compared with the posts as each row group
is read (`emotion_train/data/reader.py`). Schema 1 has no digest, so two labels that swap their
names there go unnoticed. None of this stops an attacker who can write to the store.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PrivateAttr, field_validator, model_validator

from emotion_train.data.targets import AUXILIARY, FEATURE, SOFT, SOURCE, WEIGHT, TargetKind, kind_of
from emotion_train.errors import ObjectNotFound, WrongRequest
from emotion_train.storage.document import FrozenModel, Manifest, read_manifest, version_of
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.store import Store

INDEX_KEY = "index.json"
_LABELS_SHOWN = 30
SCHEMA: Literal["emotion-train/index/2"] = "emotion-train/index/2"
FIRST: Literal["emotion-train/index/1"] = "emotion-train/index/1"
# names in `requires` that this version knows; a later version adds a name, not a schema
FEATURES = frozenset({*FEATURE.values(), WEIGHT, SOURCE, AUXILIARY, SOFT})
MAX_LANES = 64
SPLITS = ("train", "validation", "test")
_MAX_ROWS = 1 << 40
_MAX_OBJECT_BYTES = 1 << 40
_MAX_GROUP_BYTES = 4 << 30  # read at once
_MAX_FOOTER_BYTES = 256 << 20
_MAX_LABELS = 10_000
_MAX_LABEL_CHARS = 1000  # earlier versions wrote longer ones than `prepare` now takes

Count = Annotated[int, Field(ge=0, le=_MAX_ROWS)]
Sum = Annotated[float, Field(ge=0, le=_MAX_ROWS, allow_inf_nan=False)]
Counts = tuple[Count | Sum, ...]
_SUMS_OFF = 1e-6  # posts by which sums of shares may differ, for each post in the sum
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class DataObject(FrozenModel):
    """One Parquet file. The footer (Parquet's file metadata with its 8 trailing bytes) is the
    file's last `footer_bytes` bytes.
    """

    key: str = Field(min_length=1, max_length=1000)
    bytes: int = Field(gt=0, le=_MAX_OBJECT_BYTES)
    etag: str | None = Field(max_length=1000, description="None on a folder, which has none.")
    footer_bytes: int = Field(gt=0, le=_MAX_FOOTER_BYTES)
    footer_sha256: Sha256


class RowGroup(FrozenModel):
    """One row group: `length` bytes of `split.objects[object]` from `start`, holding `rows` posts.

    `label_counts` counts the posts that have each label, or sums its shares in them. `real_counts`
    is the same for real posts only; None where all are real.
    """

    object: int = Field(ge=0, description="Position in the split's objects.")
    ordinal: int = Field(ge=0, description="Position in that Parquet file.")
    start: int = Field(ge=0, le=_MAX_OBJECT_BYTES)
    length: int = Field(gt=0, le=_MAX_GROUP_BYTES)
    rows: int = Field(gt=0, le=_MAX_ROWS)
    label_counts: Counts
    real_counts: Counts | None = None
    sha256: Sha256
    _stored: RowGroup | None = PrivateAttr(None)

    @property
    def stored(self) -> RowGroup:
        """The row group as stored, before `limited` kept fewer of its posts."""
        return self._stored or self

    def keeping(self, rows: int, label_counts: tuple[float, ...]) -> RowGroup:
        """The same bytes with only `rows` posts that count; real posts keep their share of each
        label.
        """
        real = None
        if self.real_counts is not None:
            real = tuple(
                own * kept / every if every else 0
                for own, every, kept in zip(self.real_counts, self.label_counts, label_counts, strict=True)
            )
        kept = self.model_copy(update={"rows": rows, "label_counts": label_counts, "real_counts": real})
        kept._stored = self.stored
        return kept


class Split(FrozenModel):
    rows: int = Field(ge=0, le=_MAX_ROWS)
    label_counts: Counts
    lanes: int = Field(ge=0, le=MAX_LANES, description="min(64, number of row groups); 0 for an empty split.")
    objects: tuple[DataObject, ...]
    row_groups: tuple[RowGroup, ...]

    @property
    def row_counts(self) -> tuple[int, ...]:
        return tuple(group.rows for group in self.row_groups)

    @property
    def real_label_counts(self) -> tuple[float, ...]:
        """`label_counts` of real posts only. They decide the class weights: with added posts, an
        augmented label would lose the weight of a rare one.
        """
        if all(group.real_counts is None for group in self.row_groups):
            return self.label_counts
        counted = (
            group.label_counts if group.real_counts is None else group.real_counts
            for group in self.row_groups
        )
        return tuple(map(sum, zip(*counted, strict=True)))

    @model_validator(mode="after")
    def _adds_up(self) -> Split:
        if sum(group.rows for group in self.row_groups) != self.rows:
            raise ValueError("the row groups do not add up to the number of rows")
        if self.lanes != min(MAX_LANES, len(self.row_groups)):
            raise ValueError(
                f"lanes is {self.lanes} and must be min({MAX_LANES}, {len(self.row_groups)} row groups)"
            )
        if any(group.object >= len(self.objects) for group in self.row_groups):
            raise ValueError("a row group names an object that is not listed")
        self._refuse_wrong_counts()
        for described, groups in zip(self.objects, self._of_object, strict=True):
            _refuse_wrong_places(described, groups)
        return self

    @property
    def _of_object(self) -> list[list[RowGroup]]:
        groups: list[list[RowGroup]] = [[] for _ in self.objects]
        for group in self.row_groups:
            groups[group.object].append(group)
        return groups

    def _refuse_wrong_counts(self) -> None:
        sums = [0.0] * len(self.label_counts)
        for number, group in enumerate(self.row_groups):
            if len(group.label_counts) != len(sums):
                raise ValueError(f"row group {number} counts other labels than its split")
            real = group.label_counts if group.real_counts is None else group.real_counts
            if len(real) != len(sums) or any(
                own > every + _SUMS_OFF * group.rows
                for own, every in zip(real, group.label_counts, strict=True)
            ):
                raise ValueError(f"row group {number} counts more real posts than posts")
            sums = [total + count for total, count in zip(sums, group.label_counts, strict=True)]
        if differ(sums, self.label_counts, self.rows):
            raise ValueError("the label counts of the row groups do not add up to the split's")


class KnownLabels(FrozenModel):
    """A source of training posts, and the ids of the labels that it knows, main or auxiliary."""

    name: str = Field(max_length=1000)
    labels: tuple[int, ...] = Field(min_length=2, max_length=_MAX_LABELS)


class Auxiliary(FrozenModel):
    """Posts that are trained on and never scored: with other labels than the data set's, or with
    several where a post has one. `labels` follow the data set's own labels. Each auxiliary post
    names one of `sources`; `sources[0]` labelled the training split.
    """

    labels: tuple[str, ...] = Field(max_length=_MAX_LABELS)
    sources: tuple[KnownLabels, ...] = Field(min_length=1, max_length=1000)
    split: Split


def _refuse_wrong_places(described: DataObject, groups: list[RowGroup]) -> None:
    """Raises `ValueError` unless the row groups follow each other and end before the footer."""
    if [group.ordinal for group in groups] != list(range(len(groups))):
        raise ValueError(f"the row groups of {described.key} are not numbered in their order")
    ends = [(group.start, group.start + group.length) for group in groups]
    if any(end > start for (_, end), (start, _) in pairwise(ends)):
        raise ValueError(f"two row groups of {described.key} lie over each other")
    if ends and ends[-1][1] > described.bytes - described.footer_bytes:
        raise ValueError(f"a row group of {described.key} does not lie in its {described.bytes} bytes")


def differ(sums: Iterable[float], others: Iterable[float], posts: int) -> bool:
    """Whether label counts, or sums of shares, differ by more than rounding in `posts` posts."""
    return any(abs(own - other) > _SUMS_OFF * posts for own, other in zip(sums, others, strict=True))


def _refuse_wrong_sums(name: str, split: Split, targets: TargetKind) -> None:
    """Raises `ValueError` unless the label counts fit posts with one label, with shares that add up
    to 1, or with each label at most once.
    """
    for number, group in enumerate(split.row_groups):
        counts = group.label_counts
        fits = (
            max(counts, default=0) <= group.rows
            if targets == "several"
            else not differ([sum(counts)], [group.rows], group.rows)
        )
        if not fits or (targets != "shares" and not all(isinstance(count, int) for count in counts)):
            raise ValueError(f"the label counts of {name}'s row group {number} are not those of its rows")


class Index(Manifest):
    """Everything a reader needs to know about a prepared data set. Label ids are positions in
    `labels`.

    `requires` names features that a reader must know: label targets other than one label, posts
    with weights of their own, posts marked as not real, training posts with shares where the other
    splits have one label, and auxiliary posts.
    """

    older: ClassVar[tuple[str, ...]] = (FIRST,)
    digested: ClassVar[tuple[str, ...]] = (SCHEMA,)
    max_bytes: ClassVar[int] = 128 << 20

    schema_version: Literal["emotion-train/index/1", "emotion-train/index/2"] = SCHEMA
    requires: tuple[str, ...] = ()
    labels: tuple[str, ...] = Field(min_length=2, max_length=_MAX_LABELS)
    splits: dict[str, Split]
    auxiliary: Auxiliary | None = None
    source: dict[str, str | int | float | None] = Field(
        description="Where the posts came from and what cleaning did to them."
    )
    seed: int = Field(ge=0, lt=2**63)
    versions: dict[str, str]
    _whole: Index | None = PrivateAttr(None)

    @field_validator("labels")
    @classmethod
    def _names(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        name, times = Counter(labels).most_common(1)[0] if labels else ("", 1)
        if times > 1:
            raise ValueError(f"the label {name[:40]!r} is listed twice")
        if any(not label.strip() or len(label) > _MAX_LABEL_CHARS for label in labels):
            raise ValueError(f"a label is blank or has more than {_MAX_LABEL_CHARS} characters")
        return labels

    @model_validator(mode="after")
    def _fits_together(self) -> Index:
        for name, split in self.splits.items():
            if name not in SPLITS:
                raise ValueError(f"there is no split {name[:40]!r}")
            if split.row_groups and len(split.label_counts) != len(self.labels):
                raise ValueError(
                    f"{name} counts {len(split.label_counts)} labels, and there are {len(self.labels)}"
                )
            _refuse_wrong_sums(name, split, self.targets_of(name))
        self._refuse_wrong_auxiliary()
        keys = Counter(described.key for split in self.stored_splits.values() for described in split.objects)
        if any(times > 1 for times in keys.values()):
            raise ValueError("an object is listed twice")
        if self.schema_version != FIRST and any(map(has_control, self.trained_labels)):
            raise ValueError("a label has a control character")
        return self

    def _refuse_wrong_auxiliary(self) -> None:
        if (self.auxiliary is not None) != (AUXILIARY in self.requires):
            raise ValueError("auxiliary posts are listed but not required, or required but not listed")
        if self.auxiliary is None:
            return
        self._names(self.trained_labels)
        every, split = len(self.trained_labels), self.auxiliary.split
        if any(set(source.labels) - set(range(every)) for source in self.auxiliary.sources):
            raise ValueError("a source knows a label that is not listed")
        if not set(range(len(self.labels))) <= set(self.auxiliary.sources[0].labels):
            raise ValueError("the source of the training split does not know all its labels")
        if not split.rows or len(split.label_counts) != every:
            raise ValueError(f"auxiliary posts count {len(split.label_counts)} labels, and there are {every}")
        _refuse_wrong_sums(AUXILIARY, split, self.trained_targets)

    @classmethod
    def refuse_unknown(cls, document: dict[str, Any]) -> str | None:
        """A sentence on features that this version does not know; None where it knows all."""
        names = document.get("requires", [])
        unknown = [name for name in names if name not in FEATURES] if isinstance(names, list) else []
        if not unknown:
            return None
        versions = document.get("versions")
        by = str(versions.get("emotion_train", "?"))[:40] if isinstance(versions, dict) else "?"
        return (
            f"requires {', '.join(repr(name)[:80] for name in unknown[:4])}, which this version"
            f" ({version_of('emotion-train')}) does not know; it was prepared by {by}: type `pip install"
            f" 'emotion-train>={by}'`."
        )

    def content(self) -> dict[str, Any]:
        """The content to write. The first schema is written without `requires`, so that its sha256
        stays the one in logs and adapters.
        """
        content = self.model_dump(
            mode="json", exclude={"requires"} if self.schema_version == FIRST else set()
        )
        splits = list(content["splits"].values())
        if content["auxiliary"] is None:  # an empty field is left out
            del content["auxiliary"]
        else:
            splits.append(content["auxiliary"]["split"])
        for split in splits:
            for group in split["row_groups"]:
                if group["real_counts"] is None:
                    del group["real_counts"]
        return content

    def sha256(self) -> str:
        """The hash of the stored index, unchanged by `limited`."""
        return hashlib.sha256(self.whole.to_bytes()).hexdigest()

    @property
    def whole(self) -> Index:
        """The index as stored, before `limited`."""
        return self._whole or self

    @property
    def targets(self) -> TargetKind:
        """The kind of label targets of the posts."""
        return kind_of(self.requires)

    @property
    def trained_targets(self) -> TargetKind:
        """The kind of label targets of all training posts: posts with one label become shares where
        there are auxiliary posts.
        """
        if self.auxiliary is not None and self.targets == "one":
            return "shares"
        return self.targets_of("train")

    def targets_of(self, split: str) -> TargetKind:
        """The kind of label targets of a split's own posts."""
        return "shares" if split == "train" and SOFT in self.requires else self.targets

    @property
    def trained_labels(self) -> tuple[str, ...]:
        """The labels of the head in training: the data set's own, then the auxiliary ones."""
        return self.labels if self.auxiliary is None else (*self.labels, *self.auxiliary.labels)

    @property
    def stored_splits(self) -> dict[str, Split]:
        """All splits, auxiliary posts included."""
        return self.splits if self.auxiliary is None else self.splits | {AUXILIARY: self.auxiliary.split}

    @property
    def training(self) -> Split:
        """All posts that are trained on: the training split and the auxiliary posts, with counts of
        `trained_labels`.
        """
        train = self.split("train")
        return train if self.auxiliary is None else _together(train, self.auxiliary.split)

    @property
    def known_labels(self) -> npt.NDArray[np.bool_] | None:
        """Which of `trained_labels` each source of training posts knows; None without auxiliary
        posts.
        """
        if self.auxiliary is None:
            return None
        known_SC = np.zeros((len(self.auxiliary.sources), len(self.trained_labels)), np.bool_)
        for number, source in enumerate(self.auxiliary.sources):
            known_SC[number, list(source.labels)] = True
        return known_SC

    @property
    def weighted(self) -> bool:
        """Whether posts have weights of their own."""
        return WEIGHT in self.requires

    @property
    def marked(self) -> bool:
        """Whether a column marks posts that are not real."""
        return SOURCE in self.requires

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """The source's columns that were kept. They are no required feature: a reader that does not
        know them skips them.
        """
        names = self.source.get("keep_columns")
        return tuple(names.split(",")) if isinstance(names, str) and names else ()

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


def _together(train: Split, auxiliary: Split) -> Split:
    """Both splits as one, with their row groups mixed evenly, so that its first row groups are a
    sample of both.
    """
    nothing = (0,) * (len(auxiliary.label_counts) - len(train.label_counts))

    def counted(group: RowGroup) -> RowGroup:
        real = group.real_counts
        update = {"label_counts": (*group.label_counts, *nothing)}
        return group.model_copy(update=update | ({} if real is None else {"real_counts": (*real, *nothing)}))

    behind = [
        group.model_copy(update={"object": group.object + len(train.objects)})
        for group in auxiliary.row_groups
    ]
    groups = evenly([counted(group) for group in train.row_groups], behind)
    return train.model_copy(
        update={
            "rows": train.rows + auxiliary.rows,
            "label_counts": tuple(
                map(sum, zip((*train.label_counts, *nothing), auxiliary.label_counts, strict=True))
            ),
            "lanes": min(MAX_LANES, len(groups)),
            "objects": (*train.objects, *auxiliary.objects),
            "row_groups": groups,
        }
    )


def evenly(some: Sequence[RowGroup], others: Sequence[RowGroup]) -> tuple[RowGroup, ...]:
    """All row groups, each sequence in its order and spread evenly over the result."""
    placed = [
        ((number + 0.5) / len(groups), which, group)
        for which, groups in enumerate((some, others))
        for number, group in enumerate(groups)
    ]
    return tuple(group for _, _, group in sorted(placed, key=lambda entry: entry[:2]))


def limited(index: Index, rows: int | None) -> Index:
    """The index with `rows` posts of each split, in the shares of its labels; None leaves all.

    The choice depends only on the index and the number, not on a seed, machine or time. Each label
    of a split keeps at least one post. Whole row groups at the end are left out, so little of a
    large data set is read. Raises `WrongRequest` for fewer posts than labels.

    Where a post may have more than one label, the first posts are chosen, which are in random
    order; a row group that is cut gets the label counts that its posts have on average.
    """
    if rows is None:
        return index
    if rows < len(index.labels):
        raise WrongRequest(
            f"data.limit is {rows} and the data set has {len(index.labels)} labels, each of which needs a"
            f" post; give {len(index.labels)} or more."
        )
    splits = {
        name: (_first_of if index.targets_of(name) == "one" else _first_posts)(split, rows)
        for name, split in index.splits.items()
    }
    auxiliary = index.auxiliary
    if auxiliary is not None:
        auxiliary = auxiliary.model_copy(update={"split": _first_posts(auxiliary.split, rows)})
    kept = index.model_copy(update={"splits": splits, "auxiliary": auxiliary})
    kept._whole = index.whole
    return kept


def _first_of(split: Split, rows: int) -> Split:
    if rows >= split.rows:
        return split
    left = _shares(tuple(map(int, split.label_counts)), rows)
    label_counts, groups = tuple(left), []
    for group in split.row_groups:
        taken = tuple(min(int(have), want) for have, want in zip(group.label_counts, left, strict=True))
        left = [want - have for want, have in zip(left, taken, strict=True)]
        if any(taken):
            groups.append(group.keeping(sum(taken), taken))
    return _of_groups(split, label_counts, groups)


def _first_posts(split: Split, rows: int) -> Split:
    if rows >= split.rows:
        return split
    left, groups = rows, []
    for group in split.row_groups:
        if not left:
            break
        taken = min(left, group.rows)
        part = tuple(_part_of(count, taken, group.rows) for count in group.label_counts)
        groups.append(group if taken == group.rows else group.keeping(taken, part))
        left -= taken
    label_counts = tuple(map(sum, zip(*(group.label_counts for group in groups), strict=True)))
    return _of_groups(split, label_counts, groups)


def _part_of(count: float, taken: int, rows: int) -> float:
    """A label count's part for `taken` of `rows` posts; a whole count stays whole, and above 0."""
    part = count * taken / rows
    return max(min(1, count), round(part)) if isinstance(count, int) else part


def _of_groups(split: Split, label_counts: tuple[float, ...], groups: list[RowGroup]) -> Split:
    return split.model_copy(
        update={
            "rows": sum(group.rows for group in groups),
            "label_counts": label_counts,
            "lanes": min(MAX_LANES, len(groups)),
            "row_groups": tuple(groups),
        }
    )


def _shares(label_counts: tuple[int, ...], rows: int) -> list[int]:
    """`rows` divided among the labels in their shares, by largest remainders, with at least one for
    each label that has posts. `rows` must be at least the number of labels and at most that of
    posts.
    """
    total = sum(label_counts)
    ideal = [rows * count / total for count in label_counts]
    shares = [min(count, max(1, int(own))) for own, count in zip(ideal, label_counts, strict=True)]

    def short(label: int) -> tuple[float, int]:
        return ideal[label] - shares[label], -label

    while (missing := rows - sum(shares)) != 0:
        if missing > 0:
            may_grow = [label for label, count in enumerate(label_counts) if shares[label] < count]
            label = max(may_grow, key=short)
        else:
            label = min((label for label, share in enumerate(shares) if share > 1), key=short)
        shares[label] += 1 if missing > 0 else -1
    return shares


def has_control(label: str) -> bool:
    """Whether a label has a control character, which terminals and files may act on."""
    return any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in label)


def require_trainable(index: Index, weighted: Iterable[str] = ()) -> None:
    """Raises `WrongRequest` when a label has no training post, when there is no validation post to
    choose a checkpoint by, or when `weighted`, the table of class weights, has an unknown label.
    """
    index.split("validation")
    for label, count in zip(index.labels, index.split("train").label_counts, strict=True):
        if count == 0:
            raise WrongRequest(
                f"No training post has the label {label!r}; prepare the data with the labels that occur."
            )
    labels = index.trained_labels
    for label in weighted:
        if label not in labels:
            raise WrongRequest(
                f"loss.class_weights has {label!r}, which is no label of the data set; its labels are"
                f" {', '.join(labels[:_LABELS_SHOWN])}"
                f"{', …' if len(labels) > _LABELS_SHOWN else ''}."
            )


def require_slices(index: Index, columns: Iterable[str]) -> None:
    """Raises `WrongRequest` for a column of `report.slices` that the data set did not keep."""
    kept = index.kept_columns
    for column in columns:
        if column not in kept:
            has = f"it kept {', '.join(kept)}" if kept else "it kept none"
            raise WrongRequest(
                f"report.slices has {column!r}, which is no kept column of the data set ({has}); prepare it"
                f" elsewhere with --keep-columns {column}, or leave it out."
            )


def read_index(store: Store) -> Index:
    """Read and check `index.json`.

    Raises `WrongRequest` when it is missing (an unfinished or absent data set), damaged, or of an
    unknown schema, and for a file of posts in place of a data set.
    """
    if isinstance(store, FolderStore) and store.root.is_file():
        raise WrongRequest(
            f"{store.url} is a file, and a data set is what `emotion-train prepare {store.url} DATA_URL`"
            " writes; prepare it, and give that DATA_URL."
        )
    try:
        return read_manifest(
            Index,
            store,
            INDEX_KEY,
            other_schema="Prepare the data again.",
            damaged="Prepare the data again into an empty prefix.",
        )
    except ObjectNotFound:
        whole = str(store.root) if isinstance(store, FolderStore) else store.url
        folder = f" ({whole})" if whole != store.url else ""  # of a relative path, from another folder
        raise WrongRequest(
            f"There is no prepared data set at {store.url}{folder}: {INDEX_KEY} is missing (it is written"
            " last). "
            f"Type `emotion-train prepare YOUR_POSTS {store.url}`."
        ) from None
