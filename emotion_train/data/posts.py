"""Reads posts from CSV, JSON Lines, Parquet, a folder of these, or a data set of the Hugging Face
hub, as Arrow columns with row numbers.

Memory holds a few MiB of a file at a time. A row number is what a person sees: the line of a JSONL
file, the row of a CSV file in a spreadsheet (the header is 1), the row of a Parquet file or hub
split counted from 1. CSV is read on one core: only then are row numbers known.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emotion_train.errors import WrongRequest

FORMATS = ("csv", "tsv", "jsonl", "parquet", "hub")
SEVERAL = "\x1f"  # stands between the labels of a row that has more than one
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_SPLIT_WORDS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)
_BLOCK_BYTES = 4 << 20
_BATCH_ROWS = 32_768


class Columns(NamedTuple):
    """Names of the columns in the source; `split` is used where it exists, `id` where it is
    given.
    """

    text: str = "text"
    label: str = "label"
    id: str | None = None
    split: str = "split"


class Batch(NamedTuple):
    """Some rows of one file. Texts, labels, splits and ids are binary arrays, null where a row has
    none.
    """

    file: int
    rows_N: Any
    texts: Any
    labels: Any
    splits: Any | None
    ids: Any | None
    broken: tuple[tuple[str, int], ...] = ()  # (kind, row) of what could not be read as a row


@dataclass(frozen=True)
class PostFile:
    name: str  # relative to the source, or the hub's split
    split: str | None  # from its name
    path: Path | None
    format: str


@dataclass(frozen=True)
class Source:
    """Where posts come from; `bytes` is about how many there are to read."""

    name: str
    files: tuple[PostFile, ...]
    bytes: int
    columns: Columns
    label_names: tuple[str, ...] | None = None  # what integer labels stand for, where the source says so
    hub: Any = None

    @property
    def format(self) -> str:
        return self.files[0].format

    def batches(self) -> Iterator[Batch]:
        """All rows in order; raises `WrongRequest` where a file cannot be read at all."""
        for number, file in enumerate(self.files):
            if file.path is None:
                yield from _read_arrow(
                    number,
                    self.hub[file.name].with_format("arrow").iter(_BATCH_ROWS),
                    self.columns,
                    file.name,
                )
                continue
            reader = {"parquet": _read_parquet, "jsonl": _read_jsonl}.get(file.format, _read_csv)
            try:
                yield from reader(number, file, self.columns)
            except (OSError, EOFError) as error:
                raise WrongRequest(
                    f"{file.path} cannot be read ({error}); check the file, or give another SOURCE."
                ) from error


def open_source(
    source: str, columns: Columns, format: str | None = None, subset: str | None = None
) -> Source:
    """Find the files of `source`, or the hub's data set of that name.

    Raises `WrongRequest` when there is neither, or when some files of a folder name a split and
    others do not.
    """
    path = Path(source).expanduser()
    if format == "hub" or (
        format is None
        and not path.exists()
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
        and not _format(path)
    ):
        return _open_hub(source, columns, subset)
    if path.is_dir():
        files = _files_of_folder(path, format)
    elif path.exists() and not path.is_file():
        raise WrongRequest(
            f"{source} is a pipe or a device, which can be read once only; save the posts to a file and give"
            " that."
        )
    elif path.exists():
        chosen = format or _format(path)
        if chosen is None:
            raise WrongRequest(
                f"{source} has no known ending; type --format with one of {', '.join(FORMATS[:-1])}."
            )
        files = (PostFile(path.name, None, path, chosen),)
    else:
        raise WrongRequest(
            f"There is no file or folder {source}; give a CSV, JSONL or Parquet file, a folder of them, or a"
            " hub name (owner/name)."
        )
    size = sum(_unpacked_bytes(file.path) for file in files if file.path)
    return Source(path.resolve().name, files, size, columns, _names_in_parquet(files[0], columns))


def split_of(word: str) -> str | None:
    """train, validation or test for one of their usual names."""
    return _SPLIT_WORDS.get(word.strip().lower())


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2", ".zst"):
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _unpacked_bytes(path: Path) -> int:
    return path.stat().st_size * (
        6 if path.suffix.lower() in (".gz", ".bz2", ".zst") else 3 if path.suffix == ".parquet" else 1
    )


def _files_of_folder(folder: Path, format: str | None) -> tuple[PostFile, ...]:
    found = []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        kind = _format(path)
        if (
            path.is_file()
            and kind
            and path.suffix != ".txt"
            and (format is None or kind == format)
            and not any(part.startswith(".") for part in relative.parts)
        ):
            words = (re.match(r"[a-z]*", part.lower()) for part in reversed(relative.parts))
            split = next((split for word in words if word and (split := split_of(word.group()))), None)
            found.append(PostFile(relative.as_posix(), split, path, kind))
    if not found:
        raise WrongRequest(f"The folder {folder} holds no CSV, JSONL or Parquet file; give another SOURCE.")
    nameless = [file.name for file in found if file.split is None]
    if nameless and len(nameless) < len(found):
        raise WrongRequest(
            f"{folder}/{nameless[0]} names no split while other files there do; call it train…, validation…"
            " or test…, or move it away."
        )
    return tuple(found)


# CSV


def _read_csv(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    from pyarrow import csv as arrow_csv

    assert file.path is not None
    header, delimiter, header_lines = _csv_header(file, columns)
    wanted = _wanted(columns, header, str(file.path))
    aliases = [f"c{i}" for i in range(len(header))]  # header names may be empty or doubled
    positions = {name: aliases[header.index(name)] for name in wanted}
    skipped: list[int] = []
    broken: list[tuple[str, int]] = []

    def note(row: Any) -> str:
        skipped.append(row.number)
        broken.append(("broken_quoting" if row.text.count('"') % 2 else "ragged_line", row.number))
        return "skip"

    following = header_lines + 1
    try:
        with pa.input_stream(str(file.path), compression="detect") as stream:
            reader = arrow_csv.open_csv(
                stream,
                read_options=arrow_csv.ReadOptions(
                    use_threads=False, block_size=_BLOCK_BYTES, column_names=aliases, skip_rows=header_lines
                ),
                parse_options=arrow_csv.ParseOptions(
                    delimiter=delimiter,
                    newlines_in_values=True,
                    ignore_empty_lines=False,
                    invalid_row_handler=note,
                ),
                convert_options=arrow_csv.ConvertOptions(
                    include_columns=list(positions.values()),
                    column_types=dict.fromkeys(aliases, pa.binary()),
                    null_values=[],
                ),
            )
            for batch in reader:
                gone = np.array([row for row in skipped if row >= following], dtype=np.int64)
                rows_N = np.setdiff1d(np.arange(following, following + len(batch) + len(gone)), gone)[
                    : len(batch)
                ]
                following = int(rows_N[-1]) + 1 if len(rows_N) else following
                skipped = [row for row in skipped if row >= following]
                yield _without_blank_lines(
                    Batch(number, rows_N, *_in_order(batch, positions, columns), broken=tuple(broken))
                )
                broken.clear()
    except pa.ArrowInvalid as error:
        if "too short" in str(error) or "Empty CSV" in str(error):
            return
        raise WrongRequest(
            f"{file.path} has broken CSV after row {following - 1}, most likely a quote that is never closed;"
            f" mend it ({str(error)[:80]})."
        ) from None
    if broken:
        empty = pa.array([], pa.binary())
        yield Batch(number, np.zeros(0, np.int64), empty, empty, None, None, tuple(broken))


def _csv_header(file: PostFile, columns: Columns) -> tuple[list[str], str, int]:
    """Column names, delimiter (of `, ; tab |` the one that gives the wanted names), and how many
    lines the header takes.
    """
    with pa.input_stream(str(file.path), compression="detect") as stream:
        head = stream.read(1 << 16)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise WrongRequest(
            f"{file.path} is UTF-16; save it as UTF-8, for example with `iconv -f UTF-16 -t UTF-8`."
        )
    text = head.decode("utf-8-sig", errors="replace")
    if not text.strip():
        raise WrongRequest(f"{file.path} is empty; give a file with a header row and posts.")
    headers: dict[str, tuple[list[str], int]] = {}
    for delimiter in ("\t", ",") if file.format == "tsv" else (",", ";", "\t", "|"):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            headers[delimiter] = (next(reader), reader.line_num)
        except csv.Error as error:
            raise WrongRequest(
                f"{file.path} has no readable header row ({error}); save it as CSV with UTF-8 text again."
            ) from None
    fitting = [
        mark for mark, (names, _) in headers.items() if columns.text in names and columns.label in names
    ]
    delimiter = fitting[0] if fitting else max(headers, key=lambda mark: len(headers[mark][0]))
    return headers[delimiter][0], delimiter, headers[delimiter][1]


def _wanted(columns: Columns, present: list[str], place: str) -> list[str]:
    """The columns to read; raises `WrongRequest` when one that is needed is missing or there
    twice.
    """
    options = {columns.text: "--text-column", columns.label: "--label-column", columns.id: "--id-column"}
    for name, option in options.items():
        if name is not None and name not in present:
            raise WrongRequest(
                f"{place} has no column {name!r}; it has {', '.join(map(repr, present))}. Type {option} with"
                " one of these."
            )
    wanted = [
        name
        for name in dict.fromkeys((columns.text, columns.label, columns.id, columns.split))
        if name is not None and name in present
    ]
    for name in wanted:
        if present.count(name) > 1:
            raise WrongRequest(
                f"{place} has {present.count(name)} columns named {name!r}; rename all but one in its header."
            )
    return wanted


def _in_order(batch: Any, positions: dict[str, str], columns: Columns) -> tuple[Any, Any, Any, Any]:
    """Text, label, split and id as binary arrays."""
    text, label, split, key = (
        _binary(batch.column(positions[name])) if name in positions else None
        for name in (columns.text, columns.label, columns.split, columns.id)
    )
    return text, label, split, key


def _without_blank_lines(batch: Batch) -> Batch:
    present = [
        column for column in (batch.texts, batch.labels, batch.splits, batch.ids) if column is not None
    ]
    filled_N = np.logical_or.reduce(
        [pc.binary_length(column).to_numpy(zero_copy_only=False) > 0 for column in present]
    )
    return batch if filled_N.all() else _filtered(batch, filled_N)


def _filtered(batch: Batch, keep_N: Any) -> Batch:
    keep = pa.array(keep_N)
    texts, labels, splits, ids = (
        None if column is None else column.filter(keep)
        for column in (batch.texts, batch.labels, batch.splits, batch.ids)
    )
    return Batch(batch.file, batch.rows_N[keep_N], texts, labels, splits, ids, batch.broken)


# JSON Lines


def _read_jsonl(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    line_number = 0
    with (
        pa.input_stream(str(file.path), compression="detect") as stream,
        io.BufferedReader(stream, 1 << 20) as lines,
    ):
        if lines.peek(1)[:1] == b"[":
            raise WrongRequest(
                f"{file.path} is one JSON array, not JSON Lines; convert it with `jq -c '.[]' {file.path} >"
                " posts.jsonl`."
            )
        while block := lines.readlines(_BLOCK_BYTES):
            rows: list[int] = []
            posts: list[dict[str, Any]] = []
            broken: list[tuple[str, int]] = []
            for line in block:
                line_number += 1
                try:
                    post = json.loads(line) if line.strip() else None
                except UnicodeDecodeError:
                    broken.append(("undecodable", line_number))
                    continue
                except (ValueError, RecursionError):
                    broken.append(("broken_json", line_number))
                    continue
                if isinstance(post, dict):
                    rows.append(line_number)
                    posts.append(post)
                elif line.strip():
                    broken.append(("broken_json", line_number))
            if line_number == len(block) and posts:
                _wanted(columns, list(dict.fromkeys(key for post in posts for key in post)), str(file.path))
            broken += [
                ("not_text", row)
                for row, post in zip(rows, posts, strict=True)
                if not isinstance(post.get(columns.text, ""), str | None)
            ]
            texts = [text if isinstance(text := post.get(columns.text), str) else None for post in posts]
            has_split = any(columns.split in post for post in posts)
            yield _without_wrong_type(
                Batch(
                    number,
                    np.array(rows, np.int64),
                    _encoded(texts),
                    _encoded([_joined(post.get(columns.label)) for post in posts]),
                    _encoded([_joined(post.get(columns.split)) for post in posts]) if has_split else None,
                    _encoded([_joined(post.get(columns.id)) for post in posts]) if columns.id else None,
                    tuple(broken),
                )
            )


def _without_wrong_type(batch: Batch) -> Batch:
    """Leave out the rows that are already reported as `not_text`."""
    wrong = [row for kind, row in batch.broken if kind == "not_text"]
    return _filtered(batch, ~np.isin(batch.rows_N, wrong)) if wrong else batch


def _joined(value: Any) -> str | None:
    """A label as text: of a list its only item, or all of them with `SEVERAL` between."""
    if isinstance(value, list):
        return SEVERAL.join(map(str, value)) if value else None
    return None if value is None else str(value)


def _encoded(values: list[str | None]) -> Any:
    """UTF-8; lone surrogates, which JSON can spell, stay as their three bytes for the cleaner to
    find.
    """
    return pa.array(
        [None if value is None else value.encode("utf-8", "surrogatepass") for value in values], pa.binary()
    )


# Parquet and the hub


def _read_parquet(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as parquet:
            wanted = _wanted(columns, parquet.schema_arrow.names, str(file.path))
            yield from _read_arrow(
                number,
                parquet.iter_batches(_BATCH_ROWS, columns=wanted, use_threads=False),
                columns,
                str(file.path),
            )
    except pa.ArrowInvalid as error:
        raise WrongRequest(
            f"{file.path} is not a whole Parquet file ({str(error)[:80]}); copy it again, or give another"
            " SOURCE."
        ) from None


def _read_arrow(number: int, tables: Any, columns: Columns, place: str) -> Iterator[Batch]:
    following = 1
    for table in tables:
        wanted = _wanted(columns, table.schema.names, place)
        kind = _value_type(table.column(columns.text))
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise WrongRequest(
                f"Column {columns.text!r} of {place} holds {kind}, not text; type --text-column with another."
            )
        rows_N = np.arange(following, following + len(table))
        following += len(table)
        for name in wanted:
            if not _spelled_out(table.column(name)):
                option = {columns.label: "--label-column", columns.id: "--id-column"}.get(name)
                remedy = f"type {option} with another" if option else "rename it, or make it text"
                raise WrongRequest(
                    f"Column {name!r} of {place} holds {table.column(name).type}, neither text nor numbers;"
                    f" {remedy}."
                )
        yield Batch(number, rows_N, *_in_order(table, {name: name for name in wanted}, columns))


def _value_type(column: Any) -> Any:
    return column.type.value_type if pa.types.is_dictionary(column.type) else column.type


def _spelled_out(column: Any) -> bool:
    """Whether `_binary` has an answer for a column of this type."""
    try:
        _binary(column.slice(0, 0))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return False
    return True


def _binary(column: Any) -> Any:
    """Any column as one binary array; lists are joined with `SEVERAL`, numbers spelled out."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _encoded([_joined(value) for value in column.to_pylist()])
    if (
        pa.types.is_binary(column.type)
        or pa.types.is_large_binary(column.type)
        or pa.types.is_binary_view(column.type)
    ):
        return column.cast(pa.binary())
    return column.cast(pa.string()).cast(pa.binary())


