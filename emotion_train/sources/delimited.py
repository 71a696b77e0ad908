"""Reads posts from CSV and TSV, and believes a quote only where that loses no row.

Python's `csv` module parses, in its strict mode: about a microsecond a row. A cell in quotes may
span lines as long as those are no rows by themselves; which they are is decided by the other
columns, whose values are learnt on the way. A TSV whose lines all have the header's tabs is read
without quoting, unless its quotes are those of a CSV writer. What cannot be parsed to the end of
the file is no bad row but an unreadable file.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from emotion_train.errors import WrongRequest
from emotion_train.sources.posts import Batch, Columns, PostFile, by_bytes
from emotion_train.sources.unpacked import as_seen, bytes_of, head_of, lines_of, newline_of

_DELIMITERS = {"tsv": ("\t", ","), "csv": (",", ";", "\t", "|")}
_LONGEST_CELL = 64 << 20  # characters; an open quote takes in no more of a large file
_MOST_DOUBTS = 10_000
_LEARNT_COLUMNS = 16
_MOST_VALUES = 1_000  # different values up to which a column is learnt value by value
_SHOWN = 3
_NO_QUOTES = "type --quoting none if quotes are letters in this file"


class _Layout(NamedTuple):
    """How a file is to be cut into cells."""

    header: list[str]
    columns: Columns
    delimiter: str
    newline: str
    lines: int  # that come before the first post
    first_row: int
    remarks: tuple[str, ...]
    quoted: bool


class _Row(NamedTuple):
    """One record; `cells` are to be used where it has no `trouble`."""

    number: int
    cells: Sequence[str]
    trouble: str | None = None


def read_delimited(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    """All rows of a CSV or TSV file.

    Raises `WrongRequest` when it has no header with these columns, when a quote swallows rows or
    the rest of the file, and when quotes are escaped by backslashes.
    """
    layout = _layout(file, columns)
    found, remarks = layout.columns, layout.remarks
    position = {name: layout.header.index(name) for name in found.named}
    spelled = layout.header if found.label is None else [found.text, found.label]
    header_again = {layout.header.index(name): _as_header(name, file) for name in spelled}
    doubts = _Doubts(file, layout, position)
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
        yield Batch.of(number, [row.number for row in good], found, values, **rest)
        remarks = ()
    doubts.settle()


# Rows


def _plain_rows(file: PostFile, layout: _Layout, doubts: _Doubts) -> Iterator[tuple[_Row, int]]:
    """Where quotes are letters a line is a row."""
    width = len(layout.header)
    with lines_of(file, layout.newline) as lines:
        for number, line in enumerate(_after(lines, layout.lines), layout.first_row):
            cells = _without_end(line).split(layout.delimiter)
            yield _judged(number, cells, width), len(line)


def _quoted_rows(file: PostFile, layout: _Layout, doubts: _Doubts) -> Iterator[tuple[_Row, int]]:
    width = len(layout.header)
    with lines_of(file, layout.newline) as every_line:
        taken: list[str] = []
        line_number = layout.lines

        def lines() -> Iterator[str]:
            for line in _after(every_line, layout.lines):
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
    """What to say of a quote that takes in lines and makes no row of them."""
    if any('\\"' in line for line in taken):
        return _backslashes(file, row)
    last = first + len(taken) - 1
    if "end of data" in error or "field larger" in error:
        more = sum(1 for _ in rest)
        lines = len(taken) + more
        what = f"is never closed: it takes in {_lines(lines)}, to the end of the file"
    elif error:
        what = f"meets another one in line {last} with letters behind it: it takes in {_lines(len(taken))}"
    else:
        what = (
            f"closes in line {last}, and what it takes in makes no row: more or fewer cells than the header"
        )
    return WrongRequest(
        f"{file.path}: the quote that opens in row {row} (line {first}) {what}. No row is left out for that;"
        f" mend the quotes, or {_NO_QUOTES}."
    )


def _backslashes(file: PostFile, row: int) -> WrongRequest:
    return WrongRequest(
        f'{file.path}: row {row} escapes quotes by backslashes (\\"), as Spark and MySQL write them and CSV'
        " does not; write the file again with doubled quotes (Spark: option('escape', '\"')), or read it"
        " with pandas.read_csv(…, escapechar='\\\\', doublequote=False) and save it as Parquet."
    )


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count:,} lines"


def _after(lines: Iterator[str], skipped: int) -> Iterator[str]:
    for _ in range(skipped):
        next(lines, None)
    return lines


def _without_end(line: str) -> str:
    return line.rstrip("\n").rstrip("\r") if line.endswith("\n") else line.rstrip("\r")


# Rows that a quote may have swallowed


class _Doubts:
    """Cells that span lines, and whether these are rows by themselves.

    A line that a quote takes in is a row when it has the header's number of cells and its other
    cells are what those columns hold elsewhere in the file: one of their values where these recur,
    else a value of the same make (digits, letters, marks). The label decides alone where a line
    has one. The first line is judged by what follows the quote, the last by what precedes it.
    """

    def __init__(self, file: PostFile, layout: _Layout, position: dict[str, int]) -> None:
        self._file = file
        self._layout = layout
        self._width = len(layout.header)
        text, label = layout.columns.text, layout.columns.label
        self._text = position[text]
        self._label = None if label is None else position[label]
        others = [place for place in range(self._width) if place not in (self._text, self._label)]
        self._places = ([] if self._label is None else [self._label]) + others[:_LEARNT_COLUMNS]
        self._seen: dict[int, set[str]] = {place: set() for place in self._places}
        self._makes: dict[int, set[str]] = {place: set() for place in self._places}
        self._learnt = 0
        self._asked: dict[tuple[tuple[int, str], ...], tuple[int, int, int]] = {}
        self._seen_as: dict[str, int] = {}  # how quotes are used, and the first row that does so

    def learn(self, cells: Sequence[Sequence[str]]) -> None:
        """Take in the rows that were read, by column."""
        self._learnt += len(cells[0]) if cells else 0
        for place in self._places:
            seen = self._seen[place]
            if len(seen) <= _MOST_VALUES and cells[place]:
                new = {value.strip().casefold() for value in cells[place]} - seen
                seen |= new
                self._makes[place] |= {_make(value) for value in new}

    def question(self, row: int, first: int, cells: Sequence[str], lines: Sequence[str]) -> None:
        """Keep what must not be a row of its own, until all rows were seen."""
        spanning = [place for place, cell in enumerate(cells) if "\n" in cell or "\r" in cell]
        if not spanning:
            return
        last_line = first + len(lines) - 1
        for line, words in enumerate(lines):
            allowed = [
                place
                for place in self._places
                if place not in spanning
                and (line > 0 or place > spanning[0])
                and (line < len(lines) - 1 or place < spanning[-1])
            ]
            for split in self._splits(words):
                if allowed and len(split) == self._width:
                    decisive = [self._label] if self._label in allowed else allowed
                    claim = tuple((place, split[place].strip().casefold()) for place in decisive)
                    self._asked.setdefault(claim, (row, first, last_line))
        if len(self._asked) > _MOST_DOUBTS:
            self._refuse()
            self._asked.clear()

    def look(self, row: int, line: str) -> None:
        """Keep how a line of its own uses quotes: around a delimiter or doubled, which only marks
        can be; around a whole cell; or inside of one.
        """
        cells = _without_end(line).split(self._layout.delimiter)
        if len(cells) != self._width:
            self._seen_as.setdefault("marks", row)
            return
        for cell in cells:
            if '"' in cell:
                self._seen_as.setdefault(_use_of_quotes(cell), row)

    def settle(self) -> None:
        """Raises `WrongRequest` when a quoted cell took in lines that are rows by themselves, or
        when quotes may be marks or letters and nothing tells which.
        """
        self._refuse()
        if self._file.quoting == "auto" and {"letters", "around"} == self._seen_as.keys():
            raise WrongRequest(
                f"{self._file.path}: quotes stand inside of a cell in row {self._seen_as['letters']} and"
                f" around a whole cell in row {self._seen_as['around']}; type --quoting csv if the latter are"
                " no part of the text, or --quoting none if they are."
            )

    def _refuse(self) -> None:
        swallowing = sorted({where for claim, where in self._asked.items() if self._is_row(claim)})
        if not swallowing:
            return
        shown = ", ".join(f"row {row} (lines {first} to {last})" for row, first, last in swallowing[:_SHOWN])
        more = f" and {len(swallowing) - _SHOWN} more" if len(swallowing) > _SHOWN else ""
        raise WrongRequest(
            f"{self._file.path}: a quote that opens a cell takes in lines that are rows by themselves:"
            f" {shown}{more}. Double the quotes inside of texts and put the text in quotes, take the stray"
            f" quote away, or {_NO_QUOTES}."
        )

    def _is_row(self, claim: tuple[tuple[int, str], ...]) -> bool:
        return all(self._is_of(place, value) for place, value in claim)

    def _is_of(self, place: int, value: str) -> bool:
        seen = self._seen[place]
        if len(seen) <= _MOST_VALUES and self._learnt >= 2 * len(seen):
            return value in seen
        return _make(value) in self._makes[place]

    def _splits(self, line: str) -> list[list[str]]:
        """The line's cells when quotes are letters, and when it is CSV by itself."""
        words = _without_end(line)
        splits = [words.split(self._layout.delimiter)]
        if '"' in words and words.count('"') % 2 == 0:
            splits.append(next(csv.reader([words], delimiter=self._layout.delimiter)))
        return splits


