"""A labelling job: job.json, created once. Every worker reads it and compares it with its own
request.

It holds one entry per unit, about 200 bytes: 10 million posts in units of 50,000 make 200 entries.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from emotion_train.config import Precision
from emotion_train.data.targets import TargetKind
from emotion_train.errors import AlreadyExists, ObjectNotFound, WrongRequest
from emotion_train.storage.document import FrozenModel, Manifest, read_manifest
from emotion_train.storage.store import Store

JOB = "job.json"
SUCCESS = "_SUCCESS.json"
LEASES = "leases/"
PARTS = "part-"
PROBE = f"{LEASES}probe"


class SourceFile(FrozenModel):
    """An object of the source. Workers put `before` in front of each of its byte ranges; a reader
    then numbers the first row of a range `row_after`.
    """

    key: str
    bytes: int
    etag: str | None = None
    format: str
    quoting: Literal["auto", "csv", "none"] = "auto"
    before: str | None = None
    row_after: int = 1


class Unit(FrozenModel):
    """What a worker labels at once: bytes or row groups `start` to `end` of `files[file]`, or the
    whole file where `start` and `end` are None.

    `first_row` is the number of its first row in the file. `rows` counts its rows, blank ones
    included; None where the number is unknown before reading. `sha256` is that of its bytes, for
    row groups that of their file's footer; None where an ETag takes its place.
    """

    file: int = Field(ge=0)
    start: int | None = None
    end: int | None = None
    first_row: int = 1
    rows: int | None = None
    sha256: str | None = None


class AdapterIdentity(FrozenModel):
    """What decides an adapter's answers: its weights, base, tokenizer and decision."""

    name: str
    weights_sha256: str
    base: str
    base_weights_sha256: str
    tokenizer_sha256: str
    max_length: int
    decision_sha256: str | None = None


class Reading(FrozenModel):
    """How the posts of the source are read, and what comes along with their labels."""

    text_column: str = "text"
    id_column: str | None = None
    columns: tuple[str, ...] = ()
    encoding: str = "utf-8"
    quoting: Literal["auto", "csv", "none"] = "auto"
    max_chars: int = 20_000
    unescape_html: bool = False
    split: str | None = None


class Job(Manifest):
    """A labelling job as job.json stores it. `id` is random, and the job's parts name it.

    `training`: each label's share of the training posts. `held_out`: each label's share of the
    adapter's answers to `held_out_posts` held-out posts. Both come from the adapter's report; None
    without one. `mean_of`: which outputs of several adapters are averaged; absent from the digest
    of one adapter's jobs and of earlier versions' jobs.
    """

    older: ClassVar[tuple[str, ...]] = ()
    digested: ClassVar[tuple[str, ...]] = ("emotion-train/label-job/1",)
    max_bytes: ClassVar[int] = 256 << 20

    schema_version: Literal["emotion-train/label-job/1"] = "emotion-train/label-job/1"
    id: str
    source: str
    kind: Literal["files", "data set"]
    index_sha256: str | None = None
    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...] = Field(min_length=1)
    reading: Reading
    adapters: tuple[AdapterIdentity, ...] = Field(min_length=1)
    precision: Precision
    targets: TargetKind
    labels: tuple[str, ...]
    mean_of: Literal["probabilities", "logits"] = "probabilities"
    probabilities: bool = False
    accept_precision: float | None = None
    accept_above: float | None = None
    training: tuple[float, ...] | None = None
    held_out: tuple[float, ...] | None = None
    held_out_posts: int = 0
    lease_seconds: float = Field(600, gt=0)
    versions: dict[str, str] = Field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        content = super().content()
        if self.mean_of == "probabilities":
            del content["mean_of"]
        return content

    @property
    def rows(self) -> int | None:
        """Rows of all units; None where a unit's number is unknown."""
        known = [unit.rows for unit in self.units if unit.rows is not None]
        return sum(known) if len(known) == len(self.units) else None


def part_key(unit: int) -> str:
    return f"{PARTS}{unit:08d}.parquet"


