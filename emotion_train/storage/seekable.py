"""What read-only files that are no files of the disk have in common."""

from __future__ import annotations

import io


class SeekableFile(io.RawIOBase):
    """A read-only file of `size` bytes; its kinds say in `readinto` what lies at `_at`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"byte {start + offset} lies before the file")
        self._at = start + offset
        return self._at