def _use_of_quotes(cell: str) -> str:
    """letters in a cell that no CSV writer would have written, marks where one had to, else
    around.
    """
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner.replace('""', ""):
        return "letters"
    return "marks" if '"' in inner or "\r" in inner else "around"


def _make(value: str) -> str:
    """What a value is made of: "user-17" and "team-3" are alike, "I came" and "joy" are not."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"[0-9]+", "9", value))


# Header and quoting


def _layout(file: PostFile, columns: Columns) -> _Layout:
    head = head_of(file)
    if not head.strip():
        raise WrongRequest(f"{file.path} is empty; give a file with a header row and posts.")
    newline = newline_of(head)
    lines = head.split(newline)
    skipped, delimiter, remarks = _before_the_header(file, lines, columns)
    text = newline.join(lines[skipped:])
    if delimiter is None:
        delimiter = _best_delimiter(file, text, columns)
    header, header_lines = _header(file, text, delimiter)
    try:
        found = columns.among(header, str(file.path))
    except WrongRequest as error:
        if file.path is not None and file.path.suffix.lower() == ".txt":
            raise _no_table(file) from error
        raise
    layout = _Layout(
        header,
        found,
        delimiter,
        newline,
        skipped + header_lines,
        skipped + 2,
        remarks,
        file.quoting != "none",
    )
    if file.quoting == "auto" and delimiter == "\t":
        return layout._replace(quoted=not _quotes_are_letters(file, layout))
    return layout


def _before_the_header(
    file: PostFile, lines: list[str], columns: Columns
) -> tuple[int, str | None, tuple[str, ...]]:
    """How many lines come before the header, the delimiter that Excel's `sep=` names, and what to
    say of them.
    """
    skipped: list[str] = []
    delimiter = None
    for line in lines:
        words = line.strip()
        named = re.fullmatch(r"(?i)\"?sep=(.)\"?", line.rstrip("\r"))
        if named:
            delimiter = named[1]
        elif words and not (words.startswith("#") and not _names_columns(words, columns)):
            break
        skipped.append(line)
    if not skipped or len(skipped) == len(lines):
        return 0, None, ()
    what = "an empty line" if not "".join(skipped).strip() else repr(next(filter(str.strip, skipped))[:40])
    count = (
        f"1 line above the header of {file.name}"
        if len(skipped) == 1
        else (f"{len(skipped)} lines above the header of {file.name}")
    )
    return len(skipped), delimiter, (f"{count}: {what}",)


def _names_columns(line: str, columns: Columns) -> bool:
    cells = {cell.strip(" \"'").casefold() for cell in re.split(r"[,;\t|]", line)}
    return columns.text.strip().casefold() in cells


def _best_delimiter(file: PostFile, text: str, columns: Columns) -> str:
    """The one that gives the wanted names, else the one that gives the most."""
    headers = {mark: _header(file, text, mark)[0] for mark in _DELIMITERS[file.format]}
    wanted = {name.strip().casefold() for name in (columns.text, columns.label) if name is not None}
    fitting = [
        mark for mark, names in headers.items() if wanted <= {name.strip().casefold() for name in names}
    ]
    return fitting[0] if fitting else max(headers, key=lambda mark: len(headers[mark]))


def _header(file: PostFile, text: str, delimiter: str) -> tuple[list[str], int]:
    """Column names, and how many lines they take."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return next(reader), reader.line_num
    except (csv.Error, StopIteration) as error:
        raise WrongRequest(
            f"{file.path} has no readable header row ({error}); save it as CSV with UTF-8 text again."
        ) from None