def read_job(store: Store) -> Job:
    """The job at this store; raises `WrongRequest` where it is missing or damaged."""
    try:
        return read_manifest(
            Job,
            store,
            JOB,
            other_schema="Label into another OUT_URL.",
            damaged="Label into another OUT_URL.",
        )
    except ObjectNotFound:
        raise WrongRequest(
            f"There is no labelling job at {store.url}: {JOB} is missing. Type `emotion-train label SOURCE"
            f" {store.url} --adapter RUN_URL`."
        ) from None


def find_job(store: Store) -> Job | None:
    """The job at this store; None where there is none."""
    return None if store.find(JOB) is None else read_job(store)


def require_create_only(store: Store) -> None:
    """Raises `WrongRequest` for a store that overwrites existing objects: posts would be labelled
    twice in it. Costs two small requests.
    """
    store.create(PROBE, b"created")
    try:
        store.create(PROBE, b"overwritten")
    except AlreadyExists:
        return
    raise WrongRequest(
        f"{store.url} overwrites existing objects although asked only to create them (If-None-Match), so"
        " nothing keeps workers apart there; give an OUT_URL in a store that keeps existing objects, such"
        " as AWS S3, or a folder."
    )


def create_job(store: Store, job: Job) -> Job:
    """The job as stored: this one, or the one that another worker stored first."""
    try:
        store.create(JOB, job.to_bytes())
        return job
    except AlreadyExists:
        return read_job(store)


def refuse_other_request(job: Job, asked: Job, url: str, out_url: str) -> None:
    """Raises `WrongRequest` where the job that is asked for differs from the one at `out_url`.
    `asked.units` and what a plan adds to files are not compared.
    """
    for what, there, here in _compared(job, asked):
        if there != here:
            raise WrongRequest(
                f"{out_url} holds a job {what} {_shown(there)}, and this command is one {what}"
                f" {_shown(here)}; give another OUT_URL, or the same request."
            )
    changed = _changed(job.files, asked.files)
    if changed is not None:
        raise WrongRequest(
            f"The source {url} changed since the job at {out_url} was planned: {changed}. Put it back as it"
            " was, or label it into another OUT_URL."
        )
    if job.index_sha256 != asked.index_sha256:
        raise WrongRequest(
            f"The data set {url} was prepared again since the job at {out_url} began; label it into another"
            " OUT_URL."
        )


def _compared(job: Job, asked: Job) -> list[tuple[str, Any, Any]]:
    def traits(of: Job) -> list[tuple[str, Any]]:
        return [
            ("of a source of kind", of.kind),
            ("of the labels", list(of.labels)),
            *[
                (f"of adapters with {trait}", [getattr(adapter, name) for adapter in of.adapters])
                for name, trait in (
                    ("weights_sha256", "the sha256"),
                    ("base_weights_sha256", "base weights of sha256"),
                    ("tokenizer_sha256", "a tokenizer of sha256"),
                    ("max_length", "the max_length"),
                    ("decision_sha256", "a decision of sha256"),
                )
            ],
            ("by the mean of the adapters'", of.mean_of),
            ("in the precision", of.precision),
            *[
                (f"with --{name.replace('_', '-')}", value)
                for name, value in of.reading.model_dump(mode="json").items()
            ],
            ("with --probabilities", of.probabilities),
            ("with --accept-precision", of.accept_precision),
        ]

    return [(what, there, here) for (what, there), (_, here) in zip(traits(job), traits(asked), strict=True)]


def _shown(value: Any) -> str:
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 120 else f"{words[:120]} …"


def _changed(there: tuple[SourceFile, ...], here: tuple[SourceFile, ...]) -> str | None:
    """What differs between two listings of a source, in words; None where nothing does."""
    old, new = ({file.key: file for file in files} for files in (there, here))
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            return f"{key} is gone"
        if key not in old:
            return f"{key} is new"
        if old[key].bytes != new[key].bytes:
            return f"{key} has {new[key].bytes:,} bytes and had {old[key].bytes:,}"
        if old[key].etag != new[key].etag:
            return f"{key} was written again (ETag {new[key].etag}, it was {old[key].etag})"
    return None
