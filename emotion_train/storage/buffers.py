"""The bytes of several buffers as the content of one object, which a store writes without joining
them.

A checkpoint's part is a header and thousands of tensors, gigabytes together. Joined, they would
take their memory once more for as long as an upload takes.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable


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


class _File(io.RawIOBase):
    def __init__(self, buffers: list[memoryview]) -> None:
        self._buffers = buffers
        self._starts = [0]
        for one in buffers:
            self._starts.append(self._starts[-1] + len(one))
        self._at = 0
        self._number = 0  # of the buffer that was read last

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._starts[-1]}[whence]
        self._at, self._number = max(0, start + offset), 0
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """As many bytes as are asked for, fewer only at the end."""
        left = max(0, self._starts[-1] - self._at)
        into = bytearray(left if size is None or size < 0 else min(size, left))
        self.readinto(into)
        return bytes(into)

    def readinto(self, into: bytearray | memoryview) -> int:  # type: ignore[override]
        space = memoryview(into).cast("B")
        filled = 0
        while filled < len(space) and self._at < self._starts[-1]:
            while self._starts[self._number + 1] <= self._at:
                self._number += 1
            inside = self._at - self._starts[self._number]
            piece = self._buffers[self._number][inside : inside + len(space) - filled]
            space[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._at += len(piece)
        return filled
