"""Leases spread the units over workers that come and go: the worker that creates a unit's next
attempt has the unit until the job's `lease_seconds` are over, by the store's own clock.

A lease saves work but does not make the result correct: a worker that was paused for an hour may
label a unit that another finished long ago. The result is correct because a part is created only
once (`emotion_train/labelling/part.py`). The next attempt renews a lease, an empty object beside it
releases it, and nothing is deleted or written again: one listing, 1,000 objects per request, shows
everything.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from emotion_train.errors import AlreadyExists, StorageError
from emotion_train.labelling.job import LEASES, PARTS, SUCCESS, Job
from emotion_train.storage.store import ObjectInfo, Store

_LEASE = re.compile(rf"{LEASES}(\d{{8}})\.(\d{{4,}})\.(json|released)")
_PART = re.compile(rf"{PARTS}(\d{{8}})\.parquet")
_GRACE_S = 1.0  # dates of a store are in whole seconds
_RENEWED_AFTER = 0.5  # of the lease
SCHEMA = "emotion-train/label-lease/1"


class Standing(NamedTuple):
    """The newest attempt at a unit, made at `since`; `first` is the time of the first attempt. Both
    are by the store's clock.
    """

    attempt: int
    since: float
    first: float
    released: bool

    def holds(self, now: float, lease_s: float) -> bool:
        """Whether a worker may be at work on the unit."""
        return not self.released and now <= self.since + lease_s + _GRACE_S


@dataclass(frozen=True)
class Board:
    """What a job's store holds at one moment: parts with their sizes and dates, leases, and the
    store's time. The lease of the summary has the number after the last unit's.
    """

    units: int
    lease_s: float
    now: float
    parts: dict[int, ObjectInfo]
    leases: dict[int, Standing]
    success: bool

    @classmethod
    def look(cls, store: Store, job: Job) -> Board:
        """The store's present state, by three requests and one more per 1,000 objects."""
        leases = _standings(store.list(LEASES))
        parts: dict[int, ObjectInfo] = {}
        for info in store.list(PARTS):
            if match := _PART.fullmatch(info.key):
                parts[int(match[1])] = info
        success = store.find(SUCCESS) is not None
        return cls(len(job.units), job.lease_seconds, store.now(), parts, leases, success)

    @property
    def left(self) -> list[int]:
        """Units without a part."""
        return [unit for unit in range(self.units) if unit not in self.parts]

    def is_leased(self, unit: int) -> bool:
        standing = self.leases.get(unit)
        return standing is not None and standing.holds(self.now, self.lease_s)

    def free_from(self, start: int) -> Iterator[int]:
        """Units that nobody has, from `start` to the end and then from 0."""
        for step in range(self.units):
            unit = (start + step) % self.units
            if unit not in self.parts and not self.is_leased(unit):
                yield unit


def _standings(listed: Iterator[ObjectInfo]) -> dict[int, Standing]:
    newest: dict[int, Standing] = {}
    for info in listed:
        if (match := _LEASE.fullmatch(info.key)) is None:
            continue
        unit, attempt, since = int(match[1]), int(match[2]), info.modified or 0.0
        old = newest.get(unit, Standing(-1, since, since, False))
        first = min(old.first, since)
        if attempt > old.attempt:
            newest[unit] = Standing(attempt, since, first, match[3] == "released")
        elif attempt == old.attempt:
            # a second object of one attempt: its lease and its release, in either order
            newest[unit] = Standing(attempt, max(old.since, since), first, True)
        else:
            newest[unit] = old._replace(first=first)
    return newest


def lease_key(unit: int, attempt: int) -> str:
    return f"{LEASES}{unit:08d}.{attempt:04d}.json"


def released_key(unit: int, attempt: int) -> str:
    return f"{LEASES}{unit:08d}.{attempt:04d}.released"


@dataclass
class Held:
    """A lease of this worker. `renewed` is its own clock's time just before the lease was asked
    for.
    """

    unit: int
    attempt: int
    renewed: float
    lost: bool = False


class Leases:
    """The leases of one worker. Safe for use from several threads.

    `about` is written into each lease. `clock` times the renewals; tests replace it.
    """

    def __init__(
        self,
        store: Store,
        job: Job,
        worker: str,
        about: dict[str, object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._job = job
        self._worker = worker
        self._about = about
        self._clock = clock
        self._held: dict[int, Held] = {}
        self._lock = threading.Lock()
        digest = blake2b(worker.encode(), digest_size=8).digest()
        self._start = int.from_bytes(digest, "big") % len(job.units)

    @property
    def held(self) -> list[Held]:
        with self._lock:
            return list(self._held.values())

    def take(self, board: Board) -> Held | None:
        """A lease of a unit that nobody has; None where there is none. Each worker searches from
        its own position, so that workers rarely collide.
        """
        for unit in board.free_from(self._start):
            if (held := self.take_unit(board, unit)) is not None:
                return held
        return None

    def take_unit(self, board: Board, unit: int) -> Held | None:
        """The next attempt at this unit; None where another worker has it or was quicker."""
        standing = board.leases.get(unit)
        if standing is not None and standing.holds(board.now, board.lease_s):
            return None
        held = Held(unit, 0 if standing is None else standing.attempt + 1, self._clock())
        with self._lock:
            if unit in self._held:  # a worker does not take a unit from itself
                return None
        if not self._create(held.unit, held.attempt):
            return None
        with self._lock:
            self._held[unit] = held
        return held

    def renew_due(self) -> None:
        """Create the next attempt of each lease whose time is half over. If another worker took the
        unit meanwhile, both label it, and the first part counts.
        """
        for held in self.held:
            now = self._clock()
            if held.lost or now - held.renewed < _RENEWED_AFTER * self._job.lease_seconds:
                continue
            if self._create(held.unit, held.attempt + 1):
                held.attempt, held.renewed = held.attempt + 1, now
            else:
                held.lost = True

    def done(self, unit: int) -> None:
        """Forget the unit's lease: its part exists, and nobody takes it again."""
        with self._lock:
            self._held.pop(unit, None)

    def release_all(self) -> int:
        """Let others take this worker's units at once; returns how many there were. If the store
        does not answer, others take them when the leases end.
        """
        count = 0
        for held in self.held:
            if not held.lost:
                with suppress(StorageError):
                    self._store.create(released_key(held.unit, held.attempt), b"")
            self.done(held.unit)
            count += 1
        return count

    def _create(self, unit: int, attempt: int) -> bool:
        lease = {"schema_version": SCHEMA, "unit": unit, "attempt": attempt, "worker": self._worker}
        try:
            self._store.create(lease_key(unit, attempt), json.dumps(lease | self._about).encode())
        except AlreadyExists:
            return False
        return True
