"""Batches of Arrow columns with row numbers, which every reader makes of a file of posts.

Row numbers are as a person counts: the line of a JSONL file, the row of a CSV file in a spreadsheet
(blank rows count, and the header is 1 where nothing is above it), the row of a Parquet file or hub
split counted from 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from emotion_train.errors import WrongRequest

SEVERAL = "\x1f"  # between the labels of a row that has more than one
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
_LONGEST_NAME = 60
_MOST_WORDS = 3
_NO_NAMES = (
    " If its first line is a post, put a line with the names of the columns above it, or type them with"
    " `emotion-train prepare --header`."
)


def _is_no_name(column: str) -> bool:
    """Whether a column's name is rather a cell of a table without a header: a number, or a text."""
    if re.fullmatch(r"[-+]?\d+(\.\d+)?", column.strip()):
        return True
    return len(column) > _LONGEST_NAME or len(column.split()) > _MOST_WORDS


class Columns(NamedTuple):
    """Names of the columns of a source. `label` and `id` are read where given, `split` where given
    and present; the columns in `kept` are copied unchanged.

    `label_columns` replace `label` and hold a number for each label: "joy..anger" means all columns
    of a file from joy to anger. With `lists`, a label may be a list or an object: a list is spelled
    with `SEVERAL` before each item, an object as JSON.
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
    kept_by: str = "--columns"  # the option that names the kept columns

    def among(self, present: Sequence[str], place: str) -> Columns:
        """The columns as the file at `place` spells them, compared without case where no name is
        exactly the same. `split` becomes None where the file has no such column.

        Raises `WrongRequest` when a column is missing, with the likely one, or is present twice.
        """
        single: dict[str, Any] = {
            role: None if name is None else self._needed(role, name, present, place)
            for role in ("text", "label", "id", "weight", "annotator")
            for name in (getattr(self, role),)
        }
        columns = self._replace(
            **single,
            split=None if self.split is None else _matching(self.split, present, place),
            kept=tuple(self._needed("kept", name, present, place) for name in self.kept),
        )
        if doubled := next((name for name in columns.kept if columns.kept.count(name) > 1), None):
            raise WrongRequest(f"{self.kept_by} names column {doubled!r} of {place} twice; name it once.")
        others = columns._replace(label_columns=()).named
        of_labels = tuple(
            dict.fromkeys(
                name for given in self.label_columns for name in self._between(given, present, place)
            )
        )
        if taken := next((name for name in of_labels if name in others), None):
            raise WrongRequest(
                f"--label-columns takes in column {taken!r} of {place}, which has another meaning; name the"
                " columns of labels only, such as anger,joy or anger..joy."
            )
        return columns._replace(label_columns=of_labels)

    def _between(self, given: str, present: Sequence[str], place: str) -> Sequence[str]:
        """The column of that name, or for `first..last` all columns from the first to the last."""
        if _matching(given, present, place) is not None or ".." not in given:
            return [self._needed("label_columns", given, present, place)]
        ends = [self._needed("label_columns", name, present, place) for name in given.split("..", 1)]
        first, last = (present.index(name) for name in ends)
        if last < first:
            raise WrongRequest(
                f"--label-columns {given}: {place} has {ends[1]!r} before {ends[0]!r}; type"
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
        remedy = f"{option} {usual[0].strip()}, or another" if usual else f"{option} with one"
        first = _NO_NAMES if any(map(_is_no_name, present)) else ""
        raise WrongRequest(
            f"{place} has no column {name!r}; it has {has}{more}. Type {remedy} of these.{first}"
        )

    def only_kept(self, name: str) -> bool:
        """Whether the column is copied, and read for nothing else."""
        return name in self.kept and name not in self._replace(kept=()).named

    @property
    def named(self) -> tuple[str, ...]:
        """The names of all columns to read, each once."""
        alone = (self.text, self.label, self.id, self.split, self.weight, self.annotator)
        names = (*alone, *self.kept, *self.label_columns)
        return tuple(dict.fromkeys(name for name in names if name is not None))


class Batch(NamedTuple):
    """Some rows of one file, as binary arrays of one length; a missing value is null."""

    file: int
    rows_N: Any
    texts: Any
    labels: Any | None = None
    splits: Any | None = None
    ids: Any | None = None
    kept: Mapping[str, Any] = MappingProxyType({})
    broken: tuple[tuple[str, int], ...] = ()  # (kind of trouble, row) of rows that are no posts
    blank: tuple[int, ...] = ()  # rows with nothing in them
    remarks: tuple[str, ...] = ()  # notes on lines that were passed over and are no rows
    weights: Any | None = None
    annotators: Any | None = None
    label_columns: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(cls, file: int, rows: Any, columns: Columns, values: Mapping[str, Any], **rest: Any) -> Batch:
        """A batch from binary arrays by column name."""
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
        """The rows where `keep_N` is true; notes of broken and blank rows stay."""
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
    label_names: tuple[str, ...] | None = None  # names of its label ids, where it has them
    header: tuple[str, ...] | None = None  # of a table without one


def split_of(word: str) -> str | None:
    """train, validation or test for one of their usual names; None for another word."""
    return _SPLIT_WORDS.get(word.strip().lower())


def utf8(values: Sequence[str | None]) -> Any:
    """A binary array of UTF-8. Lone surrogates, which JSON can spell, become three bytes each,
    which the cleaner finds.
    """
    return pa.array(
        [None if value is None else value.encode(UTF8, "surrogatepass") for value in values], pa.binary()
    )


def kept_text(value: Any) -> str | None:
    """A value of a column that is copied, as text: a list or an object as its JSON, since a text of
    joined items would lose the items that are missing or hold the mark between them.
    """
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=_spelled_out)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, str) else str(value)


def _spelled_out(value: Any) -> str:
    return readable(value) if isinstance(value, bytes) else str(value)


def readable(raw: bytes) -> str:
    """The text of a copied column's bytes. Bytes that are not UTF-8 are spelled out (\\xe9), so
    that ids which differ stay different.
    """
    return raw.decode(UTF8, "backslashreplace")


def by_bytes(rows: Iterator[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Pieces of a stream of (row, bytes), each cut once it has a batch's most bytes or rows."""
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


def names_beside(columns: Sequence[str], own: Sequence[str], before: str = "input_") -> list[str]:
    """The names in an output of columns that are put beside its `own` ones, no two alike.

    A name that is taken gets `before` in front. Names are compared without case, because engines
    such as Spark and Athena read a table's columns so.
    """
    names, taken = list(columns), {_folded(name) for name in own}
    alike: list[int] = []
    for place, name in enumerate(columns):
        if _folded(name) in taken:
            alike.append(place)
        taken.add(_folded(name))
    for place in alike:
        while _folded(names[place]) in taken:
            names[place] = f"{before}{names[place]}"
        taken.add(_folded(names[place]))
    return names


def _folded(name: str) -> str:
    return name.strip().casefold()
