"""An object of a store as a file that is read in ranges, for readers that want to seek.

Memory holds one piece of it. The object is read at one ETag, so that all bytes are of the same
object.
"""

from __future__ import annotations

from emotion_train.storage.seekable import SeekableFile
from emotion_train.storage.store import ObjectInfo, Store

PIECE_BYTES = 4 << 20


class RangedFile(SeekableFile):
    """The object of `info`, read-only. Raises as `Store.read`, `ObjectChanged` included."""

    def __init__(self, store: Store, info: ObjectInfo, piece_bytes: int = PIECE_BYTES) -> None:
        super().__init__(info.size)
        self._store = store
        self._info = info
        self._piece_bytes = piece_bytes
        self._piece_at, self._piece = 0, b""

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        wanted = max(0, min(len(view), self._size - self._at))
        filled = 0
        while filled < wanted:
            inside = self._at - self._piece_at
            if not 0 <= inside < len(self._piece):
                self._fetch(wanted - filled)
                inside = 0
            part = self._piece[inside : inside + wanted - filled]
            view[filled : filled + len(part)] = part
            filled += len(part)
            self._at += len(part)
        return filled

    def _fetch(self, least: int) -> None:
        length = min(max(least, self._piece_bytes), self._size - self._at)
        piece = self._store.read(self._info.key, start=self._at, length=length, if_match=self._info.etag)
        if len(piece) != length:
            raise EOFError(f"{self._store.url_of(self._info.key)} is shorter than it was")
        self._piece_at, self._piece = self._at, piece