def _names_in_parquet(file: PostFile, columns: Columns) -> tuple[str, ...] | None:
    """Class names that `datasets` keeps in the metadata of its Parquet files."""
    import pyarrow.parquet as pq

    if file.format != "parquet":
        return None
    try:
        metadata = pq.read_schema(file.path).metadata or {}
        feature = (
            json.loads(metadata.get(b"huggingface", b"{}"))
            .get("info", {})
            .get("features", {})
            .get(columns.label, {})
        )
    except (pa.ArrowInvalid, ValueError, AttributeError):
        return None  # a broken file is reported where it is read
    names = (
        feature.get("names") or (feature.get("feature") or {}).get("names")
        if isinstance(feature, dict)
        else None
    )
    return tuple(names) if names else None


def _open_hub(name: str, columns: Columns, subset: str | None) -> Source:
    try:
        import datasets
    except ImportError:
        raise WrongRequest(
            f"There is no file or folder {name}; to fetch a hub data set of that name type `pip install"
            " datasets` first."
        ) from None
    try:
        splits = datasets.load_dataset(name, subset)
    except Exception as error:  # the hub client raises errors of many families
        reason = " ".join(str(error).split())[:200]
        if "onfig name is missing" in reason:
            raise WrongRequest(
                f"The hub data set {name} has several subsets; type --subset with one of them ({reason})."
            ) from None
        raise WrongRequest(
            f"There is no file or folder {name}, and no hub data set of that name could be loaded"
            f" ({type(error).__name__}: {reason}). Check the name and the network, or give a CSV, JSONL or"
            " Parquet file."
        ) from None
    files = tuple(
        PostFile(split, split_of(re.split(r"[^A-Za-z]", split)[0]), None, "hub") for split in splits
    )
    unknown = [file.name for file in files if file.split is None]
    if unknown:
        raise WrongRequest(
            f"The hub data set {name} has split {unknown[0]!r}; allowed are train, validation and test. Save"
            " the ones you want as Parquet."
        )
    features = next(iter(splits.values())).features
    for file in files:
        _wanted(columns, list(features), f"{name} ({file.name})")
    feature = features[columns.label]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    size = sum(split.data.nbytes for split in splits.values())
    return Source(
        name if subset is None else f"{name}:{subset}",
        files,
        size,
        columns,
        tuple(names) if names else None,
        splits,
    )
