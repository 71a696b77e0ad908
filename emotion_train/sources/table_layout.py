"""The layout of a CSV or TSV file: its header and the lines above it, its delimiter, and whether
its quotes are marks around cells or letters.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from emotion_train.console import counted
from emotion_train.errors import WrongRequest
from emotion_train.sources.posts import Columns, PostFile
from emotion_train.sources.unpacked import head_of, lines_of, newline_of

_DELIMITERS = {"tsv": ("\t", ","), "csv": (",", ";", "\t", "|")}


class Layout(NamedTuple):
    """The settings that cut a file into cells."""

    header: list[str]
    columns: Columns
    delimiter: str
    newline: str
    lines: int  # lines before the first post
    first_row: int
    remarks: tuple[str, ...]
    quoted: bool


def layout_of(file: PostFile, columns: Columns) -> Layout:
    head = head_of(file)
    if not head.strip():
        raise WrongRequest(f"{file.path} is empty; give a file with a header row and posts.")
    newline = newline_of(head)
    lines = head.split(newline)
    skipped, delimiter, remarks = (0, None, ()) if file.header else _before_the_header(file, lines, columns)
    text = newline.join(lines[skipped:])
    if delimiter is None:
        delimiter = _best_delimiter(file, text, columns)
    header, header_lines = _header(file, text, delimiter)
    try:
        own = columns.among(header, str(file.path))
    except WrongRequest as error:
        if file.path is not None and file.path.suffix.lower() == ".txt":
            raise _no_table(file) from error
        raise
    layout = Layout(
        header,
        own,
        delimiter,
        newline,
        skipped + header_lines,
        skipped + (1 if file.header else 2),
        remarks,
        file.quoting != "none",
    )
    if file.quoting == "auto" and delimiter == "\t":
        return layout._replace(quoted=not _quotes_are_letters(file, layout))
    return layout


def _before_the_header(
    file: PostFile, lines: list[str], columns: Columns
) -> tuple[int, str | None, tuple[str, ...]]:
    """The number of lines above the header, the delimiter that Excel's `sep=` names, and remarks on
    these lines.
    """
    skipped: list[str] = []
    delimiter = None
    for line in lines:
        text = line.strip()
        named = re.fullmatch(r"(?i)\"?sep=(.)\"?", line.rstrip("\r"))
        if named:
            delimiter = named[1]
        elif text and not (text.startswith("#") and not _names_columns(text, columns)):
            break
        skipped.append(line)
    if not skipped or len(skipped) == len(lines):
        return 0, None, ()
    what = "an empty line" if not "".join(skipped).strip() else repr(next(filter(str.strip, skipped))[:40])
    count = f"{counted(len(skipped), 'line')} above the header of {file.name}"
    return len(skipped), delimiter, (f"{count}: {what}",)


def _names_columns(line: str, columns: Columns) -> bool:
    cells = {cell.strip(" \"'").casefold() for cell in re.split(r"[,;\t|]", line)}
    return columns.text.strip().casefold() in cells


def _best_delimiter(file: PostFile, text: str, columns: Columns) -> str:
    """The delimiter that gives the wanted column names, else the one that gives the most names."""
    if file.header:
        return _delimiter_of(file, text, file.header)
    headers = {mark: _header(file, text, mark)[0] for mark in _DELIMITERS[file.format]}
    wanted = {name.strip().casefold() for name in (columns.text, columns.label) if name is not None}
    fitting = [
        mark for mark, names in headers.items() if wanted <= {name.strip().casefold() for name in names}
    ]
    return fitting[0] if fitting else max(headers, key=lambda mark: len(headers[mark]))


def _header(file: PostFile, text: str, delimiter: str) -> tuple[list[str], int]:
    """The column names, and the number of lines that they take."""
    if file.header:
        return list(file.header), 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return next(reader), reader.line_num
    except (csv.Error, StopIteration) as error:
        raise WrongRequest(
            f"{file.path} has no readable header row ({error}); save it as CSV with UTF-8 text again."
        ) from None


def _delimiter_of(file: PostFile, text: str, header: tuple[str, ...]) -> str:
    """The delimiter that gives the first line as many cells as `header` has names."""
    first = text.partition("\n")[0].rstrip("\r")
    cells = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in _DELIMITERS[file.format]}
    fitting = [mark for mark, count in cells.items() if count == len(header)]
    if not fitting:
        raise WrongRequest(
            f"--header names {counted(len(header), 'column')}, and the first line of {file.path} has"
            f" {max(cells.values())}; name each column once, such as text,label,rater."
        )
    return fitting[0]


def _no_table(file: PostFile) -> WrongRequest:
    return WrongRequest(
        f"{file.path} is plain text without a header row that names the columns. Put a header row above it"
        " (text and label with a tab between them); or, where one file holds the texts and another the"
        " labels, type --text-file and --label-file."
    )


def _quotes_are_letters(file: PostFile, layout: Layout) -> bool:
    """Whether a TSV is not quoted: all its lines have the header's number of tabs, and its quotes
    are not as a CSV writer sets them.

    A CSV writer quotes each cell that has a quote in it, and doubles that quote; it quotes other
    cells only by whole columns. An open quote may be closed in a later line, so a file with quotes
    inside cells is also parsed as CSV: its quotes are letters only where that fails.
    """
    width = len(layout.header)
    quoted_C, doubled_C, cells_C = [0] * width, [0] * width, [0] * width
    letters = False
    with lines_of(file, layout.newline) as lines:
        for line in after(lines, layout.lines):
            text = without_end(line)
            if not text.strip():
                continue
            cells = text.split(layout.delimiter)
            if len(cells) != width:
                return False
            for place, cell in enumerate(cells):
                cells_C[place] += cell != ""
                if '"' in cell:
                    use = use_of_quotes(cell)
                    letters = letters or use == "letters"
                    quoted_C[place] += 1
                    doubled_C[place] += use == "marks"
    if letters:
        return not _is_csv(file, layout)
    return not any(quoted_C) or any(
        quoted and quoted != cells and quoted != doubled
        for quoted, doubled, cells in zip(quoted_C, doubled_C, cells_C, strict=True)
    )


def _is_csv(file: PostFile, layout: Layout) -> bool:
    """Whether quotes, taken as marks, give only rows with the header's number of cells."""
    with lines_of(file, layout.newline) as lines:
        try:
            rows = csv.reader(after(lines, layout.lines), delimiter=layout.delimiter, strict=True)
            return all(len(row) in (0, len(layout.header)) for row in rows)
        except csv.Error:
            return False


def after(lines: Iterator[str], skipped: int) -> Iterator[str]:
    for _ in range(skipped):
        next(lines, None)
    return lines


def without_end(line: str) -> str:
    return line.rstrip("\n").rstrip("\r") if line.endswith("\n") else line.rstrip("\r")


def use_of_quotes(cell: str) -> str:
    """The use of quotes in a cell: "letters" where no CSV writer would set them, "marks" where a
    CSV writer has to, else "around".
    """
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner.replace('""', ""):
        return "letters"
    return "marks" if '"' in inner or "\r" in inner else "around"
