"""The interface of a store: whole objects below one URL, read, written and listed in the same way
in a bucket and in a folder.

Only the room `storage` speaks to buckets and folders; `open.py` opens the store that a URL names.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from emotion_train.errors import ObjectNotFound, WrongRequest
from emotion_train.storage.buffers import Buffers
from emotion_train.storage.second_look import second_look

TEMPORARY = ".writing-"
_COMPARED_BYTES = 16 << 20
RANGE_BYTES = 64 << 20  # most bytes of one request that fills a part of a buffer
T = TypeVar("T")


@dataclass(frozen=True)
class ObjectInfo:
    """An object's facts. `etag` has no quotes, and is None on a folder. `modified` is the time of
    writing, in UTC epoch seconds by the clock of `Store.now`; None where a store does not give it.
    """

    key: str
    size: int
    etag: str | None
    modified: float | None = field(default=None, compare=False)


class Store(ABC):
    """Objects below one URL, named by `/`-separated keys. Safe for use from several threads."""

    url: str

    @abstractmethod
    def read(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        """`length` bytes from `start`, fewer where the object ends; the whole rest when `length` is
        None.

        Raises `ObjectNotFound`, and `ObjectChanged` when the object's ETag is not `if_match`;
        always on a folder, which has no ETags.
        """

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, if_match: str | None = None) -> int:
        """Fill the buffer with the object's bytes from `start`; returns their number. Raises as
        `read`.
        """
        data = self.read(key, start=start, length=len(buffer), if_match=if_match)
        buffer[: len(data)] = data
        return len(data)

    def read_again(
        self, key: str, look: int, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        """The bytes as by `read`, by another way than look `look - 1` (0 is `read`): past caches,
        and in a bucket over a new connection of the other client.
        """
        return self.read(key, start=start, length=length, if_match=if_match)

    def read_verified(
        self,
        key: str,
        verify: Callable[[bytes], T],
        *,
        start: int = 0,
        length: int | None = None,
        if_match: str | None = None,
    ) -> T:
        """What `verify` returns for these bytes. It refuses wrong bytes with an error of the family
        or a `ValueError`, which is raised when the store itself holds them.

        Raises as `read`, and a transient `StorageError` when each read gives other bytes.
        """

        def read(look: int) -> bytes:
            if look == 0:
                return self.read(key, start=start, length=length, if_match=if_match)
            return self.read_again(key, look, start=start, length=length, if_match=if_match)

        return second_look(read, verify, self.url_of(key))

    def read_into_verified(
        self,
        key: str,
        buffer: memoryview,
        verify: Callable[[memoryview], T],
        *,
        start: int = 0,
        if_match: str | None = None,
    ) -> T:
        """Fill the buffer with as many verified bytes as it takes, read as `read_verified` does;
        `verify` gets the part that was filled.
        """

        def read(look: int) -> memoryview:
            if look == 0:
                return buffer[: self.read_into(key, buffer, start=start, if_match=if_match)]

            def again(at: int, piece: memoryview) -> int:
                data = self.read_again(key, look, start=start + at, length=len(piece), if_match=if_match)
                piece[: len(data)] = data
                return len(data)

            return buffer[: filled_by_ranges(buffer, again)]

        return second_look(read, verify, self.url_of(key))

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """The object's facts; raises `ObjectNotFound`."""

    def find(self, key: str) -> ObjectInfo | None:
        """The object's facts; None where there is no such object."""
        try:
            return self.stat(key)
        except ObjectNotFound:
            return None

    @abstractmethod
    def write(self, key: str, data: bytes | Path | Buffers) -> ObjectInfo:
        """Store the bytes, or the file's content, in place of any existing object; readers see the
        old or the new object, never a part.
        """

    @abstractmethod
    def create(self, key: str, data: bytes | Path) -> ObjectInfo:
        """Store the bytes, or the file's content, unless the object exists; one of several writers
        at once wins.

        An object with the same bytes counts as success (an own attempt whose answer was lost); an
        object with other bytes raises `AlreadyExists`.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys start with `prefix`, sorted by key."""

    def list_again(self, prefix: str, look: int) -> Iterator[ObjectInfo]:
        """The objects as by `list`, by another way than look `look - 1` (0 is `list`)."""
        return self.list(prefix)

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object, if it exists."""

    @abstractmethod
    def clear_unfinished(self, prefix: str) -> None:
        """Delete temporary files below the folder `prefix/`. A write in progress there loses its
        file and fails.
        """

    def abort_uploads(self, prefix: str, doomed: Callable[[str], bool]) -> tuple[str, ...]:
        """Delete what uploads in parts that were never finished left below `prefix`, for the keys
        that `doomed` accepts; returns these. No store but a bucket has such uploads.
        """
        return ()

    @abstractmethod
    def now(self) -> float:
        """The time by the clock that dates this store's objects, in UTC epoch seconds, to a second.
        Machines that share a store agree on it, whatever their own clocks show.
        """

    def holds(self, key: str, data: bytes | Path) -> bool:
        """Whether the object has exactly these bytes, or the file's. If its size fits, the whole
        object is read. Raises `ObjectNotFound`, and as `read_verified`.
        """
        if self.stat(key).size != (data.stat().st_size if isinstance(data, Path) else len(data)):
            return False
        with open(data, "rb") if isinstance(data, Path) else io.BytesIO(data) as file:
            at = 0
            while piece := file.read(_COMPARED_BYTES):
                if not self._holds_at(key, at, piece):
                    return False
                at += len(piece)
        return True

    def _holds_at(self, key: str, start: int, piece: bytes) -> bool:
        def verify(data: bytes) -> None:
            if data != piece:
                raise _OtherBytes

        try:
            self.read_verified(key, verify, start=start, length=len(piece))
        except _OtherBytes:
            return False
        return True

    def url_of(self, key: str) -> str:
        return f"{self.url}/{checked_key(key)}"


class _OtherBytes(ValueError):
    pass


def filled_by_ranges(buffer: memoryview, fill: Callable[[int, memoryview], int]) -> int:
    """Let `fill` fill each range of the buffer, from the place that it gets, until one stays
    unfilled; returns how many bytes are filled.
    """
    at = 0
    while at < len(buffer):
        piece = buffer[at : at + RANGE_BYTES]
        filled = fill(at, piece)
        at += filled
        if filled < len(piece):  # the object ends there
            break
    return at


def checked_key(key: str) -> str:
    parts = key.split("/")
    if (
        "\\" in key
        or "\0" in key
        or any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts)
    ):
        raise WrongRequest(
            f"{key!r} cannot name an object; allowed are names joined by single slashes, without '.', '..' or"
            " backslashes."
        )
    return key


def without_secrets(url: str) -> str:
    """The URL without its user:password@."""
    return re.sub(r"//[^/@]*@", "//…@", url)
