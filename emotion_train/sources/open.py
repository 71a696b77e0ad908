"""Finds the files of a source (a file, a folder, a prefix of a bucket, a data set of the Hugging
Face hub) and reads them one after the other.

Memory holds a few MiB of a file at a time. Objects of a bucket are first copied to a temporary
folder (TMPDIR).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from emotion_train.console import counted
from emotion_train.edges import hub
from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.edges.paths import typed_path
from emotion_train.errors import WrongRequest
from emotion_train.sources.arrow_columns import (
    label_names,
    names_of_feature,
    read_arrow_file,
    read_parquet,
    read_tables,
    schema_of,
)
from emotion_train.sources.delimited import read_delimited
from emotion_train.sources.json_lines import (
    MOST_DESCRIPTION_BYTES,
    is_description,
    read_json_lines,
)
from emotion_train.sources.plain_lines import mapped_names, read_line_pairs, read_lines
from emotion_train.sources.posts import BATCH_ROWS, UTF8, Batch, Columns, PostFile, Quoting, split_of
from emotion_train.sources.unpacked import UNREADABLE, checked_encoding
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import checked_key

FORMATS = ("csv", "tsv", "jsonl", "parquet", "arrow", "hub")
READERS = {
    "csv": read_delimited,
    "tsv": read_delimited,
    "jsonl": read_json_lines,
    "parquet": read_parquet,
    "arrow": read_arrow_file,
    "pair": read_line_pairs,
    "lines": read_lines,
}
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_PACKED = (".gz", ".bz2", ".zst", ".xz")
# Data in forms that are not read: named in messages where a source has them
OTHER_DATA = (
    *(".xlsx", ".xls", ".ods", ".zip", ".7z", ".tar", ".tgz", ".rar"),
    *(".feather", ".pkl", ".pickle", ".h5", ".db", ".avro", ".orc", ".lz4", ".sz", ".snappy", ".br", ".lzma"),
)
# What `datasets` writes beside its tables
STATE = "state.json"  # lists the Arrow files beside it
DATASETS_FILES = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", STATE)
# Files without an ending that hold no posts; others may, as parts of Hadoop and Firehose do
_NO_POSTS = ("readme", "license", "licence", "notice", "copying", "authors", "makefile", "dockerfile")
_NAMED = 10
_READ_BYTES = 16 << 20
_NO_HUB = "give a CSV, JSONL or Parquet file"


class Choices(NamedTuple):
    """Choices for reading a source where its files leave them open."""

    format: str | None = None
    subset: str | None = None
    encoding: str = UTF8
    quoting: Quoting = "auto"
    text_file: str | None = None  # with `label_file` in place of a source
    label_file: str | None = None
    header: tuple[str, ...] | None = None  # names of the columns of a CSV or TSV that has no header
    lines: bool = False  # whether a file with another ending holds one post per line


AS_IT_LIES = Choices()


@dataclass(frozen=True)
class Source:
    """The files that posts come from; `bytes` is about how many bytes they hold unpacked. Close it
    when all is read.
    """

    name: str
    files: tuple[PostFile, ...]
    bytes: int
    columns: Columns
    passed_over: tuple[str, ...] = ()  # files that look like data and are not read
    hub: Any = None
    copied_to: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def format(self) -> str:
        return self.files[0].format

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """All names of label ids, in the order of the files; None where no file has names."""
        names = tuple(dict.fromkeys(name for file in self.files for name in file.label_names or ()))
        return names or None

    def batches(self) -> Iterator[Batch]:
        """All rows in order; raises `WrongRequest` where a file cannot be read at all."""
        for number, file in enumerate(self.files):
            if file.path is None:
                table = self.hub[file.name]
                columns = self.columns.among(table.column_names, file.name)
                tables = table.with_format("arrow").iter(BATCH_ROWS)
                yield from read_tables(number, tables, columns, file.label_names, file.name)
                continue
            try:
                yield from READERS[file.format](number, file, self.columns)
            except UNREADABLE as error:
                raise WrongRequest(
                    f"{file.path} cannot be read ({error}); check the file, or give another SOURCE."
                ) from error

    def close(self) -> None:
        """Remove the copies of a bucket's objects."""
        if self.copied_to is not None:
            self.copied_to.cleanup()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(source: str | None, columns: Columns, choices: Choices = AS_IT_LIES) -> Source:
    """Find the files of `source`, or the hub's data set of that name.

    Raises `WrongRequest` when there is neither, or when some files of a folder name a split and
    others do not.
    """
    choices = choices._replace(encoding=checked_encoding(choices.encoding))
    if choices.text_file is not None or choices.label_file is not None:
        return _open_pair(source, columns, choices)
    if source is None:
        raise WrongRequest("No SOURCE is given; type a file, a folder, s3://bucket/prefix or a hub name.")
    if re.match("(?i)s3://", source):
        return _open_bucket(source, columns, choices)
    if re.match(r"(?i)(?!file:)[a-z][a-z0-9+.-]+://", source):
        open_store(source)  # raises an error that names the remedy for this scheme
    path = typed_path(source)
    if re.match("(?i)file:", source):
        store = open_store(source)
        assert isinstance(store, FolderStore)
        path = store.root
    if choices.format == "hub" or (
        choices.format is None
        and not path.exists()
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
        and not format_of(path)
    ):
        return _open_hub(source, columns, choices.subset)
    return _open_path(path, source, columns, choices)


