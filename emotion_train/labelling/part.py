"""A part: the labels of one unit as a Parquet object that is created once. The first writer wins,
so the job's parts hold each post exactly once, whichever worker dies when.

Rows go to a temporary file as they come, so memory does not grow with a unit.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from emotion_train.edges.bounded import Unreadable, object_in, parquet_file, phrase
from emotion_train.errors import Damaged
from emotion_train.evaluation.decision import Decision
from emotion_train.labelling.job import Job, Unit
from emotion_train.labelling.rows import Rows
from emotion_train.sources.posts import names_beside
from emotion_train.storage.document import FrozenModel
from emotion_train.storage.store import ObjectInfo, Store

Probabilities = npt.NDArray[np.float32]

FACTS = b"emotion_train"
_GROUP_ROWS = 65_536
_READ_BYTES = 16 << 20
OWN = ("file", "row", "id", "label", "labels", "probability", "probabilities", "accepted", "error")


class PartFacts(FrozenModel):
    """A part's own facts, stored in its footer. `seconds` is the worker's time since its part
    before, or since its start.
    """

    schema_version: Literal["emotion-train/label-part/1"] = "emotion-train/label-part/1"
    job: str
    unit: int
    rows: int
    blank: int
    errors: int
    seconds: float
    worker: str
    device: str
    usd_per_hour: float | None = None


class PartWriter:
    """Writes a unit's part into a file; a context manager that closes and deletes the file."""

    def __init__(self, path: Path, job: Job, unit: int, decision: Decision) -> None:
        import pyarrow.parquet as pq

        self._path = path
        self._job = job
        self._unit = unit
        self._decision = decision
        self._file = job.files[job.units[unit].file].key
        self._schema = part_schema(job)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[Any] = []
        self.rows = self.blank = self.errors = 0

    def add(self, rows: Rows, prob_NC: Probabilities) -> None:
        """Append rows in their order, and the probabilities of those that have a text."""
        import pyarrow as pa

        self.rows += len(rows)
        self.blank += rows.blank
        self.errors += sum(error is not None for error in rows.errors)
        if len(rows):
            self._waiting.append(pa.record_batch(self._columns(rows, prob_NC), schema=self._schema))
        if sum(map(len, self._waiting)) >= _GROUP_ROWS:
            self._flush()

    def close(self, facts: PartFacts) -> None:
        """Write the waiting rows and the facts, and end the file."""
        self._flush()
        self._writer.add_key_value_metadata({FACTS: facts.model_dump_json().encode()})
        self._writer.close()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.close()
        self._path.unlink(missing_ok=True)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting), _GROUP_ROWS)
        self._waiting = []

    def _columns(self, rows: Rows, prob_NC: Probabilities) -> list[Any]:
        import pyarrow as pa

        good_N = np.array([text is not None for text in rows.texts], bool)
        slots = pa.array(np.where(good_N, np.cumsum(good_N) - 1, 0), mask=~good_N)

        def spread(column: Any) -> Any:
            """The column of rows with a text extended to all rows: null where there is no text."""
            return column.take(slots) if len(column) else pa.nulls(len(rows), column.type)

        columns: list[Any] = [pa.array([self._file] * len(rows)), pa.array(rows.numbers, pa.int64())]
        if "id" in self._schema.names:
            columns.append(pa.array(rows.ids or [None] * len(rows), pa.string()))
        columns += [pa.array(column, pa.string()) for column in rows.kept]
        answers, own = _answers(self._decision, self._job, prob_NC)
        columns += [spread(answers), spread(own)]
        if self._job.probabilities:
            columns.append(spread(_lists(prob_NC.reshape(-1), np.full(len(prob_NC), prob_NC.shape[1]))))
        if self._job.accept_precision is not None:
            accepted_N = self._decision.accepted(prob_NC, self._job.accept_precision)
            columns.append(spread(pa.array(accepted_N)))
        columns.append(pa.array(rows.errors, pa.string()))
        return columns


def part_schema(job: Job) -> Any:
    """The columns of the job's parts."""
    import pyarrow as pa

    several = job.targets == "several"
    with_id = job.kind == "data set" or job.reading.id_column is not None
    fields = [("file", pa.string()), ("row", pa.int64())]
    fields += [("id", pa.string())] if with_id else []
    fields += [(name, pa.string()) for name in names_beside(job.reading.columns, OWN)]
    fields += [
        ("labels", pa.list_(pa.string())) if several else ("label", pa.string()),
        ("probability", pa.list_(pa.float32()) if several else pa.float32()),
    ]
    fields += [("probabilities", pa.list_(pa.float32()))] if job.probabilities else []
    fields += [("accepted", pa.bool_())] if job.accept_precision is not None else []
    fields += [("error", pa.string())]
    return pa.schema(fields, metadata={b"labels": json.dumps(job.labels).encode()})