def _no_table(file: PostFile) -> WrongRequest:
    return WrongRequest(
        f"{file.path} is plain text without a header row that names the columns. Put one above it (text and"
        " label with a tab between them); or, where one file holds the texts and another the labels, type"
        " --text-file and --label-file."
    )


def _quotes_are_letters(file: PostFile, layout: _Layout) -> bool:
    """Whether a TSV is not quoted: all its lines have the header's tabs, and its quotes are not
    those that a CSV writer puts.

    Such a writer quotes each cell with a quote in it and doubles that; it quotes others only when
    it quotes the whole column.
    """
    width = len(layout.header)
    quoted_C, doubled_C, cells_C = [0] * width, [0] * width, [0] * width
    with lines_of(file, layout.newline) as lines:
        for line in _after(lines, layout.lines):
            words = _without_end(line)
            if not words.strip():
                continue
            cells = words.split(layout.delimiter)
            if len(cells) != width:
                return False
            for place, cell in enumerate(cells):
                cells_C[place] += cell != ""
                if '"' in cell:
                    use = _use_of_quotes(cell)
                    if use == "letters":
                        return True
                    quoted_C[place] += 1
                    doubled_C[place] += use == "marks"
    return any(
        quoted and quoted != cells and quoted != doubled
        for quoted, doubled, cells in zip(quoted_C, doubled_C, cells_C, strict=True)
    ) or not any(quoted_C)
