"""Checks of the data set: its objects, its labels, and posts that stand in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from emotion_train.config import Config
from emotion_train.data.index import DataObject, Index, Split, require_trainable
from emotion_train.errors import WrongRequest
from emotion_train.storage.store import ObjectInfo, Store

_BYTES_READ_AGAIN = 256 << 20  # of objects whose ETag says nothing
_HELD_OUT_LOOKED_AT = 50_000
_TRAIN_LOOKED_AT = 200_000
_NAMES_SHOWN = 4
_FEW_POSTS = 5


def check_data(config: Config, index: Index) -> str:
    rows = ", ".join(f"{name} {split.rows:,}" for name, split in index.splits.items())
    index.split("train")
    index.split("validation")
    return f"{rows} posts, {len(index.labels)} labels, {config.data.url}"


def check_objects(store: Store, index: Index) -> str:
    """Every object is there with its size; what no ETag vouches for is compared by sha256, as long
    as it is not too much.
    """
    there = {info.key: info for info in store.list()}
    described = [
        (split, number, one) for split in index.splits.values() for number, one in enumerate(split.objects)
    ]
    problems = [
        problem for _, _, one in described if (problem := _unlike(one, there.get(one.key))) is not None
    ]
    if problems:
        more = f", and {len(problems) - _NAMES_SHOWN} more" if len(problems) > _NAMES_SHOWN else ""
        raise WrongRequest(
            f"The data set at {store.url} is not whole: {', '.join(problems[:_NAMES_SHOWN])}{more}; prepare"
            " it again into an empty prefix, or copy all of it."
        )
    total = sum(one.bytes for _, _, one in described)
    doubtful = [item for item in described if item[2].etag is None or there[item[2].key].etag != item[2].etag]
    read, unread = _compare(store, doubtful)
    words = f"{len(described)} objects of {total / 1e6:,.1f} MB, all there"
    if not doubtful:
        return f"{words}, unchanged by their ETags"
    return f"{words}; {read} compared by sha256" + (f", {unread} by size alone" if unread else "")


def _unlike(described: DataObject, there: ObjectInfo | None) -> str | None:
    if there is None:
        return f"{described.key} is missing"
    return (
        f"{described.key} has {there.size:,} bytes instead of {described.bytes:,}"
        if there.size != described.bytes
        else None
    )


def _compare(store: Store, doubtful: Sequence[tuple[Split, int, DataObject]]) -> tuple[int, int]:
    """How many objects were read and are right, and how many were too much; raises `WrongRequest`
    for one that is wrong.
    """
    read, budget = 0, _BYTES_READ_AGAIN
    for split, number, described in doubtful:
        if described.bytes > budget:
            continue
        budget -= described.bytes
        content = store.read(described.key)
        for group in split.row_groups:
            end = group.start + group.length
            if (
                group.object == number
                and hashlib.sha256(content[group.start : end]).hexdigest() != group.sha256
            ):
                raise WrongRequest(
                    f"{store.url_of(described.key)} is not what index.json describes (bytes {group.start} to"
                    f" {end}); prepare the data again into an empty prefix."
                )
        read += 1
    return read, len(doubtful) - read


def check_labels(index: Index) -> str:
    require_trainable(index)
    train = index.split("train")
    rarest, most = min(train.label_counts), max(train.label_counts)
    remarks = [
        f"largest class {most / rarest:,.{1 if most < 10 * rarest else 0}f} times the smallest ({rarest:,}"
        " posts)"
    ]
    for name, split in index.splits.items():
        empty = [label for label, count in zip(index.labels, split.label_counts, strict=True) if count == 0]
        if name != "train" and split.rows and empty:
            raise WrongRequest(
                f"No {name} post has the label {_some(empty)}, which counts 0 in macro-F1 whatever the model"
                f" does; prepare the data with more {name} posts, or without"
                f" {'it' if len(empty) == 1 else 'them'}."
            )
        if name != "train" and split.rows:
            few = [
                label
                for label, count in zip(index.labels, split.label_counts, strict=True)
                if count < _FEW_POSTS
            ]
            remarks += [f"{name} has fewer than {_FEW_POSTS} posts of {_some(few)}"] if few else []
    return "; ".join(remarks)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (
        f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    )


def check_overlap(store: Store, index: Index) -> str:
    """No text of the training split, normalised as `prepare` does, stands in another one too."""
    trained, looked_at = _text_hashes(store, index.split("train"), _TRAIN_LOOKED_AT)
    for name, split in index.splits.items():
        if name == "train" or split.rows == 0:
            continue
        held_out, _ = _text_hashes(store, split, _HELD_OUT_LOOKED_AT)
        if both := len(trained.keys() & held_out.keys()):
            example = held_out[next(iter(sorted(trained.keys() & held_out.keys())))]
            raise WrongRequest(
                f"{both} texts stand in train and in {name}, among them {example[:60]!r}, so that its score"
                " would be too good; prepare the data again, which keeps a text out of two splits."
            )
    total = index.split("train").rows
    return (
        f"no text in two splits ({'all' if looked_at == total else f'{looked_at:,} of'} {total:,} training"
        " posts)"
    )


def _text_hashes(store: Store, split: Split, most: int) -> tuple[dict[bytes, str], int]:
    """The beginning of each text by the hash of its normal form, of at most about `most` posts, and
    how many posts these are.
    """
    from emotion_train.data.cleaning import normalised
    from emotion_train.data.reader import RowGroupReader

    found: dict[bytes, str] = {}
    looked_at = 0
    with RowGroupReader(store, split, capacity=4) as reader:
        groups = range(len(split.row_groups))
        for place, group in enumerate(groups):
            reader.ask(groups[place : place + 3])
            rows = [text for text in reader.rows(group).texts if text]
            found |= {
                hashlib.blake2b(normalised(text).encode("utf-8", "replace"), digest_size=16).digest(): text[
                    :80
                ]
                for text in rows
            }
            looked_at += split.row_groups[group].rows
            if looked_at >= most:
                break
    return found, looked_at
