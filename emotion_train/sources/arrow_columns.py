"""Reads posts from Parquet, Arrow files and the tables of the Hugging Face hub.

Label ids become names here, by each file's own `datasets` metadata, before posts of several files
are mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from emotion_train.edges.bounded import Unreadable, object_in, parquet_errors, parquet_file
from emotion_train.errors import WrongRequest
from emotion_train.sources.json_lines import spelled, spelled_target
from emotion_train.sources.posts import BATCH_ROWS, Batch, Columns, PostFile, kept_text, utf8


def read_parquet(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    """All rows of a Parquet file; raises `WrongRequest` where it is damaged or lacks a column."""
    with _whole(file, "Parquet"), parquet_file(_path(file)) as parquet:
        own = columns.among(parquet.schema_arrow.names, str(file.path))
        tables = parquet.iter_batches(_rows_at_once(own), columns=list(own.named), use_threads=False)
        yield from read_tables(number, tables, own, file.label_names, str(file.path))


def read_arrow_file(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    """All rows of an Arrow file or stream, as `datasets` keeps them; raises as `read_parquet`."""
    with _whole(file, "Arrow"), _arrow_batches(file) as (schema, batches):
        own = columns.among(schema.names, str(file.path))
        tables = (piece for batch in batches for piece in _pieces(batch.select(list(own.named))))
        yield from read_tables(number, tables, own, file.label_names, str(file.path))


def read_tables(
    number: int, tables: Iterable[Any], columns: Columns, names: Sequence[str] | None, place: str
) -> Iterator[Batch]:
    """Batches of the hub's or a file's tables; `names` are the names of its label ids.

    Raises `WrongRequest` when a column has a type that posts cannot have.
    """
    following = 1
    for table in tables:
        _refuse_other_types(table, columns, place)
        rows_N = np.arange(following, following + len(table))
        following += len(table)
        values = {
            name: (_kept if columns.only_kept(name) else _binary)(table.column(name))
            for name in columns.named
            if name != columns.label
        }
        wrong: dict[str, Any] = {}
        if columns.label is not None:
            values[columns.label], wrong = _labels(_flat(table.column(columns.label)), names, columns.lists)
        keep_N = np.ones(len(table), bool)
        for wrong_N in wrong.values():
            keep_N &= ~wrong_N
        broken = [(kind, int(row)) for kind, wrong_N in wrong.items() for row in rows_N[wrong_N]]
        batch = Batch.of(number, rows_N, columns, values, broken=tuple(broken))
        yield batch if keep_N.all() else batch.filtered(keep_N)


def label_names(schema: Any, columns: Columns) -> tuple[str, ...] | None:
    """Class names that `datasets` keeps in the metadata of a file's schema."""
    try:
        described = object_in((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = described.get("info", {}).get("features", {})
        label = columns.among(schema.names, "").label
        return names_of_feature(features.get(label))
    except (ValueError, AttributeError, TypeError, WrongRequest):
        return None  # a file that lacks the column is reported where it is read


def names_of_feature(feature: Any) -> tuple[str, ...] | None:
    """The names of a ClassLabel, or of a list of them, as `datasets` or its JSON spells it."""
    for _ in range(2):
        get = feature.get if isinstance(feature, dict) else lambda name, of=feature: getattr(of, name, None)
        if names := get("names"):
            return tuple(map(str, names))
        feature = feature[0] if isinstance(feature, list) and feature else get("feature")
    return None


def schema_of(file: PostFile) -> Any:
    """The Arrow schema of a Parquet or Arrow file; None where it cannot be read."""
    try:
        if file.format == "parquet":
            with parquet_file(_path(file)) as parquet:
                return parquet.schema_arrow
        with parquet_errors(), _arrow_batches(file) as (schema, _):
            return schema
    except (Unreadable, OSError):
        return None  # reported where it is read


@contextmanager
def _whole(file: PostFile, kind: str) -> Iterator[None]:
    try:
        with parquet_errors():
            yield
    except Unreadable as error:
        raise WrongRequest(
            f"{file.path} is not a whole {kind} file ({str(error)[:80]}); copy it again, or give another"
            " SOURCE."
        ) from None


def _path(file: PostFile) -> Path:
    assert file.path is not None
    return file.path


@contextmanager
def _arrow_batches(file: PostFile) -> Iterator[tuple[Any, Iterable[Any]]]:
    with pa.memory_map(str(file.path)) as data:
        if data.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(data)
            yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        else:
            data.seek(0)
            with pa.ipc.open_stream(data) as stream:
                yield stream.schema, stream


def _pieces(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, BATCH_ROWS) for start in range(0, len(batch), BATCH_ROWS))


def _refuse_other_types(table: Any, columns: Columns, place: str) -> None:
    kind = table.schema.field(columns.text).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise WrongRequest(
            f"Column {columns.text!r} of {place} holds {kind}, not text; type --text-column with another."
        )
    for name in columns.named:
        if _is_object(table.schema.field(name).type) and (
            columns.only_kept(name) or (columns.lists and name == columns.label)
        ):
            continue
        if not _spelled_out(table.column(name)):
            option = {columns.label: "--label-column", columns.id: "--id-column"}.get(name)
            remedy = f"type {option} with another" if option else "rename it, or make it text"
            raise WrongRequest(
                f"Column {name!r} of {place} holds {table.column(name).type}, neither text nor numbers;"
                f" {remedy}."
            )


def _spelled_out(column: Any) -> bool:
    """Whether `_binary` has an answer for a column of this type."""
    try:
        _binary(column.slice(0, 0))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return False
    return True


def _labels(column: Any, names: Sequence[str] | None, lists: bool) -> tuple[Any, dict[str, Any]]:
    """Spelled labels, and for each kind of trouble the rows that have it. An integer is a position
    in `names`, if given; `datasets` marks a post without a label by -1. `lists` as in `Columns`.
    """
    if names is not None and pa.types.is_integer(column.type):
        ids_N = column.fill_null(-1).to_numpy(zero_copy_only=False)
        unnamed_N = (ids_N < -1) | (ids_N >= len(names))
        places = pa.array(np.where(unnamed_N, 0, ids_N).astype(np.int64), mask=ids_N == -1)
        return utf8(list(names)).take(places), {"unnamed_id": unnamed_N}
    if names is not None and _is_list(column.type) and pa.types.is_integer(column.type.value_type):
        rows = column.to_pylist()
        unnamed_N = np.array(
            [any(item is not None and not -1 <= item < len(names) for item in row or ()) for row in rows],
            bool,
        )
        spelled_out = [
            None if unnamed else _by_name(row, names, lists)
            for row, unnamed in zip(rows, unnamed_N, strict=True)
        ]
        return utf8(spelled_out), {"unnamed_id": unnamed_N}
    if pa.types.is_floating(column.type):
        infinite_N = pc.is_inf(column).fill_null(False).to_numpy(zero_copy_only=False)
        missing = pc.is_nan(column).fill_null(True)
        return pc.if_else(missing, pa.scalar(None, pa.binary()), _binary(column)), {
            "infinite_label": infinite_N
        }
    if lists and (_is_list(column.type) or _is_object(column.type)):
        of_map = pa.types.is_map(column.type)
        rows = (_object_of(row) if of_map and row else row for row in column.to_pylist())
        return utf8([spelled_target(row) for row in rows]), {}
    return _binary(column), {}


def _by_name(ids: Sequence[int | None] | None, names: Sequence[str], lists: bool) -> str | None:
    spell = spelled_target if lists else spelled
    return spell([None if item is None or item == -1 else names[item] for item in ids or ()])


def _object_of(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any] | str:
    """The object of a map's pairs; where a key is given twice, text that no reader accepts."""
    values = {str(key): value for key, value in pairs}
    return values if len(values) == len(pairs) else "{"


def _is_object(kind: Any) -> bool:
    return bool(pa.types.is_struct(kind) or pa.types.is_map(kind))


def _rows_at_once(columns: Columns) -> int:
    """Rows per batch: fewer for a table with hundreds of label columns."""
    return max(1024, BATCH_ROWS // max(1, len(columns.named) // 16))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _flat(column: Any) -> Any:
    """One array of plain values."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _kept(column: Any) -> Any:
    """A column that is copied, as one binary array; lists and objects as their JSON."""
    column = _flat(column)
    if not (_is_list(column.type) or _is_object(column.type)):
        return _binary(column)
    rows = column.to_pylist()
    if pa.types.is_map(column.type):  # a key that is given twice leaves a list of pairs
        rows = [row if row is None or len(dict(row)) < len(row) else dict(row) for row in rows]
    return utf8([kept_text(row) for row in rows])


def _binary(column: Any) -> Any:
    """Any column as one binary array; lists are joined with `SEVERAL`, numbers spelled out."""
    column = _flat(column)
    if _is_list(column.type):
        return utf8([spelled(value) for value in column.to_pylist()])
    if (
        pa.types.is_binary(column.type)
        or pa.types.is_large_binary(column.type)
        or pa.types.is_binary_view(column.type)
    ):
        return column.cast(pa.binary())
    return column.cast(pa.string()).cast(pa.binary())