def _open_path(path: Path, source: str, columns: Columns, choices: Choices) -> Source:
    passed_over: tuple[str, ...] = ()
    if path.is_dir():
        if _is_prepared(path):
            raise WrongRequest(
                f"{source} is a data set that `emotion-train prepare` wrote: train on it with"
                f" data.url={source} and score it with --data. To prepare it otherwise, give the posts that"
                " it was made of."
            )
        files, passed_over = _files_of_folder(path, choices.format)
    elif path.exists() and not path.is_file():
        raise WrongRequest(
            f"{source} is a pipe or a device, which can be read only once; save the posts to a file and give"
            " that file."
        )
    elif path.exists():
        chosen = choices.format or format_of(path)
        if choices.lines and (chosen is None or ".txt" in map(str.lower, path.suffixes)):
            chosen = "lines"
        if chosen is None:
            raise WrongRequest(
                f"{source} {_OTHER_FILES[path.suffix.lower()]}."
                if path.suffix.lower() in _OTHER_FILES
                else f"{source} has no known ending; type --format with one of {', '.join(FORMATS[:-1])}."
            )
        files = (PostFile(path.name, None, path, chosen),)
    else:
        raise WrongRequest(
            f"There is no file or folder {source}; give a CSV, JSONL or Parquet file, a folder of them, or a"
            " hub name (owner/name)."
        )
    if choices.header and any(file.format not in ("csv", "tsv") for file in files):
        raise WrongRequest(
            f"--header is for CSV and TSV files, and {source} holds other files; leave it out."
        )
    files = tuple(
        _with_names(
            replace(file, encoding=choices.encoding, quoting=choices.quoting, header=choices.header), columns
        )
        for file in files
    )
    size = sum(_unpacked_bytes(file.path) for file in files if file.path)
    return Source(path.resolve().name, files, size, columns, passed_over)


def _with_names(file: PostFile, columns: Columns) -> PostFile:
    """The file with the names of its label ids."""
    if file.format not in ("parquet", "arrow") or columns.label is None:
        return file
    schema = schema_of(file)
    return file if schema is None else replace(file, label_names=label_names(schema, columns))


def _open_pair(source: str | None, columns: Columns, choices: Choices) -> Source:
    text, label = choices.text_file, choices.label_file
    if text is None or label is None or source is not None:
        raise WrongRequest(
            "--text-file and --label-file go together and replace SOURCE; type both and no SOURCE."
        )
    paths = [typed_path(name) for name in (text, label)]
    for path in paths:
        if not path.is_file():
            raise WrongRequest(
                f"There is no file {path}; give --text-file and --label-file, with one post per line."
            )
    names = mapped_names(paths[1].parent / "mapping.txt")
    file = PostFile(paths[0].name, None, paths[0], "pair", choices.encoding, "none", paths[1], names)
    return Source(paths[0].name, (file,), _unpacked_bytes(paths[0]), columns)


