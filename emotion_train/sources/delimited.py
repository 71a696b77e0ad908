"""Reads posts from CSV and TSV, and takes a quote for a mark only where that loses no row.

Python's `csv` module parses, in its strict mode: about a microsecond a row. A quoted cell may span
lines unless these are rows by themselves; the values of the other columns, learnt on the way,
decide that. A TSV with the header's number of tabs in each line is read without quoting, unless its
quotes are as a CSV writer sets them. A file that cannot be parsed to its end is unreadable as a
whole.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from emotion_train.console import counted
from emotion_train.errors import WrongRequest
from emotion_train.sources.posts import Batch, Columns, PostFile, by_bytes
from emotion_train.sources.quotes import NO_QUOTES, Doubts
from emotion_train.sources.table_layout import Layout, after, layout_of, without_end
from emotion_train.sources.unpacked import as_seen, bytes_of, lines_of

_LONGEST_CELL = 64 << 20  # characters; an open quote takes in no more of a large file


class _Row(NamedTuple):
    """One record; its `cells` are valid only without `trouble`."""

    number: int
    cells: Sequence[str]
    trouble: str | None = None


def read_delimited(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    """All rows of a CSV or TSV file.

    Raises `WrongRequest` when it has no header with these columns, when a quote swallows rows or
    the rest of the file, and when quotes are escaped by backslashes.
    """
    layout = layout_of(file, columns)
    own, remarks = layout.columns, layout.remarks
    position = {name: layout.header.index(name) for name in own.named}
    spelled = layout.header if own.label is None else [own.text, own.label]
    header_again = {layout.header.index(name): _as_header(name, file) for name in spelled}
    doubts = Doubts(file, layout, position)
    rows = (_quoted_rows if layout.quoted else _plain_rows)(file, layout, doubts)
    for piece in by_bytes(rows):
        good: list[_Row] = []
        broken: list[tuple[str, int]] = []
        blank: list[int] = []
        for row in piece:
            if row.trouble == "blank":
                blank.append(row.number)
            elif row.trouble is not None:
                broken.append((row.trouble, row.number))
            elif all(row.cells[p].strip().casefold() == name for p, name in header_again.items()):
                broken.append(("header_again", row.number))
            else:
                good.append(row)
        cells = list(zip(*(row.cells for row in good), strict=True)) if good else [()] * len(layout.header)
        doubts.learn(cells)
        values = {name: bytes_of(list(cells[p]), file.encoding) for name, p in position.items()}
        rest = {"broken": tuple(broken), "blank": tuple(blank), "remarks": remarks}
        yield Batch.of(number, [row.number for row in good], own, values, **rest)
        remarks = ()
    doubts.settle()


# Rows


def _plain_rows(file: PostFile, layout: Layout, doubts: Doubts) -> Iterator[tuple[_Row, int]]:
    """Each line as a row, for a file whose quotes are letters."""
    width = len(layout.header)
    with lines_of(file, layout.newline) as lines:
        for number, line in enumerate(after(lines, layout.lines), layout.first_row):
            cells = without_end(line).split(layout.delimiter)
            yield _judged(number, cells, width), len(line)


def _quoted_rows(file: PostFile, layout: Layout, doubts: Doubts) -> Iterator[tuple[_Row, int]]:
    width = len(layout.header)
    with lines_of(file, layout.newline) as every_line:
        taken: list[str] = []
        line_number = layout.lines

        def lines() -> Iterator[str]:
            for line in after(every_line, layout.lines):
                taken.append(line)
                yield line

        before = csv.field_size_limit(_LONGEST_CELL)
        try:
            reader = csv.reader(lines(), delimiter=layout.delimiter, strict=True)
            number = layout.first_row - 1
            while True:
                number += 1
                error = ""
                cells: list[str] = []
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as caught:
                    error = str(caught)
                row = _Row(number, (), _trouble(error)) if error else _judged(number, cells, width)
                if error:  # the line is a row if its quotes are letters, so learn its other columns
                    doubts.learn_line(taken[-1])
                if len(taken) > 1 or "end of data" in error:
                    if row.trouble not in (None, "blank"):
                        raise _unreadable(file, number, line_number + 1, taken, every_line, error)
                    doubts.question(number, line_number + 1, cells, taken)
                elif '"' in taken[0] and row.trouble is None:
                    doubts.look(number, taken[0])
                elif row.trouble not in (None, "blank") and '\\"' in taken[0]:
                    raise _backslashes(file, number)
                line_number += len(taken)
                yield row, sum(map(len, taken))
                taken.clear()
        finally:
            csv.field_size_limit(before)


def _judged(number: int, cells: list[str], width: int) -> _Row:
    if not any(cells) or not "".join(cells).strip():
        return _Row(number, cells, "blank")
    return _Row(number, cells, None if len(cells) == width else "ragged_line")


def _trouble(error: str) -> str:
    return "stray_return" if "new-line character" in error else "broken_quoting"


def _as_header(name: str, file: PostFile) -> str:
    return as_seen(name, file.encoding).strip().casefold()


def _unreadable(
    file: PostFile, row: int, first: int, taken: list[str], rest: Iterator[str], error: str
) -> WrongRequest:
    """The error for a quote that takes in lines without making a row of them."""
    if any('\\"' in line for line in taken):
        return _backslashes(file, row)
    last = first + len(taken) - 1
    if "end of data" in error or "field larger" in error:
        more = sum(1 for _ in rest)
        lines = len(taken) + more
        what = f"is never closed: it takes in {_lines(lines)}, to the end of the file"
    elif error:
        what = f"meets another quote in line {last} with letters after it: it takes in {_lines(len(taken))}"
    else:
        what = f"closes in line {last} and makes a row with more or fewer cells than the header"
    return WrongRequest(
        f"{file.path}: the quote that opens in row {row} (line {first}) {what}. Leaving rows out is no"
        f" remedy; mend the quotes, or {NO_QUOTES}."
    )


def _backslashes(file: PostFile, row: int) -> WrongRequest:
    return WrongRequest(
        f'{file.path}: row {row} escapes quotes by backslashes (\\"), as Spark and MySQL write them and CSV'
        " does not; write the file again with doubled quotes (Spark: option('escape', '\"')), or read it"
        " with pandas.read_csv(…, escapechar='\\\\', doublequote=False) and save it as Parquet."
    )


def _lines(count: int) -> str:
    return counted(count, "line")
