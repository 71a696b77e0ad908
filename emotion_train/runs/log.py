"""The log of a run: small numbered JSON entries, each created once and never rewritten. An entry
commits the parts that it names.

Parts are uploaded before their entry, so a part without an entry is a leftover of a killed run and
is never read. A writer puts its entries at consecutive numbers, so that one claim at the next
number stops every older writer for good. The price: a run has one writer at a time, and each commit
waits for the answer to the one before. This page needs no torch: the launcher lists runs with it.

    <run>/log/00000000.json    claim        a writer has taken over the run
    <run>/log/00000001.json    checkpoint   adapter, optimizer and position, in parts below
                               <run>/data/<incarnation>/
    <run>/log/00000002.json    final        adapter folder and report below
                               <run>/final/<incarnation>/
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from emotion_train.console import counted, tell
from emotion_train.edges.bounded import Unreadable, object_in, phrase
from emotion_train.errors import (
    AlreadyExists,
    Damaged,
    EmotionTrainError,
    Fenced,
    ObjectNotFound,
    StorageError,
    WrongRequest,
)
from emotion_train.storage.buffers import Buffers
from emotion_train.storage.second_look import Read, second_look
from emotion_train.storage.store import Store

SCHEMA: Literal["emotion-train/log/1"] = "emotion-train/log/1"
MAX_ENTRY_BYTES = 1 << 20
# a run with a younger newest entry counts as live: ten checkpoints of the default interval
LIVE_S = 600.0
# for one entry; the state of a 24B base with r=256 on all linear layers is some 20 GiB
MAX_PARTS_BYTES = 64 << 30
_MAX_ENTRIES = 10**8  # their names have eight digits
_PRINTED_NAMES = 12
_ENTRIES_PER_READER = 32
_SMOKE, _LONGEST_ID = "-smoke", 128

Kind = Literal["claim", "checkpoint", "final", "note"]
Metrics = dict[str, float | int | str | None]


class Published(EmotionTrainError):
    """The run already has its final entry, `entry`; nothing was claimed."""

    def __init__(self, message: str, entry: Entry | None = None) -> None:
        super().__init__(message)
        self.entry = entry


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
        if any(segment in ("", ".", "..") for segment in segments) or re.search(r"[\\:\x00-\x1f]", key):
            raise ValueError(f"the key {key!r} leaves the run's folder")
        return key


class Entry(BaseModel):
    """One log entry. Unknown fields of a later version are kept; an unknown schema is refused."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)
    schema_version: Literal["emotion-train/log/1"] = Field(SCHEMA, alias="schema")
    seq: int = Field(ge=0, lt=_MAX_ENTRIES)
    kind: Kind
    incarnation: int = Field(ge=0, lt=_MAX_ENTRIES, description="seq of the writer's claim.")
    nonce: str = Field(
        description="Random and the writer's own, so that two writers never create the same bytes."
    )
    time_utc: str
    epoch: int = Field(ge=0, lt=2**63, description="Epoch of the next step.")
    step: int = Field(ge=0, lt=2**63, description="Completed optimizer steps of the whole run.")
    parts: tuple[Part, ...] = ()
    index_sha256: str
    config_sha256: str
    metrics: Metrics = {}

    @field_validator("metrics")
    @classmethod
    def _score_is_a_number(cls, metrics: Metrics) -> Metrics:
        score = metrics.get("macro_f1")
        if score is not None and not (isinstance(score, int | float) and 0 <= score <= 1):
            raise ValueError(f"macro_f1 is {str(score)[:40]!r} and no number from 0 to 1")
        return metrics

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True) + "\n").encode()


def mean_price(entries: Sequence[Entry], now: datetime) -> float | None:
    """The mean dollars per hour of a run that is at work `now`: each start counts for as long as it
    held its machines. None when a start has no known price.
    """
    claims = [entry for entry in entries if entry.kind == "claim"]
    spent = held = 0.0
    for claim in claims:
        price = claim.metrics.get("usd_per_hour")
        if not isinstance(price, int | float):
            return None
        own = [when(entry) for entry in entries if entry.incarnation == claim.incarnation]
        until = now if claim is claims[-1] else max(own)
        seconds = max(1.0, (until - when(claim)).total_seconds())
        spent, held = spent + seconds * price, held + seconds
    return spent / held if held else None


