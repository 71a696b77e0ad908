"""Row groups of a split, fetched ahead of use by one ranged GET each.

Each row group is compared with its entry in the index: its number of posts, and its label counts,
which the class weights came from. Each process reads the whole split, since it needs the lengths of
all posts of a step: 64 ranks on one node read it 64 times from the store's cache. Memory holds the
row groups of the lanes in use, of one step, and those read ahead, whatever the size of the split.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from emotion_train.data.index import DataObject, RowGroup, Split, differ
from emotion_train.data.targets import KNOWN, SOURCE, WEIGHT, Target, kept_name
from emotion_train.edges.bounded import Unreadable, parquet_errors
from emotion_train.errors import ObjectChanged, StorageError, WrongRequest
from emotion_train.storage.patience import Patience, until_it_answers
from emotion_train.storage.seekable import SeekableFile
from emotion_train.storage.store import Store

log = logging.getLogger(__name__)

# one label per post in `label`, or several in `labels`, with or without `shares`
COLUMNS = ("id", "text", "label", "labels", "shares", WEIGHT, SOURCE, KNOWN)
MAX_UNPACKED_BYTES = 8 << 30  # of one row group


class Rows(NamedTuple):
    """The posts of one row group. A text or target that the file lacks is None. A source is empty
    for a real post, and a kept value is empty where a post has none. `known` is the number of an
    auxiliary post's source in the index, 0 for other posts.
    """

    ids: list[str]
    texts: list[str | None]
    targets: list[Target | None]
    weights: list[float]
    sources: list[str]
    kept: list[tuple[str, ...]]  # values of the columns that were asked for
    known: list[int]

    def first_of_each(self, label_counts: Sequence[float]) -> Rows:
        """The first posts of each label, as many as `label_counts` says, in their order; only for
        posts with one label.
        """
        left = list(label_counts)
        kept = []
        for row, target in enumerate(self.targets):
            if target is not None and left[target[0][0]] > 0:
                left[target[0][0]] -= 1
                kept.append(row)
        return self._take(kept)

    def first(self, rows: int) -> Rows:
        """The first `rows` posts."""
        return self._take(range(rows))

    def _take(self, rows: Iterable[int]) -> Rows:
        return Rows(*([column[row] for row in rows] for column in self))  # type: ignore[arg-type]


class RowGroupReader:
    """Reads row groups by number, and keeps `capacity` of them. Use `close` or a with statement to
    stop its threads.

    Once a store's own retries have failed, the store is asked again for `patience_s` seconds.
    """

    def __init__(
        self,
        store: Store,
        split: Split,
        capacity: int = 160,
        threads: int = 8,
        patience_s: float = 0.0,
        kept: Sequence[str] = (),
    ) -> None:
        self._store = store
        self._split = split
        self.capacity = capacity
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="row-group")
        self._cache: OrderedDict[int, Future[Rows]] = OrderedDict()
        self._footers: dict[int, Future[Any]] = {}
        self._changed_noted = False
        self._patience_s = patience_s
        self._kept = tuple(map(kept_name, kept))
        self._closed = threading.Event()
        self._telling = Patience()  # of all row groups together

    def __enter__(self) -> RowGroupReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def make_room(self, groups: int) -> None:
        """Keep at least `groups` row groups from now on."""
        self.capacity = max(self.capacity, groups)

    def ask(self, groups: Iterable[int]) -> None:
        """Start fetching row groups that will be needed soon."""
        for group in groups:
            self._future(group)

    def rows(self, group: int) -> Rows:
        """The posts of a row group; waits for it unless it was fetched already.

        Raises `WrongRequest` when the stored bytes are no longer those of the index, or hold other
        posts or label counts than the index says.
        """
        return self._future(group).result()

    def _future(self, group: int) -> Future[Rows]:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        number = self._split.row_groups[group].object
        if number not in self._footers:
            self._footers[number] = self._pool.submit(self._read_footer, number)
        self._cache[group] = self._pool.submit(
            self._read, self._split.row_groups[group], self._footers[number]
        )
        while len(self._cache) > self.capacity:
            self._cache.popitem(last=False)
        return self._cache[group]

    def _read_footer(self, number: int) -> Any:
        import pyarrow.parquet as pq

        described = self._split.objects[number]
        start = described.bytes - described.footer_bytes
        raw = self._fetch(
            described.key, described.etag, start, described.footer_bytes, described.footer_sha256
        )
        try:
            with parquet_errors():
                # the parser wants the file's first bytes too, and reads nothing in between
                return pq.read_metadata(io.BytesIO(b"PAR1" + raw))
        except Unreadable as error:
            raise self._not_as_described(described, f"its footer cannot be read ({error})") from None

    def _read(self, group: RowGroup, footer: Future[Any]) -> Rows:
        import pyarrow.parquet as pq

        described = self._split.objects[group.object]
        raw = self._fetch(described.key, described.etag, group.start, group.length, group.sha256)
        metadata = footer.result()
        try:
            _refuse_other_group(metadata, group.stored)
            with parquet_errors():
                file = pq.ParquetFile(
                    _OneRange(group.start, raw, described.bytes), metadata=metadata, pre_buffer=False
                )
                names = [name for name in (*COLUMNS, *self._kept) if name in file.schema_arrow.names]
                table = file.read_row_group(group.ordinal, columns=names, use_threads=False)
                columns = {name: table.column(name).to_pylist() for name in names}
                rows = _rows_of(columns, self._kept)
            _refuse_other_counts(rows, group.stored)
        except Unreadable as error:
            raise self._not_as_described(described, f"of row group {group.ordinal} {error}") from None
        if group.rows == group.stored.rows:
            return rows
        return rows.first_of_each(group.label_counts) if "label" in columns else rows.first(group.rows)

    def _not_as_described(self, described: DataObject, why: str) -> WrongRequest:
        return WrongRequest(
            f"{self._store.url_of(described.key)} is not what index.json describes: {why}. The index or the"
            " object was edited or damaged; prepare the data again into an empty prefix and start a new run."
        )

    def _fetch(self, key: str, etag: str | None, start: int, length: int, sha256: str) -> bytes:
        """A byte range, checked by the index's sha256."""

        def verify(raw: bytes) -> bytes:
            if hashlib.sha256(raw).hexdigest() != sha256:
                raise WrongRequest(
                    f"{self._store.url_of(key)} is not what index.json describes (bytes {start} to"
                    f" {start + length}): the data set was changed or damaged after it was prepared. Prepare"
                    " it again into an empty prefix and start a new run."
                )
            return raw

        try:
            return self._read_patiently(key, start, length, etag, verify)
        except ObjectChanged:
            raw = self._read_patiently(key, start, length, None, verify)
        if etag is not None and not self._changed_noted:
            self._changed_noted = True
            log.warning(
                "%s was written again since the data set was prepared; its bytes are the same",
                self._store.url_of(key),
            )
        return raw

    def _read_patiently(
        self, key: str, start: int, length: int, etag: str | None, verify: Callable[[bytes], bytes]
    ) -> bytes:
        return until_it_answers(
            lambda: self._store.read_verified(key, verify, start=start, length=length, if_match=etag),
            Patience(self._patience_s),
            self._closed.wait,
            self._tell,
        )

    def _tell(self, error: StorageError) -> None:
        if self._telling.may_tell():
            log.warning("The run waits for its data: %s", error)


