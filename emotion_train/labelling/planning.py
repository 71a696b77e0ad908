"""Units of a source: row groups of Parquet files and prepared data sets, byte ranges of text files,
or whole files where a file cannot be cut.

Each worker that finds no job reads the text files once to cut them: about a second per million
posts. A later worker only compares the source's listing with the job's.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emotion_train.data.index import INDEX_KEY, Index, read_index
from emotion_train.edges.bounded import Unreadable, parquet_errors, require_footer
from emotion_train.edges.paths import typed_path
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.labelling.job import Reading, SourceFile, Unit
from emotion_train.sources.json_lines import MOST_DESCRIPTION_BYTES, is_description
from emotion_train.sources.open import (
    DATASETS_FILES,
    STATE,
    format_of,
    is_cache,
    may_hold_posts,
    not_files,
    table_among,
)
from emotion_train.sources.posts import Columns, PostFile
from emotion_train.sources.ranges import Range, ranges_of
from emotion_train.sources.unpacked import HEAD_BYTES
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.ranged_file import RangedFile
from emotion_train.storage.store import ObjectInfo, Store

_CHUNK_BYTES = 8 << 20
_CUT = ("csv", "tsv", "jsonl", "lines")


@dataclass(frozen=True)
class FoundSource:
    """The posts to label: files of a store, or a prepared data set with its `index`."""

    url: str
    store: Store
    files: tuple[SourceFile, ...]
    index: Index | None = None
    passed_over: tuple[str, ...] = ()
    table: str | None = None  # the format of a table that the files belong to

    @property
    def kind(self) -> Any:
        return "files" if self.index is None else "data set"

    @property
    def index_sha256(self) -> str | None:
        return None if self.index is None else self.index.sha256()

    def info(self, number: int) -> ObjectInfo:
        file = self.files[number]
        return ObjectInfo(file.key, file.bytes, file.etag)


def find_source(source: str, reading: Reading) -> FoundSource:
    """The source's files: those of a folder or of a bucket's prefix, one named file, or a prepared
    data set.

    Raises `WrongRequest` where there is nothing to label.
    """
    store, name = _place(source)
    if name is None and store.find(INDEX_KEY) is not None:
        return _data_set(source, store, reading)
    if reading.split is not None:
        raise WrongRequest(f"--split is for a prepared data set, and {source} is none; leave it out.")
    files: list[SourceFile] = []
    passed_over = not_files(store.root) if name is None and isinstance(store, FolderStore) else []
    listed = [info for info in store.list(name or "") if name is None or info.key == name]
    caches = _caches_among(store, listed) if name is None else set()
    for info in listed:
        kind = _format(info.key, alone=name is not None)
        if info.key in caches:
            continue
        if name is None and kind == "jsonl" and _is_description(store, info):
            passed_over.append(info.key)
        elif kind is not None and info.size:
            files.append(
                SourceFile(
                    key=info.key, bytes=info.size, etag=info.etag, format=kind, quoting=reading.quoting
                )
            )
        elif not _is_hidden(info.key) and may_hold_posts(info.key):
            passed_over.append(info.key)
    passed_over = sorted(set(passed_over))
    if not files:
        if name is not None and any(info.key == name and not info.size for info in listed):
            raise WrongRequest(f"{source} is empty; give a file with posts.")
        beside = f" (not read: {', '.join(passed_over[:5])})" if passed_over else ""
        raise WrongRequest(
            f"There is no CSV, JSONL or Parquet file at {source}{beside}; give a file, a folder, s3://… of"
            " them, or a prepared data set."
        )
    table = table_among(info.key for info in listed)
    return FoundSource(source, store, tuple(files), passed_over=tuple(passed_over), table=table)


def _place(source: str) -> tuple[Store, str | None]:
    """The store to list, and the name of the single object where the source is one."""
    if re.match(r"(?i)(?!file:)[a-z][a-z0-9+.-]+://", source):
        folder, _, name = source.rstrip("/").rpartition("/")
        if re.fullmatch("(?i)s3://[^/]+(/.*)?", folder) and format_of(Path(name)) is not None:
            return open_store(folder), name
        return open_store(source), None
    store = open_store(source)
    assert isinstance(store, FolderStore)
    path = store.root
    if path.is_file():
        return FolderStore(path.parent), path.name
    if not path.is_dir():
        raise WrongRequest(
            f"There is no file or folder {source}; give one, s3://… or a prepared data set. A data set of the"
            " hub is prepared first: `emotion-train prepare`."
        )
    return FolderStore(typed_path(source) if "://" not in source else path), None


def _is_description(store: Store, info: ObjectInfo) -> bool:
    small = info.key.lower().endswith(".json") and info.size <= MOST_DESCRIPTION_BYTES
    return small and is_description(info.key, store.read(info.key, if_match=info.etag))


def _caches_among(store: Store, listed: Sequence[ObjectInfo]) -> set[str]:
    """The Arrow files that `datasets` keeps beside those of a saved data set."""
    arrow = [info.key for info in listed if info.key.lower().endswith(".arrow")]
    keys = {info.key for info in listed}
    states = {key: f"{key.rpartition('/')[0]}/{STATE}".removeprefix("/") for key in arrow}
    read = {state: store.read(state) for state in set(states.values()) & keys}
    return {key for key in arrow if states[key] in read and is_cache(key, read[states[key]])}


def _is_hidden(key: str) -> bool:
    name = key.rpartition("/")[2]
    return any(part.startswith(".") for part in key.split("/")) or name in DATASETS_FILES


def _format(key: str, *, alone: bool) -> str | None:
    """The format of a file of this name; plain text only where the file itself was named."""
    path = Path(key)
    if any(part.startswith((".", "_")) for part in path.parts) or path.name in DATASETS_FILES:
        return None
    if ".txt" in (suffix.lower() for suffix in path.suffixes):
        return "lines" if alone else None
    return format_of(path) or ("lines" if alone else None)


def _data_set(source: str, store: Store, reading: Reading) -> FoundSource:
    for option, value in (("--columns", reading.columns), ("--id-column", reading.id_column)):
        if value:
            raise WrongRequest(
                f"{source} is a prepared data set, which has ids and no other columns; leave {option} out."
            )
    index = read_index(store)
    if reading.split is not None:
        index.split(reading.split)  # raises for none of that name
    files = tuple(
        SourceFile(key=described.key, bytes=described.bytes, etag=described.etag, format="data set")
        for name, split in index.splits.items()
        if reading.split in (None, name)
        for described in split.objects
    )
    return FoundSource(source, store, files, index)


def plan_units(
    source: FoundSource, reading: Reading, rows_of_a_unit: int
) -> tuple[tuple[SourceFile, ...], tuple[Unit, ...]]:
    """The source's files, with what a plan adds to them, and units of about `rows_of_a_unit` posts.

    Raises `WrongRequest` for a file that cannot be read at all, and for a source without a post.
    """
    files: list[SourceFile] = []
    units: list[Unit] = []
    for number, file in enumerate(source.files):
        if file.format == "data set":
            units += _units_of_split(source, number, rows_of_a_unit)
        elif file.format == "parquet":
            units += _units_of_parquet(source, number, reading, rows_of_a_unit)
        elif file.format in _CUT:
            file, ranges = _units_of_text(source, number, reading, rows_of_a_unit)
            units += ranges
        else:
            units.append(_whole(source, number))
        files.append(file)
    if not units:
        raise WrongRequest(f"The source {source.url} holds no post; give another.")
    return tuple(files), tuple(units)


# --- row groups ---


def split_of(index: Index, key: str) -> tuple[str, int]:
    """The split that an object of a data set belongs to, and its position among its objects."""
    for name, split in index.splits.items():
        for place, described in enumerate(split.objects):
            if described.key == key:
                return name, place
    raise KeyError(key)


def _units_of_split(source: FoundSource, number: int, rows_of_a_unit: int) -> list[Unit]:
    """Units of one object's row groups, which are numbered within the split."""
    assert source.index is not None
    name, place = split_of(source.index, source.files[number].key)
    groups = source.index.split(name).row_groups
    own = [group for group, described in enumerate(groups) if described.object == place]
    return _joined(number, own, [groups[group].rows for group in own], rows_of_a_unit)