def smoke_id(run_id: str) -> str:
    """The name of a run's smoke run, which tries it out first."""
    return run_id if is_smoke(run_id) else f"{run_id[: _LONGEST_ID - len(_SMOKE)]}{_SMOKE}"


def is_smoke(run_id: str) -> bool:
    return run_id.endswith(_SMOKE)


def entry_key(run_id: str, seq: int) -> str:
    return f"{run_id}/log/{seq:08d}.json"


def read_log(store: Store, run_id: str, start: int = 0) -> list[Entry]:
    """The entries of a run from number `start` on, in order; empty when the run does not exist.

    Raises `WrongRequest` for a damaged entry, a gap, or a schema of another version, each seen
    twice.
    """
    count = _count_entries(store, run_id)
    with ThreadPoolExecutor(min(16, 1 + count // _ENTRIES_PER_READER)) as readers:
        return list(readers.map(lambda seq: _read_entry(store, run_id, seq), range(start, count)))


def _count_entries(store: Store, run_id: str) -> int:
    prefix = f"{run_id}/log/"
    found: list[int] = []
    strange = False

    def read(look: int) -> bytes:
        nonlocal found, strange
        listed = store.list_again(prefix, look) if look else store.list(prefix)
        names = [info.key.removeprefix(prefix) for info in listed]
        found = [int(name[:8]) for name in names if re.fullmatch(r"[0-9]{8}\.json", name)]
        strange = len(found) < len(names)
        return "/".join(names).encode()

    def verify(_: bytes) -> None:
        # a listing may miss an entry that was created during it, yet have the next one
        if strange or found != list(range(len(found))):
            raise _Gap

    with suppress(_Gap):
        second_look(read, verify, f"{store.url}/{prefix}")
    if found == list(range(len(found))):  # there may be other objects beside them
        return len(found)
    gap = next(seq for seq, number in enumerate(found) if seq != number)
    raise WrongRequest(
        f"The log of run {run_id} has no entry {gap:08d} (next is {found[gap]:08d}) at {store.url}; it was"
        " tampered with."
    )


class _Gap(ValueError):
    pass


def _read_entry(store: Store, run_id: str, seq: int) -> Entry:
    key = entry_key(run_id, seq)

    def verify(raw: bytes) -> Entry:
        entry = _parse(raw, store.url_of(key))
        if entry.seq != seq:
            raise WrongRequest(
                f"The log entry {store.url_of(key)} says that it is number {entry.seq}; it was copied or"
                " tampered with."
            )
        return entry

    return store.read_verified(key, verify, length=MAX_ENTRY_BYTES + 1)


def _parse(raw: bytes, url: str) -> Entry:
    if len(raw) > MAX_ENTRY_BYTES:
        raise WrongRequest(
            f"The log entry {url} is larger than {MAX_ENTRY_BYTES} bytes; no version of this program writes"
            " so large an entry."
        )
    try:
        # an earlier version may have written NaN for a figure
        document = object_in(raw, MAX_ENTRY_BYTES, finite=False)
        schema = document.get("schema")
        if schema != SCHEMA:
            raise WrongRequest(
                f"The log entry {url} has schema {str(schema)[:80]!r}; this version reads {SCHEMA!r}. Use the"
                " version that wrote the run."
            )
        entry = Entry.model_validate(document)
    except (Unreadable, ValidationError) as error:
        raise WrongRequest(f"The log entry {url} is damaged ({phrase(error)}).") from None
    if problem := _unsound(entry):
        raise WrongRequest(f"The log entry {url} is not sound: {problem}; nothing it names is read.")
    return entry


def _unsound(entry: Entry) -> str | None:
    """Why the parts of an entry may not be read: a part outside the writer's own folders, two parts
    in one place, or too many bytes. None where they may be read.
    """
    own = (f"data/{entry.incarnation:08d}/", f"final/{entry.incarnation:08d}/")
    for part in entry.parts:
        if not part.key.startswith(own):
            return f"{part.key!r} is not below {own[0]} or {own[1]}"
    if (taken := first_collision(part.key for part in entry.parts)) is not None:
        return f"{taken!r} would take the place of another part"
    if (total := sum(part.bytes for part in entry.parts)) > MAX_PARTS_BYTES:
        return f"its parts have {total} bytes and {MAX_PARTS_BYTES} are allowed"
    return None


def first_collision(names: Iterable[str]) -> str | None:
    """The first name that some disk takes for an earlier name, or for a folder that an earlier name
    needs; None when there is none.

    Disks of macOS and Windows ignore case, and macOS joins a letter with its accent.
    """
    files: set[str] = set()
    folders: set[str] = set()
    for name in names:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        parents = {str(parent) for parent in PurePosixPath(folded).parents}
        if folded in files or folded in folders or parents & files:
            return name
        files.add(folded)
        folders |= parents
    return None


def require_conditional_writes(store: Store, run_id: str, allow_unfenced: bool) -> bool:
    """True when the store refuses to create an existing object: otherwise no writer can be fenced.

    Raises `WrongRequest` when the store does not refuse. With `allow_unfenced`, it prints the
    danger on stderr instead and returns False.
    """
    key = f"{run_id}/probe/{secrets.token_hex(8)}"
    store.create(key, b"first")
    try:
        store.create(key, b"second")
        honoured = False
    except AlreadyExists:
        honoured = store.holds(key, b"first")
    with suppress(StorageError):  # a user who may not delete leaves five bytes behind
        store.delete(key)
    if honoured:
        return True
    found = f"The store {store.url} overwrites an object that it was told only to create (If-None-Match)"
    if not allow_unfenced:
        raise WrongRequest(
            f"{found}, so two processes could both write run {run_id}; name a bucket of a store that honours"
            " conditions, or type --allow-unfenced and make sure yourself that only one process at a time"
            " runs it."
        )
    tell(
        f"UNFENCED: {found}. If a second process starts run {run_id} while this one is alive, each may"
        " overwrite the other's checkpoints, and steps that were reported as saved may be lost, without a"
        " word from either."
    )
    return False


class Writer:
    """The right to append to one run, held from its claim until another writer claims the run.

    `entries` are the entries before its own claim; a claim that succeeds proves that no other entry
    came in between. For use by one thread at a time, except `require_ownership`.
    """

    def __init__(self, store: Store, run_id: str, index_sha256: str, config_sha256: str) -> None:
        self.store = store
        self.run_id = run_id
        self.nonce = secrets.token_hex(8)
        self._index_sha256 = index_sha256
        self._config_sha256 = config_sha256
        self.entries = tuple(read_log(store, run_id))
        self._own: tuple[Entry, ...] = ()
        self._tried: Entry | None = None  # the claim whose answer may be lost
        # own entries found in the log whose append was not yet repeated
        self._unanswered: list[Entry] = []
        self._arrived: set[Part] = set()  # since the last entry
        self._appending = threading.Lock()

    @property
    def incarnation(self) -> int:
        """The number of this writer's claim."""
        assert self._own, "claim first"
        return self._own[0].seq

    @property
    def log(self) -> tuple[Entry, ...]:
        """The whole log as this writer knows it; only entries of a newer writer may be missing."""
        return self.entries + self._own

    def claim(self, epoch: int, step: int, facts: Metrics | None = None) -> Entry:
        """Take over the run: every older writer's next entry collides with this claim, which names
        its process and holds `facts` of the run.

        Several claims at once each get a number, and the newest wins. Raises `Published` when the
        run has its final entry. After a `StorageError` the claim may be in the log. Repeat the
        call: it returns the claim if it arrived and never makes two.
        """
        assert not self._own, "a writer claims once"
        who: Metrics = {"machine": socket.gethostname(), "process_id": os.getpid(), **(facts or {})}
        while True:
            if finals := [entry for entry in self.entries if entry.kind == "final"]:
                raise Published(
                    f"Run {self.run_id} is published at {self.store.url}/{self.run_id}.", finals[-1]
                )
            place = (len(self.entries), epoch, step)
            if self._tried is None or (self._tried.seq, self._tried.epoch, self._tried.step) != place:
                self._tried = self._entry("claim", len(self.entries), epoch, step, metrics=who)
            entry = self._tried
            try:
                self._create(entry)
            except AlreadyExists as error:
                since = read_log(self.store, self.run_id, len(self.entries))
                if not since:
                    raise StorageError(
                        f"{self.store.url} refuses the entry {entry.seq:08d} of run {self.run_id} and lists"
                        " none."
                    ) from error
                self.entries += tuple(since)
            else:
                self._own = (entry,)
                return entry

    def append(
        self, kind: Kind, epoch: int, step: int, parts: tuple[Part, ...] = (), metrics: Metrics | None = None
    ) -> Entry:
        """Commit one entry, and return it as stored in the log.

        Raises `Fenced` when another writer has claimed the run, and `StorageError`, also where the
        log was deleted. After a `StorageError` the entry may or may not be in the log. Repeat the
        append: it returns the entry if it arrived and never commits it twice.
        """
        with self._appending:
            entry = self._append(kind, epoch, step, parts, metrics or {})
        self._arrived.clear()
        return entry

    def require_ownership(self) -> None:
        """Raises `Fenced` when another writer has claimed the run; called between two entries. Does
        nothing while another thread appends, which finds it out itself.
        """
        if not self._appending.acquire(blocking=False):
            return
        try:
            with suppress(ObjectNotFound):
                there = self._own_entry_at(self._own[-1].seq + 1)
                self._own += (there,)  # its answer was lost
                self._unanswered.append(there)
        finally:
            self._appending.release()

    def _append(self, kind: Kind, epoch: int, step: int, parts: tuple[Part, ...], metrics: Metrics) -> Entry:
        self._require_log()
        while True:
            entry = self._entry(kind, self._own[-1].seq + 1, epoch, step, parts, metrics)
            for there in self._unanswered:
                if there.kind == "final" or _facts(there) == _facts(entry):
                    self._unanswered.remove(there)
                    return there
            try:
                self._create(entry)
            except AlreadyExists:
                there = self._own_entry_at(entry.seq)
                self._own += (there,)
                self._unanswered.append(there)
            else:
                self._own += (entry,)
                return entry

    def upload(self, name: str, data: bytes | Buffers) -> Part:
        """Upload one part below this incarnation's own prefix; it counts only once an entry names
        it. A part that arrived before another part failed is not sent again.

        The key holds the beginning of the content's sha256: an entry whose answer was lost may be
        committed all the same, and its parts must never be replaced by other bytes.
        """
        sha256 = sha256_of(data)
        path = PurePosixPath(f"data/{self.incarnation:08d}", name)
        part = Part(key=str(path.parent / sha256[:12] / path.name), bytes=len(data), sha256=sha256)
        if part not in self._arrived or not self._is_there(part):
            self.store.write(f"{self.run_id}/{part.key}", data)
            self._arrived.add(part)
        return part

    def _is_there(self, part: Part) -> bool:
        info = self.store.find(f"{self.run_id}/{part.key}")
        return info is not None and info.size == part.bytes

    def _require_log(self) -> None:
        """Raises `StorageError` where the log was deleted: the next entry would be the whole log,
        with a gap before it.
        """
        key = entry_key(self.run_id, self._own[-1].seq)
        try:
            self.store.stat(key)
        except ObjectNotFound:
            raise StorageError(
                f"{self.store.url_of(key)} is gone: run {self.run_id}, or its bucket, was deleted under this"
                " process; put it back."
            ) from None

    def _create(self, entry: Entry) -> None:
        data = entry.to_bytes()
        # an entry that could not be read back is not written
        _parse(data, self.store.url_of(entry_key(self.run_id, entry.seq)))
        self.store.create(entry_key(self.run_id, entry.seq), data)

    def _own_entry_at(self, seq: int) -> Entry:
        """This writer's entry at a number, which arrived although its answer was lost; raises
        `Fenced` when the entry is another writer's.
        """
        try:
            there = _read_entry(self.store, self.run_id, seq)
        except WrongRequest as error:  # another version's, perhaps
            raise Fenced(
                f"Another writer has taken run {self.run_id} over; this process stops and has overwritten"
                f" nothing. {error}"
            ) from None
        if (there.nonce, there.incarnation) == (self.nonce, self.incarnation):
            return there
        who = there.metrics
        writer = (
            f"process {who['process_id']} on {who['machine']}"
            if {"process_id", "machine"} <= who.keys()
            else "another writer"
        )
        raise Fenced(
            f"Run {self.run_id} at {self.store.url} was taken over by {writer}: its {there.kind} of"
            f" {there.time_utc} is entry {seq:08d}. This process stops and has overwritten nothing."
        )

    def _entry(
        self,
        kind: Kind,
        seq: int,
        epoch: int,
        step: int,
        parts: tuple[Part, ...] = (),
        metrics: Metrics | None = None,
    ) -> Entry:
        return Entry(
            seq=seq,
            kind=kind,
            incarnation=seq if kind == "claim" else self.incarnation,
            nonce=self.nonce,
            time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            epoch=epoch,
            step=step,
            parts=parts,
            index_sha256=self._index_sha256,
            config_sha256=self._config_sha256,
            metrics=metrics or {},
        )


def _facts(entry: Entry) -> bytes:
    """The content of an entry without its number and time."""
    return entry.model_copy(update={"seq": 0, "time_utc": ""}).to_bytes()


def sha256_of(data: bytes | Buffers) -> str:
    return hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else data.sha256()


def upload_part(store: Store, run_id: str, key: str, data: bytes | Buffers) -> Part:
    part = Part(key=key, bytes=len(data), sha256=sha256_of(data))
    store.write(f"{run_id}/{key}", data)
    return part


def read_part(store: Store, run_id: str, part: Part) -> bytes:
    """The bytes of a part, checked by size and sha256; raises `Damaged` when they are not those
    that the entry committed.
    """
    key = _key_of_its_size(store, run_id, part)
    # never reads more, whatever has replaced the part since
    return store.read_verified(
        key, lambda data: _verified(store.url_of(key), part, data), length=part.bytes + 1
    )


def read_large_part(store: Store, run_id: str, part: Part) -> memoryview:
    """A part as by `read_part`, in a buffer that can be written to. The buffer is filled in ranges:
    parts of gigabytes are in memory once.
    """
    key = _key_of_its_size(store, run_id, part)
    return store.read_into_verified(
        key, memoryview(bytearray(part.bytes + 1)), lambda data: _verified(store.url_of(key), part, data)
    )


def _key_of_its_size(store: Store, run_id: str, part: Part) -> str:
    key = f"{run_id}/{part.key}"
    url = store.url_of(key)

    def verify_size(size: bytes) -> None:
        if int(size) != part.bytes:
            raise Damaged(
                f"{url} has {int(size)} bytes and the log says {part.bytes}; the object was replaced or"
                " damaged."
            )

    second_look(lambda _: b"%d" % store.stat(key).size, verify_size, url)
    return key


def _verified(url: str, part: Part, data: Read) -> Read:
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise Damaged(
            f"{url} does not have the sha256 that the log committed; the object was replaced or damaged."
        )
    return data


def run_ids(store: Store) -> list[str]:
    """The names of the runs below an output URL, sorted."""
    entries = (re.fullmatch(r"([^/]+)/log/[0-9]{8}\.json", info.key) for info in store.list())
    return sorted({entry[1] for entry in entries if entry is not None})


def when(entry: Entry) -> datetime:
    """The time of the entry by its writer's clock; 1970 when it cannot be read."""
    try:
        moment = datetime.fromisoformat(entry.time_utc)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def final_entry(store: Store, run_id: str) -> Entry:
    """The entry that published the run; raises `WrongRequest` when there is no such run, or the run
    is not finished.
    """
    entries = read_log(store, run_id)
    if not entries:
        names = run_ids(store)
        listed = ", ".join(names[-_PRINTED_NAMES:]) if names else "none"
        raise WrongRequest(f"There is no run {run_id!r} at {store.url}; runs there: {listed}.")
    finals = [entry for entry in entries if entry.kind == "final"]
    if not finals:
        step = max(entry.step for entry in entries)
        unfinished = f"Run {run_id} at {store.url} is not published yet: it has completed"
        unfinished += f" {counted(step, 'step')}"
        age_s = max(0.0, (datetime.now(UTC) - when(entries[-1])).total_seconds())
        if age_s < LIVE_S:  # another start would fence its writer
            raise WrongRequest(
                f"{unfinished} and was still training {age_s:.0f} s ago. "
                f"Follow it with `emotion-launch show {store.url}/{run_id} --watch`, then pull."
            )
        raise WrongRequest(f"{unfinished}. Start it again with run.id={run_id}.")
    return finals[-1]


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """The state of one run: its step, and its published macro-F1 or that of its best checkpoint."""
    finals = [entry for entry in entries if entry.kind == "final"]
    scored = finals[-1:] or [entry for entry in entries if entry.kind == "checkpoint"]
    scores = [
        float(value) for entry in scored if isinstance(value := entry.metrics.get("macro_f1"), int | float)
    ]
    return {
        "state": "published" if finals else "unfinished",
        "step": max(entry.step for entry in entries),
        "macro_f1": max(scores, default=None),
        "split": finals[-1].metrics.get("split") if finals else "validation",
        "updated": entries[-1].time_utc,
    }
