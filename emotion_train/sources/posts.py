"""What every reader makes of a file of posts: batches of Arrow columns with row numbers.

A row number is what a person sees: the line of a JSONL file, the row of a CSV file in a spreadsheet
(blank rows count, and the header is 1 where nothing stands above it), the row of a Parquet file or
hub split counted from 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from emotion_train.errors import WrongRequest

SEVERAL = "\x1f"  # stands between the labels of a row that has more than one
BATCH_ROWS = 32_768
BATCH_BYTES = 4 << 20
Quoting = Literal["auto", "csv", "none"]
UTF8 = "utf-8"
_SPLIT_WORDS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)
# Names that columns of posts and of labels have in public data sets
_USUAL_NAMES = {
    "text": (
        "text", "content", "tweet", "sentence", "post", "comment", "message", "utterance", "review", "body",
        "document", "input", "clean_text", "comment_text", "full_text", "dialogue",
    ),
    "label": (
        "label", "labels", "emotion", "emotions", "sentiment", "class", "category", "target", "feeling",
        "mood", "annotation", "tag",
    ),
}  # fmt: skip
_OPTIONS = {"text": "--text-column", "label": "--label-column", "id": "--id-column"}
_NAMES_SHOWN = 20


class Columns(NamedTuple):
    """Names of the columns of a source. `label` and `id` are read where they are given, `split`
    where it is given and exists; the columns in `kept` come along as they are.
    """

    text: str = "text"
    label: str | None = "label"
    id: str | None = None
    split: str | None = "split"
    kept: tuple[str, ...] = ()

    def among(self, present: Sequence[str], place: str) -> Columns:
        """The same columns as the file at `place` spells them, without regard to case where no name
        is the same; `split` is None where it has none.

        Raises `WrongRequest` when a column is missing, naming the likely one, or is there twice.
        """
        found = {
            role: None if name is None else self._needed(role, name, present, place)
            for role, name in (("text", self.text), ("label", self.label), ("id", self.id))
        }
        assert found["text"] is not None
        return Columns(
            found["text"],
            found["label"],
            found["id"],
            None if self.split is None else _matching(self.split, present, place),
            tuple(self._needed("kept", name, present, place) for name in self.kept),
        )

    def _needed(self, role: str, name: str, present: Sequence[str], place: str) -> str:
        if (match := _matching(name, present, place)) is not None:
            return match
        option = _OPTIONS.get(role, "--columns")
        usual = [
            column for known in _USUAL_NAMES.get(role, ()) for column in present if _folded(column) == known
        ]
        has = ", ".join(repr(column[:60]) for column in present[:_NAMES_SHOWN]) or "none"
        more = f" and {len(present) - _NAMES_SHOWN} more" if len(present) > _NAMES_SHOWN else ""
        remedy = f"{option} {usual[0]}, or another" if usual else f"{option} with one"
        raise WrongRequest(f"{place} has no column {name!r}; it has {has}{more}. Type {remedy} of these.")

    @property
    def named(self) -> tuple[str, ...]:
        """Each name once."""
        names = (self.text, self.label, self.id, self.split, *self.kept)
        return tuple(dict.fromkeys(name for name in names if name is not None))


class Batch(NamedTuple):
    """Some rows of one file. Texts, labels, splits, ids and the columns in `kept` are binary arrays
    of one length, null where a row has none.
    """

    file: int
    rows_N: Any
    texts: Any
    labels: Any | None = None
    splits: Any | None = None
    ids: Any | None = None
    kept: Mapping[str, Any] = MappingProxyType({})
    broken: tuple[tuple[str, int], ...] = ()  # (kind, row) of what could not be read as a post
    blank: tuple[int, ...] = ()  # rows with nothing in them
    remarks: tuple[str, ...] = ()  # what was passed over and is no row

    @classmethod
    def of(cls, file: int, rows: Any, columns: Columns, values: Mapping[str, Any], **rest: Any) -> Batch:
        """From binary arrays by column name."""
        text, label, split, key = (
            None if name is None else values[name]
            for name in (columns.text, columns.label, columns.split, columns.id)
        )
        kept = {name: values[name] for name in columns.kept}
        return cls(file, np.asarray(rows, np.int64), text, label, split, key, kept, **rest)

    def filtered(self, keep_N: Any) -> Batch:
        """The rows where `keep_N` is true; what is broken or blank stays."""
        keep = pa.array(keep_N)
        texts, labels, splits, ids = (
            None if column is None else column.filter(keep)
            for column in (self.texts, self.labels, self.splits, self.ids)
        )
        kept = {name: column.filter(keep) for name, column in self.kept.items()}
        return self._replace(
            rows_N=self.rows_N[keep_N], texts=texts, labels=labels, splits=splits, ids=ids, kept=kept
        )


@dataclass(frozen=True)
class PostFile:
    """One file, or one split of a hub data set."""

    name: str  # relative to the source, or the hub's split
    split: str | None  # from its name
    path: Path | None
    format: str
    encoding: str = UTF8
    quoting: Quoting = "auto"
    labels: Path | None = None  # of a pair of files: the labels, one a line
    label_names: tuple[str, ...] | None = None  # what its label ids stand for, where it says so


def split_of(word: str) -> str | None:
    """train, validation or test for one of their usual names."""
    return _SPLIT_WORDS.get(word.strip().lower())


def utf8(values: Sequence[str | None]) -> Any:
    """A binary array of UTF-8; lone surrogates, which JSON can spell, stay as their three bytes for
    the cleaner to find.
    """
    return pa.array(
        [None if value is None else value.encode(UTF8, "surrogatepass") for value in values], pa.binary()
    )


def by_bytes(rows: Iterator[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Pieces of a stream of (row, bytes), none of many more bytes or rows than a batch may have."""
    piece: list[Any] = []
    size = 0
    for row, length in rows:
        piece.append(row)
        size += length
        if size >= BATCH_BYTES or len(piece) >= BATCH_ROWS:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _matching(name: str, present: Sequence[str], place: str) -> str | None:
    exact = [column for column in present if column == name]
    matches = exact or [column for column in present if _folded(column) == _folded(name)]
    if len(matches) > 1:
        spelled = f"{len(matches)} columns named {name!r}" if exact else f"{' and '.join(map(repr, matches))}"
        raise WrongRequest(f"{place} has {spelled}; rename all but one in its header.")
    return matches[0] if matches else None


def _folded(name: str) -> str:
    return name.strip().casefold()