def _joined(file: int, groups: Sequence[int], rows: Sequence[int], rows_of_a_unit: int) -> list[Unit]:
    """Units of neighbouring row groups: up to `rows_of_a_unit` rows, at least one row group."""
    units: list[Unit] = []
    first_row = 1
    for group, count in zip(groups, rows, strict=True):
        last = units[-1] if units else None
        if last is not None and last.rows is not None and last.rows + count <= rows_of_a_unit:
            units[-1] = last.model_copy(update={"end": group + 1, "rows": last.rows + count})
        elif count:
            units.append(Unit(file=file, start=group, end=group + 1, first_row=first_row, rows=count))
        first_row += count
    return units


def _units_of_parquet(source: FoundSource, number: int, reading: Reading, rows_of_a_unit: int) -> list[Unit]:
    url = source.store.url_of(source.files[number].key)
    with opened_parquet(source, number) as parquet:
        columns_of(reading).among(parquet.schema_arrow.names, url)
        meta = parquet.metadata
        rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
    summed = {"sha256": footer_sha256(source, number)}
    return [one.model_copy(update=summed) for one in _joined(number, range(len(rows)), rows, rows_of_a_unit)]


def footer_sha256(source: FoundSource, number: int) -> str | None:
    """The digest of a Parquet file's footer, which has the place, size and range of values of each
    column chunk; None where the store gives an ETag to read the file by.
    """
    info = source.info(number)
    if info.etag is not None:
        return None
    tail = source.store.read(info.key, start=max(0, info.size - 8), length=8)
    length = int.from_bytes(tail[:4], "little")
    footer = source.store.read(info.key, start=max(0, info.size - 8 - length), length=length)
    return hashlib.sha256(footer).hexdigest()