def _open_bucket(url: str, columns: Columns, choices: Choices) -> Source:
    """Copy the object, or all objects below the prefix, and read them as files."""
    folder, _, name = url.rstrip("/").rpartition("/")
    alone = bool(re.fullmatch("(?i)s3://[^/]+(/.*)?", folder)) and format_of(Path(name)) is not None
    store = open_store(folder if alone else url)
    objects = [info for info in store.list(name if alone else "") if not alone or info.key == name]
    if not objects:
        raise WrongRequest(f"There is no object at or below {url}; give another SOURCE.")
    copied_to = tempfile.TemporaryDirectory(prefix="emotion-train-source-")
    try:
        for info in objects:
            target = Path(copied_to.name) / "source" / checked_key(info.key)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for start in range(0, info.size, _READ_BYTES):
                    file.write(store.read(info.key, start=start, length=_READ_BYTES, if_match=info.etag))
        path = Path(copied_to.name) / "source"
        opened = _open_path(path / name if alone else path, url, columns, choices)
        return replace(opened, name=url.rstrip("/").rpartition("/")[2], copied_to=copied_to)
    except BaseException:
        copied_to.cleanup()
        raise


def format_of(path: Path) -> str | None:
    """The format of a file of this name, packed or not; None for an unknown ending."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


_SHEET = "is a spreadsheet, which is not read; save the sheet as CSV and give that file"
_OTHER_FILES = {
    ".xlsx": _SHEET,
    ".xls": _SHEET,
    ".ods": _SHEET,
    ".zip": "is an archive, which is not read; unpack it and give the file or folder in it",
}


def _unpacked_bytes(path: Path) -> int:
    return path.stat().st_size * (
        6 if path.suffix.lower() in _PACKED else 3 if path.suffix == ".parquet" else 1
    )


def _is_prepared(folder: Path) -> bool:
    """Whether the folder is a data set that `prepare` wrote, by the schema in its index."""
    index = folder / "index.json"
    return index.is_file() and b'"emotion-train/index/' in index.read_bytes()


def _files_of_folder(folder: Path, format: str | None) -> tuple[tuple[PostFile, ...], tuple[str, ...]]:
    """The files to read, and the names of files that look like data and are not read."""
    chosen: list[PostFile] = []
    passed_over: list[str] = []
    paths = [
        path
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    pairs = _pairs(folder, paths)
    paired = {path for file in pairs for path in (file.path, file.labels)}
    for path in paths:
        name, kind = path.relative_to(folder).as_posix(), format_of(path)
        if path in paired or path.name in DATASETS_FILES or _is_cache(path):
            continue
        plain_text = kind is not None and ".txt" in (suffix.lower() for suffix in path.suffixes)
        if kind == "jsonl" and _is_description(path):
            passed_over.append(name)
        elif kind and not plain_text and (format is None or kind == format):
            chosen.append(PostFile(name, _split_in(name), path, kind))
        elif may_hold_posts(name):
            passed_over.append(name)
    chosen += pairs
    passed_over = sorted({*passed_over, *not_files(folder)})
    if not chosen:
        beside = f" (not read: {', '.join(passed_over[:5])})" if passed_over else ""
        raise WrongRequest(
            f"The folder {folder} holds no CSV, JSONL or Parquet file{beside}; give another SOURCE."
        )
    nameless = [file.name for file in chosen if file.split is None]
    if nameless and len(nameless) < len(chosen):
        raise WrongRequest(
            f"{folder}/{nameless[0]} names no split while other files there do; call it train…, validation…"
            " or test…, or move it away."
        )
    return tuple(chosen), tuple(passed_over)


def _is_description(path: Path) -> bool:
    return path.stat().st_size <= MOST_DESCRIPTION_BYTES and is_description(path.name, path.read_bytes())


def _split_in(name: str) -> str | None:
    words = (_first_word(part) for part in reversed(name.split("/")))
    return next((split for word in words if word and (split := split_of(word))), None)


def _first_word(name: str) -> str:
    return (re.match(r"[a-z]*", name.lower()) or [""])[0]


def _pairs(folder: Path, paths: Sequence[Path]) -> list[PostFile]:
    """Pairs of a text file and its label file, such as train_text.txt and train_labels.txt."""
    pairs = []
    for path in paths:
        if match := re.fullmatch(r"(.*)_text(?:s)?\.txt", path.name, re.IGNORECASE):
            labels = [path.with_name(f"{match[1]}_{word}.txt") for word in ("labels", "label")]
            partner = next((other for other in labels if other in paths), None)
            if partner is not None:
                names = mapped_names(path.with_name("mapping.txt"))
                name = path.relative_to(folder).as_posix()
                pairs.append(PostFile(name, _split_in(name), path, "pair", labels=partner, label_names=names))
    return pairs


def _is_cache(path: Path) -> bool:
    state = path.with_name(STATE)
    try:
        return state.is_file() and is_cache(path.name, state.read_bytes())
    except OSError:
        return False


def is_cache(name: str, state: bytes) -> bool:
    """Whether an Arrow file is a cache of `datasets`: the `state` beside it does not list it."""
    if not name.lower().endswith(".arrow"):
        return False
    try:
        listed = [item.get("filename") for item in object_in(state).get("_data_files", [])]
    except (Unreadable, AttributeError, TypeError):
        return False
    return name.rpartition("/")[2] not in listed


def may_hold_posts(key: str) -> bool:
    """Whether a person should hear of a file that is not read: one of its endings is that of data
    (posts.csv.bak), it has none, or its first word names a split.
    """
    name = key.rpartition("/")[2]
    endings = {suffix.lower().rstrip("~") for suffix in Path(name).suffixes}
    if not endings:
        return not name.startswith("_") and name.lower() not in _NO_POSTS
    known = {*_SUFFIXES, *_PACKED, *OTHER_DATA}
    return not known.isdisjoint(endings) or split_of(_first_word(name)) is not None


def table_among(keys: Iterable[str]) -> str | None:
    """The name of the format where these files are a table's whose Parquet files may also hold rows
    that the table has deleted or written anew; None for plain files.
    """
    for key in keys:
        folders = key.split("/")[:-1]
        if "_delta_log" in folders:
            return "Delta Lake"
        if ".hoodie" in folders:
            return "Hudi"
        if key.endswith(".metadata.json") and folders[-1:] == ["metadata"]:
            return "Iceberg"
    return None


def not_files(folder: Path) -> list[str]:
    """What a reader of the folder passes over because it is no file: links to folders, links that
    lead nowhere, pipes.
    """
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(where, name) for name in (*folders, *names) if not name.startswith(".")]
        found += [path for path in paths if not path.is_file() and (path.is_symlink() or not path.is_dir())]
    return [path.relative_to(folder).as_posix() for path in found]


def not_read(names: Sequence[str]) -> list[str]:
    """Lines on files that are not read, the first by name and the others by their number."""
    more = len(names) - _NAMED
    lines = [f"not read: {name}" for name in names[:_NAMED]]
    return [*lines, f"not read: {counted(more, 'more file')}"] if more > 0 else lines


def _open_hub(name: str, columns: Columns, subset: str | None) -> Source:
    if find_spec("datasets") is None:
        raise WrongRequest(
            f"There is no file or folder {name}; to fetch a hub data set of that name type `pip install"
            " datasets` first."
        )
    splits = _splits_of_hub(name, subset)
    files = tuple(
        PostFile(split, split_of(re.split(r"[^A-Za-z]", split)[0]), None, "hub") for split in splits
    )
    unknown = [file.name for file in files if file.split is None]
    if unknown:
        raise WrongRequest(
            f"The hub data set {name} has split {unknown[0]!r}; allowed are train, validation and test. Save"
            " the ones you want as Parquet."
        )
    for file in files:
        columns.among(list(splits[file.name].features), f"{name} ({file.name})")
    size = sum(split.data.nbytes for split in splits.values())
    named = tuple(
        replace(file, label_names=_hub_names(splits[file.name].features, columns)) for file in files
    )
    return Source(name if subset is None else f"{name}:{subset}", named, size, columns, hub=splits)


def _splits_of_hub(name: str, subset: str | None) -> Any:
    """The hub's data set, or the copy in the cache of `datasets` where the hub does not answer. The
    hub is asked first, because `datasets` takes seconds to load and retries for a minute.
    """
    away: Exception | None = None
    try:
        hub.require_dataset(name)
    except Exception as error:  # the hub's client raises errors of many families
        if not hub.has_dataset_in_cache(name):
            raise hub.refusal(error, "data set", name, _NO_HUB) from None
        away = error

    import datasets

    datasets.logging.set_verbosity_error()  # lines about retries
    try:
        with hub.offline(datasets.config) if away is not None else nullcontext():
            return datasets.load_dataset(name, subset)
    except Exception as error:  # as above
        if away is not None:
            raise hub.refusal(away, "data set", name, _NO_HUB) from None
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


def _hub_names(features: Any, columns: Columns) -> tuple[str, ...] | None:
    label = columns.among(list(features), "").label
    return names_of_feature(features[label]) if label is not None else None
