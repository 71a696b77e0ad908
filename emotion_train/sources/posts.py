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
_OPTIONS = {
    "text": "--text-column",
    "label": "--label-column",
    "id": "--id-column",
    "label_columns": "--label-columns",
    "weight": "--weight-column",
    "annotator": "--annotations-by",
}
_NAMES_SHOWN = 20


class Columns(NamedTuple):
    """Names of the columns of a source. `label` and `id` are read where they are given, `split`
    where it is given and exists; the columns in `kept` come along as they are.

    `label_columns` hold a number for each label, in place of `label`: "joy..anger" are all columns
    of a file from joy to anger. Where `lists` is set a label may be a list or an object: `SEVERAL`
    stands before each item of a list, and an object is spelled as JSON.
    """

    text: str = "text"
    label: str | None = "label"
    id: str | None = None
    split: str | None = "split"
    kept: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()
    weight: str | None = None
    annotator: str | None = None
    lists: bool = False
    kept_by: str = "--columns"  # the option that names what is kept

    def among(self, present: Sequence[str], place: str) -> Columns:
        """The same columns as the file at `place` spells them, without regard to case where no name
        is the same; `split` is None where it has none.

        Raises `WrongRequest` when a column is missing, naming the likely one, or is there twice.
        """
        found: dict[str, Any] = {
            role: None if name is None else self._needed(role, name, present, place)
            for role in ("text", "label", "id", "weight", "annotator")
            for name in (getattr(self, role),)
        }
        columns = self._replace(
            **found,
            split=None if self.split is None else _matching(self.split, present, place),
            kept=tuple(self._needed("kept", name, present, place) for name in self.kept),
        )
        others = columns._replace(label_columns=()).named
        of_labels = tuple(
            dict.fromkeys(
                name for words in self.label_columns for name in self._between(words, present, place)
            )
        )
        if taken := next((name for name in of_labels if name in others), None):
            raise WrongRequest(
                f"--label-columns takes in column {taken!r} of {place}, which has another meaning; name the"
                " columns of labels only, such as anger,joy or anger..joy."
            )
        return columns._replace(label_columns=of_labels)

    def _between(self, words: str, present: Sequence[str], place: str) -> Sequence[str]:
        """The column of that name, or all from the first to the last of `first..last`."""
        if _matching(words, present, place) is not None or ".." not in words:
            return [self._needed("label_columns", words, present, place)]
        ends = [self._needed("label_columns", word, present, place) for word in words.split("..", 1)]
        first, last = (present.index(name) for name in ends)
        if last < first:
            raise WrongRequest(
                f"--label-columns {words}: {place} has {ends[1]!r} before {ends[0]!r}; type"
                f" {ends[1]}..{ends[0]}."
            )
        return present[first : last + 1]

    def _needed(self, role: str, name: str, present: Sequence[str], place: str) -> str:
        if (match := _matching(name, present, place)) is not None:
            return match
        option = _OPTIONS.get(role, self.kept_by)
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
        alone = (self.text, self.label, self.id, self.split, self.weight, self.annotator)
        names = (*alone, *self.kept, *self.label_columns)
        return tuple(dict.fromkeys(name for name in names if name is not None))


class Batch(NamedTuple):
    """Some rows of one file. Its columns are binary arrays of one length, null where a row has
    none.
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
    weights: Any | None = None
    annotators: Any | None = None
    label_columns: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(cls, file: int, rows: Any, columns: Columns, values: Mapping[str, Any], **rest: Any) -> Batch:
        """From binary arrays by column name."""
        text, label, split, key, weight, annotator = (
            None if name is None else values[name]
            for name in (
                columns.text,
                columns.label,
                columns.split,
                columns.id,
                columns.weight,
                columns.annotator,
            )
        )
        kept = {name: values[name] for name in columns.kept}
        rest |= {"weights": weight, "annotators": annotator}
        rest |= {"label_columns": {name: values[name] for name in columns.label_columns}}
        return cls(file, np.asarray(rows, np.int64), text, label, split, key, kept, **rest)

    def filtered(self, keep_N: Any) -> Batch:
        """The rows where `keep_N` is true; what is broken or blank stays."""
        keep = pa.array(keep_N)
        columns: dict[str, Any] = {
            name: None if (column := getattr(self, name)) is None else column.filter(keep)
            for name in ("texts", "labels", "splits", "ids", "weights", "annotators")
        }
        several: dict[str, Any] = {
            name: {key: column.filter(keep) for key, column in getattr(self, name).items()}
            for name in ("kept", "label_columns")
        }
        return self._replace(rows_N=self.rows_N[keep_N], **columns, **several)


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
    header: tuple[str, ...] | None = None  # of a table without one


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