@contextmanager
def opened_parquet(source: FoundSource, number: int) -> Iterator[Any]:
    """An open `pyarrow.parquet.ParquetFile` over ranges of the object. Damage found on opening, or
    while the block reads it, raises `WrongRequest`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    info, url = source.info(number), source.store.url_of(source.files[number].key)
    failures: list[StorageError] = []
    try:
        tail = source.store.read(info.key, start=max(0, info.size - 8), length=8, if_match=info.etag)
        require_footer(tail, info.size)
        with (
            parquet_errors(),
            pa.PythonFile(_Remembering(source.store, info, failures), "r") as file,
            pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet,
        ):
            yield parquet
    except Unreadable as error:
        if failures:
            raise failures[0] from None
        raise WrongRequest(
            f"{url} is not a whole Parquet file ({str(error)[:80]}); copy it again, or give another SOURCE."
        ) from None


class _Remembering(RangedFile):
    """A ranged file that keeps the store's errors, which pyarrow replaces by its own."""

    def __init__(self, store: Store, info: ObjectInfo, failures: list[StorageError]) -> None:
        super().__init__(store, info)
        self._failures = failures

    def _fetch(self, least: int) -> None:
        try:
            super()._fetch(least)
        except StorageError as error:
            self._failures.append(error)
            raise OSError(str(error)) from error


# --- text ---


def columns_of(reading: Reading) -> Columns:
    return Columns(reading.text_column, None, reading.id_column, None, reading.columns)


def _units_of_text(
    source: FoundSource, number: int, reading: Reading, rows_of_a_unit: int
) -> tuple[SourceFile, list[Unit]]:
    file = source.files[number]
    url = source.store.url_of(file.key)
    with tempfile.TemporaryDirectory(prefix="emotion-train-label-") as folder:
        head = Path(folder, Path(file.key).name)
        head.write_bytes(source.store.read(file.key, length=HEAD_BYTES + 1, if_match=file.etag))
        post_file = PostFile(file.key, None, head, file.format, reading.encoding, reading.quoting)
        with naming(head, url):
            chunks = _chunks(source.store, source.info(number))
            ranges = ranges_of(post_file, chunks, columns_of(reading), rows_of_a_unit)
    if ranges is None:
        return file, [_whole(source, number)]
    planned = file.model_copy(
        update={
            "before": ranges.before.decode("latin-1"),
            "row_after": ranges.row_after,
            "quoting": ranges.quoting,
        }
    )
    return planned, [_unit(number, piece) for piece in ranges.pieces]


def _whole(source: FoundSource, number: int) -> Unit:
    """The whole file as a unit; with its sha256 where the store gives no ETag to read it by."""
    if source.files[number].etag is not None:
        return Unit(file=number)
    summed = hashlib.sha256()
    for chunk in _chunks(source.store, source.info(number)):
        summed.update(chunk)
    return Unit(file=number, sha256=summed.hexdigest())


def _unit(number: int, piece: Range) -> Unit:
    return Unit(
        file=number,
        start=piece.start,
        end=piece.end,
        first_row=piece.first_row,
        rows=piece.rows,
        sha256=piece.sha256,
    )


def _chunks(store: Store, info: ObjectInfo) -> Iterator[bytes]:
    for start in range(0, info.size, _CHUNK_BYTES):
        yield store.read(info.key, start=start, length=_CHUNK_BYTES, if_match=info.etag)


@contextmanager
def naming(path: Path, url: str) -> Iterator[None]:
    """Errors raised in the block name the source's `url` instead of the copy that was read."""
    try:
        yield
    except WrongRequest as error:
        raise WrongRequest(str(error).replace(str(path), url)) from None


def with_plan(source: FoundSource, files: Sequence[SourceFile]) -> FoundSource:
    """The source with its files as the job's plan describes them."""
    return replace(source, files=tuple(files))
