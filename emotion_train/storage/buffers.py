"""The bytes of several buffers as the content of one object, which a store writes without joining
them.

A checkpoint's part is a header and thousands of tensors, gigabytes together. Joined, they would
take their memory once more for as long as an upload takes.
"""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate

from emotion_train.storage.seekable import SeekableFile


class Buffers:
    """Buffers that stay as they are for as long as this object is used; `len` is their bytes."""

    def __init__(self, buffers: Iterable[bytes | memoryview]) -> None:
        self._buffers = [memoryview(one).cast("B") for one in buffers if len(one)]

    def __len__(self) -> int:
        return sum(len(one) for one in self._buffers)

    def __bytes__(self) -> bytes:
        return b"".join(self._buffers)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for one in self._buffers:
            digest.update(one)
        return digest.hexdigest()

    def open(self) -> io.RawIOBase:
        """A file of these bytes, to read and to seek in."""
        return _File(self._buffers)


class _File(SeekableFile):
    def __init__(self, buffers: list[memoryview]) -> None:
        self._buffers = buffers
        self._starts = [0, *accumulate(map(len, buffers))]
        super().__init__(self._starts[-1])

    def readinto(self, into: object) -> int:
        space = memoryview(into).cast("B")  # type: ignore[arg-type]
        filled = 0
        while filled < len(space) and self._at < self._size:
            number = bisect_right(self._starts, self._at) - 1
            inside = self._at - self._starts[number]
            piece = self._buffers[number][inside : inside + len(space) - filled]
            space[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._at += len(piece)
        return filled