def _answers(decision: Decision, job: Job, prob_NC: Probabilities) -> tuple[Any, Any]:
    """The posts' labels and their probabilities; lists where a post may have several."""
    import pyarrow as pa

    names = pa.array(job.labels, pa.string())
    if job.targets != "several":
        label_N = prob_NC.argmax(axis=1) if len(prob_NC) else np.zeros(0, np.int64)
        return names.take(pa.array(label_N)), pa.array(prob_NC[np.arange(len(prob_NC)), label_N])
    ranked = decision.ranked(prob_NC)
    counts_N = np.array([len(labels) for labels in ranked], np.int64)
    label_P = np.array([label for labels in ranked for label in labels], np.int64)
    prob_P = prob_NC[np.repeat(np.arange(len(ranked)), counts_N), label_P]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts_N)]), pa.int32())
    given = pa.ListArray.from_arrays(offsets, names.take(pa.array(label_P)))
    return given, _lists(prob_P, counts_N)


def _lists(values_P: Any, counts_N: Any) -> Any:
    import pyarrow as pa

    offsets = pa.array(np.concatenate([[0], np.cumsum(counts_N)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values_P, pa.float32()))


# --- reading ---


@dataclass
class PartCount:
    """What a part holds. `labels` counts the posts that have each label."""

    facts: PartFacts
    bytes: int
    sha256: str
    labels: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    unanswered: int = 0  # posts of several labels that got none


def count_part(store: Store, info: ObjectInfo, job: Job, number: int, folder: Path) -> PartCount:
    """Read a part from beginning to end; raises `Damaged` unless it belongs to this job and has
    each row of its unit once.
    """
    path = folder / "part.parquet"
    digest = _fetch(store, info, path)
    try:
        with parquet_file(path) as parquet:
            counted = PartCount(_facts(parquet, job, number), info.size, digest)
            _count(parquet, counted, job.units[number])
    except (Unreadable, ValidationError, ValueError) as error:
        raise Damaged(
            f"{store.url_of(info.key)} is not what a worker of this job writes"
            f" ({phrase(error)}); delete it, and type the command again."
        ) from None
    finally:
        path.unlink(missing_ok=True)
    return counted


def _fetch(store: Store, info: ObjectInfo, path: Path) -> str:
    summed = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, info.size, _READ_BYTES):
            piece = store.read(info.key, start=start, length=_READ_BYTES, if_match=info.etag)
            summed.update(piece)
            file.write(piece)
    return summed.hexdigest()


def _facts(parquet: Any, job: Job, number: int) -> PartFacts:
    raw = (parquet.metadata.metadata or {}).get(FACTS, b"")
    facts = PartFacts.model_validate(object_in(raw))
    if (facts.job, facts.unit) != (job.id, number):
        raise ValueError(f"it is unit {facts.unit} of job {facts.job[:40]}")
    return facts


def _count(parquet: Any, counted: PartCount, unit: Unit) -> None:
    """Add the part's rows to the counts; raises `ValueError` unless it has each row of the unit
    once, in order.
    """
    facts, rows, last = counted.facts, 0, unit.first_row - 1
    for batch in parquet.iter_batches(_GROUP_ROWS):
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        row_N = columns["row"].to_numpy()
        if len(row_N) and (row_N[0] <= last or (np.diff(row_N) <= 0).any()):
            raise ValueError(f"row {row_N[0]} or one after it is there twice")
        rows, last = rows + len(row_N), int(row_N[-1]) if len(row_N) else last
        _add(counted, columns)
    if rows != facts.rows:
        raise ValueError(f"it has {rows} rows and says {facts.rows}")
    if unit.rows is not None and facts.rows + facts.blank != unit.rows:
        raise ValueError(f"it has {facts.rows} rows and {facts.blank} blank ones of {unit.rows}")
    if unit.rows is not None and last >= unit.first_row + unit.rows:
        raise ValueError(f"it has row {last}, which is another unit's")


def _add(counted: PartCount, columns: dict[str, Any]) -> None:
    import pyarrow.compute as pc

    given = columns["label"] if "label" in columns else columns["labels"].flatten()
    for into, column in ((counted.labels, given), (counted.errors, columns["error"])):
        for pair in pc.value_counts(column).to_pylist():
            if pair["values"] is not None:
                into[pair["values"]] += pair["counts"]
    if "labels" in columns:
        counted.unanswered += int(pc.sum(pc.equal(pc.list_value_length(columns["labels"]), 0)).as_py() or 0)
    if "accepted" in columns:
        counted.accepted += int(pc.sum(columns["accepted"]).as_py() or 0)
