"""The log of a run: small numbered JSON entries, each created once and never rewritten; an entry commits the parts it names.

Parts are uploaded before their entry, so a part without an entry is a leftover of a killed run and is never read. Torch-free: the
launcher lists runs with this page.

    <run>/log/00000000.json    claim        a writer has taken the run over
    <run>/log/00000001.json    checkpoint   adapter, optimizer and position, in parts below <run>/data/<incarnation>/
    <run>/log/00000002.json    final        adapter folder and report below <run>/final/<incarnation>/
"""

from __future__ import annotations

import hashlib
import json
import secrets
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from emotion_train.errors import AlreadyExists, Fenced, StorageError, WrongRequest
from emotion_train.storage import Store

SCHEMA: Literal["emotion-train/log/1"] = "emotion-train/log/1"
MAX_ENTRY_BYTES = 1 << 20
_PRINTED_NAMES = 12


class Part(BaseModel):
    """One object of a checkpoint or of the final folder; `key` is relative to the run."""

    model_config = ConfigDict(frozen=True)
    key: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("key")
    @classmethod
    def _stays_inside(cls, key: str) -> str:
        segments = key.split("/")
        if any(segment in ("", ".", "..") for segment in segments) or "\\" in key or "\0" in key or ":" in segments[0]:
            raise ValueError(f"the key {key!r} leaves the run's folder")
        return key


class Entry(BaseModel):
    """One log entry. Unknown fields of a later version are kept, an unknown schema is refused."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)
    schema_version: Literal["emotion-train/log/1"] = Field(SCHEMA, alias="schema")
    seq: int = Field(ge=0)
    kind: Literal["claim", "checkpoint", "final", "note"]
    incarnation: int = Field(ge=0, description="seq of the writer's claim.")
    nonce: str = Field(description="Random, so that two writers never create the same bytes.")
    time_utc: str
    epoch: int = Field(ge=0, description="Epoch of the next step.")
    step: int = Field(ge=0, description="Completed optimizer steps of the whole run.")
    parts: tuple[Part, ...] = ()
    index_sha256: str
    config_sha256: str
    metrics: dict[str, float | int | str | None] = {}

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True) + "\n").encode()


def entry_key(run_id: str, seq: int) -> str:
    return f"{run_id}/log/{seq:08d}.json"


def read_log(store: Store, run_id: str) -> list[Entry]:
    """All entries of a run in order; empty when the run does not exist.

    Raises `WrongRequest` for a damaged entry, a gap, or a schema of another version.
    """
    keys = [info.key for info in store.list(f"{run_id}/log/") if info.key.endswith(".json")]
    entries = []
    for seq, key in enumerate(sorted(keys)):
        if key != entry_key(run_id, seq):
            raise WrongRequest(f"The log of run {run_id} has no entry {seq:08d} (next is {store.url_of(key)}); it was tampered with.")
        entries.append(_parse(store.read(key, length=MAX_ENTRY_BYTES), store.url_of(key)))
    return entries


def _parse(raw: bytes, url: str) -> Entry:
    try:
        document = json.loads(raw)
        found = document.get("schema") if isinstance(document, dict) else None
        if found != SCHEMA:
            raise WrongRequest(
                f"The log entry {url} has schema {found!r}; this version reads {SCHEMA!r}. Use the version that wrote the run."
            )
        return Entry.model_validate(document)
    except (UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        raise WrongRequest(f"The log entry {url} is damaged ({' '.join(str(error).split())[:200]}).") from None


class Writer:
    """The right to append to one run, held from its claim until another writer claims the run.

    `entries` are those that were there before; a claim that succeeds proves that no other came in between.
    """

    def __init__(self, store: Store, run_id: str, index_sha256: str, config_sha256: str) -> None:
        self.store = store
        self.run_id = run_id
        self._index_sha256 = index_sha256
        self._config_sha256 = config_sha256
        self.entries = tuple(read_log(store, run_id))
        self._next_seq = len(self.entries)
        self.incarnation = self._next_seq

    def claim(self, epoch: int, step: int) -> Entry:
        """Take the run over: every older writer's next entry collides with this one. Raises `Fenced` when another entry came first."""
        return self.append("claim", epoch, step)

    def append(
        self,
        kind: Literal["claim", "checkpoint", "final", "note"],
        epoch: int,
        step: int,
        parts: tuple[Part, ...] = (),
        metrics: dict[str, float | int | str | None] | None = None,
    ) -> Entry:
        """Commit one entry. Raises `Fenced` when another writer's entry already has its number."""
        entry = Entry(
            seq=self._next_seq,
            kind=kind,
            incarnation=self.incarnation,
            nonce=secrets.token_hex(8),
            time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            epoch=epoch,
            step=step,
            parts=parts,
            index_sha256=self._index_sha256,
            config_sha256=self._config_sha256,
            metrics=metrics or {},
        )
        try:
            self.store.create(entry_key(self.run_id, entry.seq), entry.to_bytes())
        except AlreadyExists:
            raise Fenced(
                f"Another writer has claimed run {self.run_id} at {self.store.url}; this process stops and has overwritten nothing."
            ) from None
        self._next_seq += 1
        return entry

    def upload(self, name: str, data: bytes) -> Part:
        """Upload one part below this incarnation's own prefix; it counts only once an entry names it."""
        return upload_part(self.store, self.run_id, f"data/{self.incarnation:08d}/{name}", data)


