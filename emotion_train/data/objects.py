"""Whether a store holds every object of an index with the bytes that the index describes.

Costs one listing where ETags confirm the bytes. A folder, or a copy in another bucket, is read once
from beginning to end, or as far as the caller allows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from emotion_train.data.index import DataObject, Index, RowGroup
from emotion_train.storage.store import Store

_READ_BYTES = 16 << 20
_MAGIC = b"PAR1"


class Look(NamedTuple):
    """The result of a look at all objects."""

    missing: tuple[str, ...]  # keys
    damaged: dict[str, str]  # for each key a phrase that begins with it and describes the damage
    by_etag: int  # objects confirmed by their ETags
    by_sha256: int  # objects that were read
    by_size: int  # objects that were too large to read


def look_at_objects(store: Store, index: Index, most_bytes: int | None = None) -> Look:
    """Compare every object's size, and its ETag or else its bytes. At most `most_bytes` are read
    (None: no limit).
    """
    stored = {info.key: info for info in store.list()}
    missing: list[str] = []
    damaged: dict[str, str] = {}
    by_etag = by_sha256 = by_size = 0
    for split in index.stored_splits.values():
        for number, described in enumerate(split.objects):
            info = stored.get(described.key)
            if info is None or info.size != described.bytes:  # a second look: the object itself
                info = store.find(described.key)
            groups = [group for group in split.row_groups if group.object == number]
            if info is None:
                missing.append(described.key)
            elif info.size != described.bytes:
                damaged[described.key] = (
                    f"{described.key} has {info.size:,} bytes instead of {described.bytes:,}"
                )
            elif described.etag is not None and info.etag == described.etag:
                by_etag += 1
            elif most_bytes is not None and described.bytes > most_bytes:
                by_size += 1
            else:
                by_sha256 += 1
                most_bytes = None if most_bytes is None else most_bytes - described.bytes
                if wrong := _first_wrong_range(store, described, groups):
                    damaged[described.key] = (
                        f"{described.key} is not what index.json describes (bytes {wrong[0]} to {wrong[1]})"
                    )
    return Look(tuple(missing), damaged, by_etag, by_sha256, by_size)


def _first_wrong_range(
    store: Store, described: DataObject, groups: Sequence[RowGroup]
) -> tuple[int, int] | None:
    """Start and end of the first byte range with a wrong sha256; None where all are right. The
    ranges cover the whole object.
    """
    footer = described.bytes - described.footer_bytes
    ranges = [
        (0, len(_MAGIC), hashlib.sha256(_MAGIC).hexdigest()),
        *((group.start, group.start + group.length, group.sha256) for group in groups),
        (footer, described.bytes, described.footer_sha256),
    ]
    held_from, held = 0, b""
    for start, end, sha256 in sorted(ranges):
        if end > held_from + len(held):
            held_from = start
            held = store.read(described.key, start=start, length=max(end - start, _READ_BYTES))
        if not _has_sum(held[start - held_from : end - held_from], sha256) and not _holds_sum(
            store, described.key, start, end, sha256
        ):
            return start, end
    return None


def _has_sum(data: bytes, sha256: str) -> bool:
    return hashlib.sha256(data).hexdigest() == sha256


def _holds_sum(store: Store, key: str, start: int, end: int, sha256: str) -> bool:
    """Whether the range, read again by itself, has that sha256."""

    def verify(data: bytes) -> None:
        if not _has_sum(data, sha256):
            raise _OtherSum

    try:
        store.read_verified(key, verify, start=start, length=end - start)
    except _OtherSum:
        return False
    return True


class _OtherSum(ValueError):
    pass
