"""Which lines a quote may take in: one that opens a cell is believed where that loses no row and no
letter.
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
_MOST_VALUES = 1_000  # different values up to which a column is learnt value by value
_SHOWN = 3


class Doubts:
    """Cells that span lines, and whether these are rows by themselves.

    A line that a quote takes in is a row when it has the header's number of cells and its other
    cells are what those columns hold elsewhere in the file: one of their values where these recur,
    else a value of the same make (digits, letters, marks). The label decides alone where a line
    has one. The first line is judged by what follows the quote, the last by what precedes it.
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
        """Take in the rows that were read, by column."""
        self._learnt += len(cells[0]) if cells else 0
        for place in self._places:
            seen = self._seen[place]
            if len(seen) <= _MOST_VALUES and cells[place]:
                new = {value.strip().casefold() for value in cells[place]} - seen
                seen |= new
                self._makes[place] |= {_make(value) for value in new}

    def learn_line(self, line: str) -> None:
        """Take in a line that is no CSV, as the row that it is when its quotes are letters."""
        cells = without_end(line).split(self._layout.delimiter)
        if len(cells) == self._width:
            self.learn([[cell] for cell in cells])

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
        cells = without_end(line).split(self._layout.delimiter)
        if len(cells) != self._width:
            self._seen_as.setdefault("marks", row)
            return
        for cell in cells:
            if '"' in cell:
                self._seen_as.setdefault(use_of_quotes(cell), row)

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
        if not swallowing or self._file.quoting == "csv":
            return
        shown = ", ".join(f"row {row} (lines {first} to {last})" for row, first, last in swallowing[:_SHOWN])
        more = f" and {len(swallowing) - _SHOWN} more" if len(swallowing) > _SHOWN else ""
        raise WrongRequest(
            f"{self._file.path}: a quote that opens a cell takes in lines that are rows by themselves:"
            f" {shown}{more}. Take the stray quote away, or type --quoting csv if these lines belong to the"
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
        words = without_end(line)
        splits = [words.split(self._layout.delimiter)]
        if '"' in words and words.count('"') % 2 == 0:
            with suppress(csv.Error):  # such as a stray carriage return
                splits.append(next(csv.reader([words], delimiter=self._layout.delimiter)))
        return splits


def _make(value: str) -> str:
    """What a value is made of: "user-17" and "team-3" are alike, "I came" and "joy" are not."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"[0-9]+", "9", value))
