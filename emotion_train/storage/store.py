"""What a store promises: whole objects below one URL, read, written and listed in the same way in a
bucket and in a folder.

Only the room `storage` speaks to a store; `open.py` opens the one that a URL names.
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
from emotion_train.storage.second_look import second_look

TEMPORARY = ".writing-"
_COMPARED_BYTES = 16 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class ObjectInfo:
    """`etag` is without its quotes, and None on a folder. `modified` is when it was written, in UTC
    epoch seconds by the clock of `Store.now`; None where a store does not say.
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
        """`length` bytes from `start`, fewer where the object ends; all of the rest when `length`
        is None.

        Raises `ObjectNotFound`, and `ObjectChanged` when the object's ETag is not `if_match`, as
        always on a folder, which has none.
        """

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, if_match: str | None = None) -> int:
        """Fill the buffer with the object's bytes from `start`; returns how many there were. Raises
        as `read`.
        """
        data = self.read(key, start=start, length=len(buffer), if_match=if_match)
        buffer[: len(data)] = data
        return len(data)

    def read_again(
        self, key: str, look: int, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        """What `read` returns, by another way than look `look - 1` (0 is `read`): no cache, and in
        a bucket a new connection of the other client.
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
        """What `verify` returns for these bytes; it refuses wrong ones with an error of the family
        or a `ValueError`, which is raised when they are stored like that.

        Raises as `read`, and a transient `StorageError` when each read brings other bytes.
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
        """What `read_verified` does, of as many bytes as the buffer takes, which holds them then;
        `verify` gets the part that was filled.
        """

        def read(look: int) -> memoryview:
            if look == 0:
                return buffer[: self.read_into(key, buffer, start=start, if_match=if_match)]
            data = self.read_again(key, look, start=start, length=len(buffer), if_match=if_match)
            buffer[: len(data)] = data
            return buffer[: len(data)]

        return second_look(read, verify, self.url_of(key))

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Size and ETag; raises `ObjectNotFound`."""

    def find(self, key: str) -> ObjectInfo | None:
        """What `stat` returns; None where there is no such object."""
        try:
            return self.stat(key)
        except ObjectNotFound:
            return None

    @abstractmethod
    def write(self, key: str, data: bytes | Path) -> ObjectInfo:
        """Put the bytes, or the file's content, in place of whatever is there; readers see the old
        or the new object, never a part.
        """

    @abstractmethod
    def create(self, key: str, data: bytes | Path) -> ObjectInfo:
        """Put the bytes, or the file's content, where nothing stands; of several writers at once
        one wins.

        The same bytes already there count as success (an own attempt whose answer was lost); raises
        `AlreadyExists` for others.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys start with `prefix`, sorted by key."""

    def list_again(self, prefix: str, look: int) -> Iterator[ObjectInfo]:
        """What `list` returns, by another way than look `look - 1` (0 is `list`)."""
        return self.list(prefix)

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; a missing one is fine."""

    @abstractmethod
    def clear_unfinished(self, prefix: str) -> None:
        """Remove what killed writes left below the folder `prefix/`, and what writes at work there
        have so far: these then fail.
        """

    @abstractmethod
    def now(self) -> float:
        """The time by the clock that dates this store's objects, in UTC epoch seconds, to a second:
        machines that share a store agree on it, whatever their own clocks say.
        """

    def holds(self, key: str, data: bytes | Path) -> bool:
        """Whether the object has exactly these bytes, or the file's; one of that size is read from
        beginning to end. Raises `ObjectNotFound`, and as `read_verified`.
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


def checked_key(key: str) -> str:
    parts = key.split("/")
    if (
        "\\" in key
        or "\0" in key
        or any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts)
    ):
        raise WrongRequest(
            f"{key!r} cannot name an object; allowed are names joined by single slashes, without '.', '..'"
            " and backslashes."
        )
    return key


def without_secrets(url: str) -> str:
    """The URL with user:password@ cut out."""
    return re.sub(r"//[^/@]*@", "//…@", url)
