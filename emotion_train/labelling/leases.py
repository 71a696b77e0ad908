"""Leases spread the units over workers that come and go: who creates the next attempt of a unit has
it until the job's `lease_seconds` are over, by the store's own clock.

A lease saves work and makes nothing right: a worker that was stopped for an hour may label a unit
that another has long done. What makes it right is that parts are created once
(`emotion_train/labelling/part.py`). A lease is renewed by the next attempt, released by an empty
object beside it, and never deleted or written again, so a listing tells all: 1,000 objects a
request.
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
    """The newest attempt at a unit; `since` by the store's clock, `first` that of the first
    attempt.
    """

    attempt: int
    since: float
    first: float
    released: bool

    def holds(self, now: float, lease_s: float) -> bool:
        """Whether some worker may be at work on it."""
        return not self.released and now <= self.since + lease_s + _GRACE_S


@dataclass(frozen=True)
class Board:
    """What lies in a job's store at one moment: parts with their sizes and dates, leases, and the
    store's time. `extra` is the unit beyond the last one, whose lease is that of the summary.
    """

    units: int
    lease_s: float
    now: float
    parts: dict[int, ObjectInfo]
    leases: dict[int, Standing]
    success: bool

    @classmethod
    def look(cls, store: Store, job: Job) -> Board:
        """Three requests, and one more for each 1,000 objects."""
        leases = _standings(store.list(LEASES))
        parts: dict[int, ObjectInfo] = {}
        for info in store.list(PARTS):
            if found := _PART.fullmatch(info.key):
                parts[int(found[1])] = info
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
        """Units that nobody has, from `start` on and round."""
        for step in range(self.units):
            unit = (start + step) % self.units
            if unit not in self.parts and not self.is_leased(unit):
                yield unit


def _standings(listed: Iterator[ObjectInfo]) -> dict[int, Standing]:
    found: dict[int, Standing] = {}
    for info in listed:
        if (match := _LEASE.fullmatch(info.key)) is None:
            continue
        unit, attempt, since = int(match[1]), int(match[2]), info.modified or 0.0
        old = found.get(unit, Standing(-1, since, since, False))
        first = min(old.first, since)
        if attempt > old.attempt:
            found[unit] = Standing(attempt, since, first, match[3] == "released")
        elif attempt == old.attempt:
            # the release of this attempt, whichever of the two is listed first
            found[unit] = Standing(attempt, max(old.since, since), first, True)
        else:
            found[unit] = old._replace(first=first)
    return found


def lease_key(unit: int, attempt: int) -> str:
    return f"{LEASES}{unit:08d}.{attempt:04d}.json"


def released_key(unit: int, attempt: int) -> str:
    return f"{LEASES}{unit:08d}.{attempt:04d}.released"


@dataclass
class Held:
    """A lease of this worker; `renewed` by its own clock, from before the lease was asked for."""

    unit: int
    attempt: int
    renewed: float
    lost: bool = False


class Leases:
    """The leases of one worker. Safe for use from several threads.

    `about` is what a lease says of its worker. `clock` is the time between renewals, for tests.
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
        """A lease of a unit that nobody has, searched from this worker's own place on, so that
        workers do not collide; None where there is no such unit.
        """
        for unit in board.free_from(self._start):
            if (held := self.take_unit(board, unit)) is not None:
                return held
        return None

    def take_unit(self, board: Board, unit: int) -> Held | None:
        """The next attempt at this unit; None where another worker was quicker, or has it."""
        standing = board.leases.get(unit)
        if standing is not None and standing.holds(board.now, board.lease_s):
            return None
        held = Held(unit, 0 if standing is None else standing.attempt + 1, self._clock())
        with self._lock:
            if unit in self._held:  # not to be taken from oneself
                return None
        if not self._create(held.unit, held.attempt):
            return None
        with self._lock:
            self._held[unit] = held
        return held

    def renew_due(self) -> None:
        """Create the next attempt of each lease of which half is over. Where another worker has
        taken it meanwhile both carry on: the first part counts.
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
        """The unit has its part, which says more than a lease."""
        with self._lock:
            self._held.pop(unit, None)

    def release_all(self) -> int:
        """Let others take the units of this worker at once; how many there were. A store that does
        not answer learns of it by the leases' end.
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
        said = {"schema_version": SCHEMA, "unit": unit, "attempt": attempt, "worker": self._worker}
        try:
            self._store.create(lease_key(unit, attempt), json.dumps(said | self._about).encode())
        except AlreadyExists:
            return False
        return True