def upload_part(store: Store, run_id: str, key: str, data: bytes) -> Part:
    part = Part(key=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    store.write(f"{run_id}/{key}", data)
    return part


def read_part(store: Store, run_id: str, part: Part) -> bytes:
    """The bytes of a part, checked by size and sha256; raises `StorageError` when they are not what the entry committed."""
    key = f"{run_id}/{part.key}"
    size = store.stat(key).size
    if size != part.bytes:
        raise StorageError(f"{store.url_of(key)} has {size} bytes and the log says {part.bytes}; the object was replaced or damaged.")
    data = store.read(key)
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise StorageError(f"{store.url_of(key)} does not have the sha256 that the log committed; the object was replaced or damaged.")
    return data


def run_ids(store: Store) -> list[str]:
    """Names of the runs below an output URL, sorted."""
    return sorted({info.key.split("/")[0] for info in store.list() if info.key.split("/")[1:2] == ["log"]})


def final_entry(store: Store, run_id: str) -> Entry:
    """The entry that published the run; raises `WrongRequest` when there is no such run or it is not finished."""
    entries = read_log(store, run_id)
    if not entries:
        names = run_ids(store)
        listed = ", ".join(names[-_PRINTED_NAMES:]) if names else "none"
        raise WrongRequest(f"There is no run {run_id!r} at {store.url}; runs there: {listed}.")
    finals = [entry for entry in entries if entry.kind == "final"]
    if not finals:
        step = max(entry.step for entry in entries)
        raise WrongRequest(
            f"Run {run_id} at {store.url} is not published yet: it has completed {step} steps. Start it again with run.id={run_id}."
        )
    return finals[-1]


def summary(entries: list[Entry]) -> dict[str, Any]:
    """What `emotion-launch runs` prints of one run: its published macro-F1, or the best of its checkpoints."""
    finals = [entry for entry in entries if entry.kind == "final"]
    scored = finals[-1:] or [entry for entry in entries if entry.kind == "checkpoint"]
    scores = [float(value) for entry in scored if isinstance(value := entry.metrics.get("macro_f1"), int | float)]
    return {
        "state": "published" if finals else "unfinished",
        "step": max(entry.step for entry in entries),
        "macro_f1": max(scores, default=None),
        "split": finals[-1].metrics.get("split") if finals else "validation",
        "updated": entries[-1].time_utc,
    }
