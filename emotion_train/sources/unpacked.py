"""The bytes and lines of a file of posts. Its first bytes decide how it is unpacked, whatever its
name; a file that is no text is refused with the name of its kind.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from emotion_train.errors import WrongRequest
from emotion_train.sources.posts import UTF8, PostFile

HEAD_BYTES = 1 << 20
_PACKED_BYTES = 1 << 17
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)
_BYTE_VIEW = "latin-1"  # one character per byte, so that the cleaner sees even bytes that are no text
# Foreign files by their first bytes, and what to type
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save the sheet as CSV (UTF-8)",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"PAR1": "Parquet; type --format parquet, or call it .parquet",
    b"ARROW1": "an Arrow file; type --format arrow, or call it .arrow",
    b"\x80\x04": "a pickle, which is never opened here; save it as Parquet",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"%PDF": "a PDF; save its table as CSV",
    b"\x89HDF": "HDF5; save it as Parquet",
}


_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")


def is_packed(start: bytes) -> bool:
    """Whether `unpacked` unpacks a file that begins so."""
    return start.startswith(_PACKED)


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked when they begin as gzip, bzip2, xz or Zstandard data."""
    with path.open("rb") as raw:
        magic = raw.peek(6)[:6]
        if magic.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=raw) as of_gzip:
                yield cast(BinaryIO, of_gzip)
        elif magic.startswith(b"BZh"):
            yield cast(BinaryIO, io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor)))
        elif magic.startswith(b"\xfd7zXZ\x00"):
            yield cast(BinaryIO, io.BufferedReader(_Streams(raw, lzma.LZMADecompressor)))
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            with pa.CompressedInputStream(pa.PythonFile(raw), "zstd") as of_zstd:
                yield cast(BinaryIO, of_zstd)
        else:
            yield raw


class _Streams(io.RawIOBase):
    """The bytes of packed streams that follow each other, with zeros between them at most.

    Raises `OSError` or `EOFError` for anything else behind a stream. Python's own readers of bzip2
    and xz end there without a word, and so lose all posts behind a damaged stream.
    """

    def __init__(self, raw: BinaryIO, make: Callable[[], Any]) -> None:
        self._raw = raw
        self._make = make
        self._stream = make()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._stream.eof:
                if not self._next_stream():
                    return 0
                continue
            packed = b""
            if self._stream.needs_input and not (packed := self._raw.read(_PACKED_BYTES)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            self._ready = self._stream.decompress(packed, len(buffer))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _next_stream(self) -> bool:
        """Begin the stream behind this one; returns False at the end of the file."""
        rest = self._stream.unused_data.lstrip(b"\0")
        while not rest:
            if not (packed := self._raw.read(_PACKED_BYTES)):
                return False
            rest = packed.lstrip(b"\0")
        self._stream = self._make()
        self._ready = self._stream.decompress(rest, io.DEFAULT_BUFFER_SIZE)
        return True


def head_of(file: PostFile) -> str:
    """The beginning of a text file, decoded, without a byte order mark.

    Raises `WrongRequest` for a file of another kind or in another encoding.
    """
    assert file.path is not None
    with unpacked(file.path) as stream:
        head = stream.read(HEAD_BYTES)
    for magic, remedy in _FOREIGN.items():
        if head.startswith(magic):
            raise WrongRequest(f"{file.path} is {remedy}.")
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if file.encoding == UTF8 and (utf16 or head[:64].count(b"\0") > len(head[:64]) // 3):
        raise WrongRequest(
            f"{file.path} is UTF-16; type --encoding utf-16, or save it as UTF-8, for example with"
            f" `iconv -f UTF-16 -t UTF-8 {file.path}`."
        )
    text = codecs.getincrementaldecoder(file.encoding)("replace").decode(head)
    return text.removeprefix("\ufeff")


@contextmanager
def lines_of(file: PostFile, newline: str) -> Iterator[Iterator[str]]:
    """The lines with their ends, split only at `newline` (\\n or \\r), as `bytes_of` takes them.

    Raises `WrongRequest` where they are not in the given encoding.
    """
    assert file.path is not None
    with unpacked(file.path) as stream:
        buffered = io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20)
        try:
            if file.encoding == UTF8 and buffered.peek(3)[:3] == codecs.BOM_UTF8:
                buffered.read(3)
            lines = io.TextIOWrapper(buffered, encoding=_seen_as(file.encoding), newline=newline)
            try:
                yield _without_mark(lines) if file.encoding != UTF8 else lines
            except UnicodeDecodeError as error:
                raise WrongRequest(
                    f"{file.path} is not {file.encoding} ({error.reason} at byte {error.start}); type"
                    " --encoding with another, such as latin-1, cp1252 or utf-16."
                ) from None
            finally:
                lines.detach()
        finally:
            buffered.detach()


def bytes_of(cells: list[str], encoding: str) -> pa.Array:
    """The UTF-8 of cells of `lines_of`; for a UTF-8 file, the file's own bytes."""
    into = _BYTE_VIEW if encoding == UTF8 else UTF8
    return pa.array([cell.encode(into) for cell in cells], pa.binary())


def as_seen(text: str, encoding: str) -> str:
    """The text as the lines of `lines_of` spell it."""
    return text.encode().decode(_BYTE_VIEW) if encoding == UTF8 else text


def newline_of(head: str) -> str:
    """The end of line of a text that begins so. A carriage return among lines that end in \\n is an
    ordinary character.
    """
    return "\r" if "\r" in head and "\n" not in head else "\n"


def checked_encoding(name: str) -> str:
    """The name as Python's codecs spell it; raises `WrongRequest` for an unknown name."""
    try:
        codec = codecs.lookup(name)
        "a".encode(name)
    except (LookupError, UnicodeError, ValueError):
        raise WrongRequest(
            f"--encoding is {name!r}; type one that Python knows, such as utf-8, latin-1, cp1252 or utf-16."
        ) from None
    return UTF8 if codec.name in ("utf-8", "utf-8-sig") else codec.name


def _seen_as(encoding: str) -> str:
    return _BYTE_VIEW if encoding == UTF8 else encoding


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield line.removeprefix("\ufeff") if number == 0 else line
