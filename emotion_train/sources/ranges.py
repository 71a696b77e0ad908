"""Cuts a text file, in one pass over its bytes, into ranges of whole rows that can be read alone.

A range of a CSV file is read with the file's header in front, a range of JSON Lines with an object
that has the file's columns, so that each range is read as the whole file would be. Not cut are
packed files, files with cells that span lines, other encodings than UTF-8, and a TSV whose quotes
may be marks or letters. The pass costs about a second per million rows.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from emotion_train.sources.json_lines import columns_of_lines
from emotion_train.sources.posts import UTF8, Columns, PostFile
from emotion_train.sources.quotes import Doubts
from emotion_train.sources.table_layout import Layout, layout_of
from emotion_train.sources.unpacked import HEAD_BYTES, head_of, is_packed, newline_of

_MARK = b"\xef\xbb\xbf"


class Range(NamedTuple):
    """The bytes from `start` to `end`: `rows` lines, of which the first is row `first_row` of the
    file.
    """

    start: int
    end: int
    first_row: int
    rows: int
    sha256: str


class Ranges(NamedTuple):
    """Ranges of a file. A reader gets `before` in front of a range's bytes, and `quoting`; it then
    numbers the range's first row `row_after`.
    """

    before: bytes
    row_after: int
    quoting: str
    pieces: tuple[Range, ...]


class _Start(NamedTuple):
    """How a file begins: its first row is at byte `at`."""

    before: bytes
    row_after: int
    at: int
    first_row: int
    layout: Layout | None = None  # of a table


def ranges_of(
    file: PostFile, chunks: Iterator[bytes], columns: Columns, rows_of_a_range: int
) -> Ranges | None:
    """Ranges of at most `rows_of_a_range` rows; None where the file has to be read as a whole.
    `file` is a local file with at least the first `HEAD_BYTES`; `chunks` are all bytes.

    Raises `WrongRequest` for a file that cannot be read at all.
    """
    assert file.path is not None
    with file.path.open("rb") as opened:
        raw = opened.read(HEAD_BYTES)
    if is_packed(raw) or file.encoding != UTF8 or file.format not in ("csv", "tsv", "jsonl", "lines"):
        return None
    head = head_of(file)
    if newline_of(head) != "\n" or not head.strip():
        return None
    if file.format in ("csv", "tsv"):
        start = _start_of_table(file, raw, columns)
    elif file.format == "jsonl":
        start = _start_of_objects(file, raw, columns)
    else:
        start = _Start(b"\n", 2, len(_MARK) if raw.startswith(_MARK) else 0, 1)
    return None if start is None else _cut(file, start, chunks, rows_of_a_range)


def _start_of_table(file: PostFile, raw: bytes, columns: Columns) -> _Start | None:
    decided = replace(file, quoting="csv") if file.quoting == "auto" else file
    layout = layout_of(decided, columns)
    lines = raw.split(b"\n", layout.lines)
    if len(lines) <= layout.lines:
        return None  # a header longer than the bytes read here, or no row below it
    at = len(raw) - len(lines[-1])
    return _Start(raw[:at], layout.first_row, at, layout.first_row, layout)


def _start_of_objects(file: PostFile, raw: bytes, columns: Columns) -> _Start | None:
    own = columns_of_lines(file, columns)
    if own is None:
        return None  # a first line longer than the bytes read here, or no object among them
    before = json.dumps(dict.fromkeys(own.named, "")).encode() + b"\n"
    return _Start(before, 2, len(_MARK) if raw.startswith(_MARK) else 0, 1)


def _cut(file: PostFile, start: _Start, chunks: Iterator[bytes], rows_of_a_range: int) -> Ranges | None:
    look = None if start.layout is None else _Look(file, start.layout)
    pieces: list[Range] = []
    summed, rows, begin, at = hashlib.sha256(), 0, start.at, start.at
    for line in _lines(chunks, start.at):
        if look is not None and b'"' in line and not look.is_one_row(sum_rows(pieces) + rows, line):
            return None
        summed.update(line)
        rows, at = rows + 1, at + len(line)
        if rows == rows_of_a_range:
            first = start.first_row + sum_rows(pieces)
            pieces.append(Range(begin, at, first, rows, summed.hexdigest()))
            summed, rows, begin = hashlib.sha256(), 0, at
    if rows:
        first = start.first_row + sum_rows(pieces)
        pieces.append(Range(begin, at, first, rows, summed.hexdigest()))
    quoting = file.quoting if look is None else look.settled()
    return Ranges(start.before, start.row_after, quoting, tuple(pieces))


def sum_rows(pieces: list[Range]) -> int:
    """The number of rows of all pieces, which follow each other without gaps."""
    return pieces[-1].first_row + pieces[-1].rows - pieces[0].first_row if pieces else 0


class _Look:
    """Checks the quotes of a table, line by line. A line that is a row by itself ends outside of
    quotes, so the next line can be checked alone.
    """

    def __init__(self, file: PostFile, layout: Layout) -> None:
        self._file = file
        self._layout = layout
        position = {name: layout.header.index(name) for name in layout.columns.named}
        self._doubts = Doubts(file, layout, position)

    def is_one_row(self, rows_before: int, line: bytes) -> bool:
        """Whether the line is read alike alone and within the whole file."""
        if self._file.quoting == "none":
            return True
        if self._file.quoting == "auto" and self._layout.delimiter == "\t":
            return False
        text = line.decode("latin-1")
        try:
            cells = next(csv.reader([text], delimiter=self._layout.delimiter, strict=True))
        except csv.Error as error:
            # a broken row is one row, unless its quote takes in lines or backslashes escape quotes
            return not any(part in str(error) for part in ("end of data", "larger")) and '\\"' not in text
        if len(cells) == len(self._layout.header):
            self._doubts.look(self._layout.first_row + rows_before, text)
        return True

    def settled(self) -> str:
        """The quoting to read the ranges with; raises `WrongRequest` where it cannot be decided."""
        self._doubts.settle()
        if self._file.quoting != "auto":
            return self._file.quoting
        return "none" if self._layout.delimiter == "\t" else "csv"


def _lines(chunks: Iterator[bytes], skipped: int) -> Iterator[bytes]:
    """Lines with their ends, from the byte `skipped` on."""
    rest = b""
    for chunk in chunks:
        if skipped:
            chunk, skipped = chunk[skipped:], max(0, skipped - len(chunk))
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest
