"""Which lines a quote may take in: a quote that opens a cell counts as a mark only where that loses
no row and no letter.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from contextlib import suppress

from emotion_train.errors import WrongRequest
from emotion_train.sources.posts import PostFile
from emotion_train.sources.table_layout import Layout, use_of_quotes, without_end

NO_QUOTES = "type --quoting none if quotes are letters in this file"
_MOST_DOUBTS = 10_000
_LEARNT_COLUMNS = 16
_MOST_VALUES = 1_000  # a column with more different values is not learnt value by value
_SHOWN = 3


class Doubts:
    """Cells that span lines, and whether their lines are rows by themselves.

    A line that a quote takes in is a row when it has the header's number of cells and its other
    cells fit their columns: each is one of the column's values where these recur, else has the same
    make (digits, letters, marks) as a value. If the line has a label, only the label counts. The
    first line is judged by its cells after the quote, the last by its cells before the quote.
    """

    def __init__(self, file: PostFile, layout: Layout, position: dict[str, int]) -> None:
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
        """Learn the values of rows, given by column."""
        self._learnt += len(cells[0]) if cells else 0
        for place in self._places:
            seen = self._seen[place]
            if len(seen) <= _MOST_VALUES and cells[place]:
                new = {value.strip().casefold() for value in cells[place]} - seen
                seen |= new
                self._makes[place] |= {_make(value) for value in new}

    def learn_line(self, line: str) -> None:
        """Learn from a line that is no CSV, split as if its quotes were letters."""
        cells = without_end(line).split(self._layout.delimiter)
        if len(cells) == self._width:
            self.learn([[cell] for cell in cells])

    def question(self, row: int, first: int, cells: Sequence[str], lines: Sequence[str]) -> None:
        """Note the lines of a cell, to be checked against all rows: none may be a row by itself."""
        spanning = [place for place, cell in enumerate(cells) if "\n" in cell or "\r" in cell]
        if not spanning:
            return
        last_line = first + len(lines) - 1
        for line, text in enumerate(lines):
            allowed = [
                place
                for place in self._places
                if place not in spanning
                and (line > 0 or place > spanning[0])
                and (line < len(lines) - 1 or place < spanning[-1])
            ]
            for split in self._splits(text):
                if allowed and len(split) == self._width:
                    decisive = [self._label] if self._label in allowed else allowed
                    claim = tuple((place, split[place].strip().casefold()) for place in decisive)
                    self._asked.setdefault(claim, (row, first, last_line))
        if len(self._asked) > _MOST_DOUBTS:
            self._refuse()
            self._asked.clear()

    def look(self, row: int, line: str) -> None:
        """Note how a one-line row uses quotes: as certain marks (around a delimiter, or doubled),
        around a whole cell, or inside a cell.
        """
        cells = without_end(line).split(self._layout.delimiter)
        if len(cells) != self._width:
            self._seen_as.setdefault("marks", row)
            return
        for cell in cells:
            if '"' in cell:
                self._seen_as.setdefault(use_of_quotes(cell), row)

    def settle(self) -> None:
        """Raises `WrongRequest` when a quoted cell took in lines that are rows by themselves, or
        when the file does not show whether its quotes are marks or letters.
        """
        self._refuse()
        if self._file.quoting == "auto" and {"letters", "around"} == self._seen_as.keys():
            raise WrongRequest(
                f"{self._file.path}: quotes are inside a cell in row {self._seen_as['letters']} and around a"
                f" whole cell in row {self._seen_as['around']}; type --quoting csv if those around cells are"
                " no part of the text, or --quoting none if they are."
            )

    def _refuse(self) -> None:
        swallowing = sorted({where for claim, where in self._asked.items() if self._is_row(claim)})
        if not swallowing or self._file.quoting == "csv":
            return
        shown = ", ".join(f"row {row} (lines {first} to {last})" for row, first, last in swallowing[:_SHOWN])
        more = f" and {len(swallowing) - _SHOWN} more" if len(swallowing) > _SHOWN else ""
        raise WrongRequest(
            f"{self._file.path}: a quote that opens a cell takes in lines that are rows by themselves:"
            f" {shown}{more}. Remove the stray quote, or type --quoting csv if these lines belong to the"
            " text, or --quoting none if quotes are letters in this file."
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
        text = without_end(line)
        splits = [text.split(self._layout.delimiter)]
        if '"' in text and text.count('"') % 2 == 0:
            with suppress(csv.Error):  # for example a stray carriage return
                splits.append(next(csv.reader([text], delimiter=self._layout.delimiter)))
        return splits


def _make(value: str) -> str:
    """A value's make: "user-17" and "team-3" have the same, "I came" and "joy" do not."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"[0-9]+", "9", value))
