"""The posts of a unit, read and cleaned as training posts are. A post that cannot be labelled keeps
its row, with an error.

Every row comes exactly once, in order. Blank rows are no posts: they are only counted.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emotion_train.data.cleaning import REFUSED, Cleaner, Findings, Rules, rows_of
from emotion_train.data.labels import LabelNames
from emotion_train.data.reader import RowGroupReader
from emotion_train.errors import WrongRequest
from emotion_train.labelling.job import Reading, SourceFile, Unit
from emotion_train.labelling.planning import (
    FoundSource,
    columns_of,
    footer_sha256,
    naming,
    opened_parquet,
    split_of,
)
from emotion_train.sources.arrow_columns import read_tables
from emotion_train.sources.open import READERS
from emotion_train.sources.posts import Batch, PostFile, readable
from emotion_train.sources.unpacked import UNREADABLE

_READ_BYTES = 16 << 20
_PARQUET_ROWS = 8192
_NO_TEXT = "no text"


@dataclass(frozen=True)
class Rows:
    """Some rows of a unit, in their order. A row has a text, or an error that says why not."""

    numbers: list[int]
    texts: list[str | None]
    errors: list[str | None]
    ids: list[str | None] | None = None
    kept: list[list[str | None]] = field(default_factory=list)  # by column
    blank: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def cut(self, start: int, end: int) -> Rows:
        """The rows from `start` to `end`; the blank ones count with the first."""
        return Rows(
            self.numbers[start:end],
            self.texts[start:end],
            self.errors[start:end],
            None if self.ids is None else self.ids[start:end],
            [column[start:end] for column in self.kept],
            self.blank if start == 0 else 0,
        )


def rows_of_unit(source: FoundSource, unit: Unit, reading: Reading) -> Iterator[Rows]:
    """All rows of the unit. Raises `WrongRequest` where the source changed since it was planned,
    and for a file that cannot be read at all.
    """
    file = source.files[unit.file]
    if file.format == "data set":
        yield from _of_split(source, unit)
        return
    if file.format == "parquet":
        batches = _of_parquet(source, unit, reading)
    else:
        batches = _of_text(source, unit, reading)
    shift = unit.first_row - file.row_after if file.before is not None else unit.first_row - 1
    least = file.row_after if file.before is not None else 1
    for batch in batches:
        yield _cleaned(batch, reading, shift, least)


def _of_split(source: FoundSource, unit: Unit) -> Iterator[Rows]:
    assert source.index is not None
    start, end = _bounds(unit)
    name, _ = split_of(source.index, source.files[unit.file].key)
    first = unit.first_row
    with RowGroupReader(source.store, source.index.split(name), capacity=4, threads=2) as reader:
        for group in range(start, end):
            reader.ask(range(group, min(group + 2, end)))
            rows = reader.rows(group)
            texts = [text if isinstance(text, str) and text.strip() else None for text in rows.texts]
            numbers = list(range(first, first + len(texts)))
            errors = [None if text is not None else _NO_TEXT for text in texts]
            yield Rows(numbers, texts, errors, list(rows.ids))
            first += len(texts)


def _of_parquet(source: FoundSource, unit: Unit, reading: Reading) -> Iterator[Batch]:
    url = source.store.url_of(source.files[unit.file].key)
    start, end = _bounds(unit)
    if unit.sha256 not in (None, footer_sha256(source, unit.file)):
        raise _changed(source, source.files[unit.file])
    with opened_parquet(source, unit.file) as parquet:
        columns = columns_of(reading).among(parquet.schema_arrow.names, url)
        tables = parquet.iter_batches(
            _PARQUET_ROWS, row_groups=list(range(start, end)), columns=list(columns.named),
            use_threads=False,
        )  # fmt: skip
        yield from read_tables(0, tables, columns, None, url)


def _bounds(unit: Unit) -> tuple[int, int]:
    assert unit.start is not None
    assert unit.end is not None
    return unit.start, unit.end


def _of_text(source: FoundSource, unit: Unit, reading: Reading) -> Iterator[Batch]:
    file = source.files[unit.file]
    url = source.store.url_of(file.key)
    with _copied(source, unit) as path, naming(path, url):
        post_file = PostFile(file.key, None, path, file.format, reading.encoding, file.quoting)
        try:
            yield from READERS[file.format](0, post_file, columns_of(reading))
        except UNREADABLE as error:
            raise WrongRequest(f"{url} cannot be read ({error}); check the file.") from error


@contextmanager
def _copied(source: FoundSource, unit: Unit) -> Iterator[Path]:
    """The unit's bytes, with the file's `before` in front, as a file of their own."""
    file, info = source.files[unit.file], source.info(unit.file)
    start, end = unit.start or 0, info.size if unit.end is None else unit.end
    summed = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="emotion-train-label-") as folder:
        path = Path(folder, Path(file.key).name)
        with path.open("wb") as copy:
            copy.write((file.before or "").encode("latin-1"))
            for at in range(start, end, _READ_BYTES):
                piece = source.store.read(
                    file.key, start=at, length=min(_READ_BYTES, end - at), if_match=info.etag
                )
                summed.update(piece)
                copy.write(piece)
        if unit.sha256 is not None and summed.hexdigest() != unit.sha256:
            raise _changed(source, file)
        yield path


def _changed(source: FoundSource, file: SourceFile) -> WrongRequest:
    return WrongRequest(
        f"The source {source.store.url_of(file.key)} changed since the job was planned. Put it back as it"
        " was, or label it into another OUT_URL."
    )


class _Noted(Findings):
    """The error of each row that cannot be labelled, and the blank rows."""

    def __init__(self) -> None:
        super().__init__([""])
        self.errors: dict[int, str] = {}
        self.blank: list[int] = []

    def note(self, kind: str, places: Any) -> None:
        if kind == "blank":
            self.blank += rows_of(np.asarray(places, np.int64)).tolist()
        elif kind in REFUSED:
            self.errors |= dict.fromkeys(rows_of(np.asarray(places, np.int64)).tolist(), REFUSED[kind])


def _cleaned(batch: Batch, reading: Reading, shift: int, least: int) -> Rows:
    """The batch's rows that the reader numbers `least` or more, numbered as in their file."""
    noted = _Noted()
    rules = Rules(reading.max_chars, 0, reading.unescape_html, hashed=False)
    good = Cleaner(rules, LabelNames(None, None), noted).clean(batch, None)
    place_of = dict(zip(rows_of(good.column("place").to_numpy()).tolist(), range(len(good)), strict=True))
    texts = good.column("text").to_pylist()
    numbers = sorted(row for row in place_of.keys() | noted.errors.keys() if row >= least)
    taken = _places(batch.rows_N, numbers)
    ids = None if reading.id_column is None else _words(batch.ids, taken)
    return Rows(
        [row + shift for row in numbers],
        [texts[place_of[row]] if row in place_of else None for row in numbers],
        [noted.errors.get(row) for row in numbers],
        ids,
        [_words(column, taken) for column in batch.kept.values()],
        sum(row >= least for row in noted.blank),
    )


def _places(rows_N: Any, numbers: Sequence[int]) -> list[int | None]:
    """Each number's position among the batch's rows; None where the batch has no such row."""
    place = {row: at for at, row in enumerate(rows_N.tolist())}
    return [place.get(row) for row in numbers]


def _words(column: Any, taken: Sequence[int | None]) -> list[str | None]:
    values = column.to_pylist()
    return [None if at is None or (value := values[at]) is None else readable(value) for at in taken]
