"""Which process asks which requests, and with how many dollars: a log of claims in a store. Every
process appends to the log before it sends anything.

A claim names requests and reserves the most that each can cost. Only a process that knows all
earlier entries can create entry N, so no two processes claim one request, and dollars spent and
reserved together never pass the cap, whatever the order of answers. An answer replaces its
reservation by its cost. A killed process leaves claims without answers: these may have been paid
for, so they count in full and are sent again only on request.

The price: one small object per batch of requests that begin together, and a process that resumes
reads all of them.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from emotion_train.errors import AlreadyExists
from emotion_train.hosted.answers import Answers, Nano, patiently, read_or_none
from emotion_train.storage.document import FrozenModel, Manifest
from emotion_train.storage.store import Store

CLAIMS = "claims"
_SLACK_S = 60.0  # that clocks of two machines may differ by
_ended: set[str] = set()  # sessions of this process that are over


class Session(FrozenModel):
    """A process that claims requests."""

    machine: str
    process: int
    began: str  # differs from that of a later process with the same number
    token: str

    @classmethod
    def of_this_process(cls) -> Session:
        process = os.getpid()
        return cls(
            machine=_machine(), process=process, began=_began(process) or "", token=secrets.token_hex(8)
        )

    def is_alive(self, until: float) -> bool:
        """Whether the process may still answer its claim. A process on this machine is looked up;
        one on another machine counts as alive until `until`, its claim's time in seconds since
        1970.
        """
        if self.token in _ended:
            return False
        if self.machine == _machine() and os.name != "nt":  # Windows has no such look-up
            began = _began(self.process)
            return began is not None and began == self.began
        return time.time() < until + _SLACK_S

    def end(self) -> None:
        """Note that this process sends nothing more in this session."""
        _ended.add(self.token)


def _machine() -> str:
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):  # each container of a machine numbers its processes itself
        boot += f" {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {boot}".strip()


def _began(process: int) -> str | None:
    """The process's start time, which tells it from others with its number; None where no such
    process runs.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _by_signal(process)
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def _by_signal(process: int) -> str | None:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


class Claim(Manifest):
    """Requests that a process is about to send, and the reservation of each. The claim is over at
    `until` at the latest, in seconds since 1970.
    """

    schema_version: Literal["emotion-train/claim/1"] = "emotion-train/claim/1"
    session: Session
    until: float
    requests: tuple[str, ...] = ()
    nano_usd: tuple[Nano, ...] = Field((), description="The most that each request can cost.")
    released: tuple[str, ...] = Field((), description="Claimed earlier, and given back without cost.")


class Wanted(NamedTuple):
    """A request and the most that it can cost."""

    request: str
    nano: int


class Ledger:
    """The claims below a prefix of a store, with the answers that settle them. Every process has
    its own ledger, which is safe for use from several threads.
    """

    def __init__(self, store: Store, answers: Answers, prefix: str = "", longest_s: float = 600.0) -> None:
        self._store = store
        self._answers = answers
        self._prefix = f"{prefix}/" if prefix else ""
        self._longest_s = longest_s
        self._session = Session.of_this_process()
        self._claims: list[Claim] = []
        self._reserved: dict[str, int] = {}  # for each request that any process claimed
        self._claim_of: dict[str, Claim] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Read new claims and answers of all processes."""
        with self._lock:
            self._read_claims()
        self._answers.read(self.open_requests())

    def open_requests(self) -> list[str]:
        """Requests that were claimed and have no known answer."""
        with self._lock:
            return [request for request in self._claim_of if self._answers.known(request) is None]

    def is_claimed(self, request: str) -> bool:
        return request in self._claim_of

    def is_lost(self, request: str) -> bool:
        """Whether a process that is gone claimed the request and stored no answer."""
        claim = self._claim_of.get(request)
        if claim is None or self._answers.known(request) is not None:
            return False
        if claim.session.is_alive(claim.until):
            return False
        self._answers.read([request])  # the process may have stored it in its last moment
        return self._answers.known(request) is None

    def spent(self) -> int:
        """Billionths of a dollar spent or reserved: a request without an answer counts with the
        most that it can cost.
        """
        with self._lock:
            return self._spent()

    def spent_on(self, requests: Iterable[str]) -> int:
        """Billionths of a dollar for these requests only, earlier attempts at them included."""
        wanted = {request.partition("-")[0] for request in requests}
        with self._lock:
            return sum(
                self._cost(request) for request in self._reserved if request.partition("-")[0] in wanted
            )

    def claim(self, wanted: Sequence[Wanted], cap: int | None) -> list[str]:
        """Claim, from the first on, the requests that nobody has claimed and that fit under the
        cap; returns their names. Raises `StorageError`.
        """
        with self._lock:
            while True:
                chosen = self._affordable(wanted, cap)
                if not chosen:
                    return []
                requests, nano = (tuple(column) for column in zip(*chosen, strict=True))
                if self._append(self._entry(requests=requests, nano_usd=nano)):
                    return list(requests)

    def release(self, requests: Sequence[str]) -> None:
        """Give back requests that this process claimed and that cost nothing. Raises
        `StorageError`.
        """
        with self._lock:
            while not self._append(self._entry(released=tuple(requests))):
                pass

    def begin(self) -> None:
        """Begin a new session of this process: nothing that it claimed before is under way."""
        self._session = Session.of_this_process()

    def end(self) -> None:
        """Note that this process sends nothing more."""
        self._session.end()

    def _affordable(self, wanted: Iterable[Wanted], cap: int | None) -> list[Wanted]:
        left = None if cap is None else cap - self._spent()
        chosen: list[Wanted] = []
        for one in wanted:
            if one.request in self._claim_of:
                continue
            if left is not None:
                if one.nano > left:
                    break
                left -= one.nano
            chosen.append(one)
        return chosen

    def _entry(self, **content: Any) -> Claim:
        return Claim(session=self._session, until=time.time() + self._longest_s, **content)

    def _append(self, entry: Claim) -> bool:
        """Append the entry. False where another process appended first, whose entries are read."""
        key = self._key(len(self._claims))
        try:
            patiently(lambda: self._store.create(key, entry.to_bytes()))
        except AlreadyExists:
            self._read_claims()
            return False
        self._add(entry)
        return True

    def _spent(self) -> int:
        return sum(map(self._cost, self._reserved))

    def _cost(self, request: str) -> int:
        answer = self._answers.known(request)
        return self._reserved[request] if answer is None else answer.nano_usd

    def _read_claims(self) -> None:
        while (entry := read_or_none(Claim, self._store, self._key(len(self._claims)))) is not None:
            self._add(entry)

    def _add(self, entry: Claim) -> None:
        self._claims.append(entry)
        for request, nano in zip(entry.requests, entry.nano_usd, strict=True):
            self._claim_of[request] = entry
            self._reserved[request] = nano
        for request in entry.released:
            self._claim_of.pop(request, None)
            self._reserved.pop(request, None)

    def _key(self, number: int) -> str:
        return f"{self._prefix}{CLAIMS}/{number:08d}.json"