def sample_texts(store: Store, split: Split, least: int, patience_s: float = 0.0) -> list[str]:
    """Texts of the first row groups, at least `least` if the split has so many. A data set is
    shuffled as a whole, so its first texts are a sample.
    """
    texts: list[str] = []
    with RowGroupReader(store, split, patience_s=patience_s) as reader:
        for group in range(len(split.row_groups)):
            texts += [text for text in reader.rows(group).texts if text]
            if len(texts) >= least:
                break
    return texts


def kept_values(
    store: Store, split: Split, columns: Sequence[str], patience_s: float = 0.0
) -> dict[str, dict[str, str]]:
    """The values of kept columns by column and id. Equal values are one string in memory."""
    by_column: dict[str, dict[str, str]] = {column: {} for column in columns}
    if not columns:
        return by_column
    same: dict[str, str] = {}
    with RowGroupReader(store, split, capacity=16, patience_s=patience_s, kept=columns) as reader:
        for group in range(len(split.row_groups)):
            reader.ask(range(group, min(group + 8, len(split.row_groups))))
            rows = reader.rows(group)
            for post, values in zip(rows.ids, rows.kept, strict=True):
                for column, value in zip(columns, values, strict=True):
                    by_column[column][post] = same.setdefault(value, value)
    return by_column


def texts_of(store: Store, split: Split, ids: Collection[str], patience_s: float = 0.0) -> dict[str, str]:
    """The texts of these posts by id. The split is read once more, without keeping other texts."""
    texts: dict[str, str] = {}
    if not ids:
        return texts
    with RowGroupReader(store, split, capacity=16, patience_s=patience_s) as reader:
        for group in range(len(split.row_groups)):
            reader.ask(range(group, min(group + 8, len(split.row_groups))))
            rows = reader.rows(group)
            pairs = zip(rows.ids, rows.texts, strict=True)
            texts |= {post: text for post, text in pairs if post in ids and text is not None}
    return texts


def _refuse_other_group(metadata: Any, group: RowGroup) -> None:
    """Raises `Unreadable`, before unpacking, for a row group of another size than in the index."""
    if group.ordinal >= metadata.num_row_groups:
        raise Unreadable(f"there is none, the object has {metadata.num_row_groups}")
    described = metadata.row_group(group.ordinal)
    if described.num_rows != group.rows:
        raise Unreadable(f"the index says {group.rows} posts, and there are {described.num_rows}")
    if not 0 <= described.total_byte_size <= MAX_UNPACKED_BYTES:
        raise Unreadable(f"the posts would take {described.total_byte_size:,} bytes of memory")


def _rows_of(columns: dict[str, list[Any]], kept: Sequence[str] = ()) -> Rows:
    """The posts in columns of a row group. Raises `Unreadable` for posts without labels, and for
    weights, sources or numbers out of range.
    """
    if "label" in columns:
        one = {label: ((label, 1.0),) for label in set(columns["label"]) if label is not None}
        targets: list[Target | None] = [one.get(label) for label in columns["label"]]
    elif "labels" in columns:
        shares = columns.get("shares") or [[1.0] * len(labels or ()) for labels in columns["labels"]]
        targets = [
            None if labels is None or of_labels is None else tuple(zip(labels, of_labels, strict=False))
            for labels, of_labels in zip(columns["labels"], shares, strict=True)
        ]
    else:
        raise Unreadable("the posts have no labels")
    weights = columns.get(WEIGHT) or [1.0] * len(targets)
    if not all(isinstance(weight, float) and 0 < weight < math.inf for weight in weights):
        raise Unreadable("a post has a weight that is no number above 0")
    sources = columns.get(SOURCE) or [""] * len(targets)
    if not all(isinstance(source, str) for source in sources):
        raise Unreadable("a post has a source that is no text")
    known = columns.get(KNOWN) or [0] * len(targets)
    if not all(isinstance(source, int) and source >= 0 for source in known):
        raise Unreadable("an auxiliary post names no source")
    none = [""] * len(targets)
    values = [[value or "" for value in columns.get(name) or none] for name in kept]
    along = list(zip(*values, strict=True)) if values else [()] * len(targets)
    return Rows(columns["id"], columns["text"], targets, weights, sources, along, known)


def _refuse_other_counts(rows: Rows, group: RowGroup) -> None:
    """Raises `Unreadable` unless each label has as many posts, or shares, as the index says."""
    counts: Counter[int | None] = Counter()
    real: Counter[int | None] = Counter()
    for target, source in zip(rows.targets, rows.sources, strict=True):
        for label, share in target if target is not None else ((None, 1.0),):
            counts[label] += share  # type: ignore[assignment]
            real[label] += share if not source else 0  # type: ignore[assignment]
    for label, said in enumerate(group.label_counts):
        if differ([found := counts.pop(label, 0)], [said], group.rows):
            raise Unreadable(f"the index says {said:g} posts of label {label}, and there are {found:g}")
        if group.real_counts is not None and differ(
            [own := real.get(label, 0)], [group.real_counts[label]], group.rows
        ):
            raise Unreadable(
                f"the index says {group.real_counts[label]:g} real posts of label {label}, and there are"
                f" {own:g}"
            )
    if counts or len(rows.texts) != group.rows:
        raise Unreadable(f"{sum(counts.values()):g} posts have a label that the index does not name")


class _OneRange(SeekableFile):
    """A read-only file with only one byte range present, for a Parquet reader that reads only
    that.
    """

    def __init__(self, start: int, raw: bytes, size: int) -> None:
        super().__init__(size)
        self._start = start
        self._raw = raw

    def read(self, size: int = -1) -> bytes:
        first = self._at - self._start
        last = len(self._raw) if size < 0 else first + size
        if first < 0 or last > len(self._raw):
            raise OSError(f"bytes {self._at} to {self._start + last} were not fetched")
        self._at += last - first
        return self._raw[first:last]
