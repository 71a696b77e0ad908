"""`emotion-launch label-status`: how far a labelling job is, from listings of its store: units
done, leased and left, posts a second, the time left, and dollars.

Prices come from the newest leases alone; a job of any size costs three requests and a page for each
1,000 objects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from emotion_train.console import counted
from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.errors import ObjectNotFound, StorageError
from emotion_train.labelling.job import Job, read_job
from emotion_train.labelling.leases import Board, lease_key
from emotion_train.labelling.summary import Success, find_success
from emotion_train.progress import rough
from emotion_train.storage.store import Store

_LEASES_READ = 64
_RECENT_S = 1800.0  # the pace is that of the parts of the last half hour
_OFTEN_TAKEN = 4  # attempts that no renewal explains
_NAMED = 5


@dataclass(frozen=True)
class Status:
    """How far a job is; None where a figure is not known yet. Where units are whole files,
    `posts_done`, pace, time left and dollars are estimates.
    """

    units: int
    done: int
    leased: int
    posts: int | None
    posts_done: int
    posts_per_second: float | None
    seconds_left: float | None
    usd: float | None
    usd_left: float | None
    workers: tuple[str, ...]
    often_taken: tuple[int, ...]

    @property
    def left(self) -> int:
        """Units that nobody has."""
        return self.units - self.done - self.leased

    def lines(self) -> list[str]:
        """The lines that a person reads."""
        posts = "" if self.posts is None else f" of {self.posts:,}"
        lines = [
            f"units   {self.done:,} of {self.units:,} done, {self.leased:,} leased, {self.left:,} left",
            f"posts   {self.posts_done:,}{posts}",
        ]
        if self.posts_per_second is not None:
            left = "" if self.seconds_left is None else f", {rough(self.seconds_left)} left"
            workers = counted(len(self.workers), "worker")
            lines.append(f"pace    {self.posts_per_second:,.1f} posts/s by {workers}{left}")
        if self.usd is not None:
            more = "" if self.usd_left is None else f", about ${self.usd_left:,.2f} to come"
            lines.append(f"dollars about ${self.usd:,.2f} for the units done{more}")
        if self.often_taken:
            named = ", ".join(map(str, self.often_taken[:_NAMED]))
            lines.append(
                f"look at units {named}: taken {_OFTEN_TAKEN} times and more without a part, so they may end"
                " their workers"
            )
        return lines


def status_of(job: Job, board: Board, leases: Sequence[dict[str, Any]]) -> Status:
    """The status from the listing of the store; `leases` are the contents of some leases of units
    at work.
    """
    rows = [unit.rows for unit in job.units]
    known = [count for count in rows if count is not None]
    mean = round(sum(known) / len(known)) if known else 0

    def rows_of(unit: int) -> int:
        count = rows[unit]
        return mean if count is None else count

    posts_done = sum(rows_of(unit) for unit in board.parts if unit < board.units)
    recent = {
        unit: since
        for unit, info in board.parts.items()
        if (since := info.modified) is not None and since > board.now - _RECENT_S
    }
    at_work = [unit for unit in board.left if board.is_leased(unit)]
    began = min(
        (board.leases[unit].first for unit in [*recent, *at_work] if unit in board.leases), default=board.now
    )
    span = min(_RECENT_S, board.now - began)
    pace = sum(map(rows_of, recent)) / span if recent and span > 0 else None
    posts_left = sum(map(rows_of, board.left))
    seconds_left = posts_left / pace if pace else None
    prices = [
        float(one["usd_per_hour"]) for one in leases if isinstance(one.get("usd_per_hour"), int | float)
    ]
    workers = tuple(sorted({str(one.get("worker")) for one in leases}))
    price = sum(prices) / len(prices) if prices else None
    held_s = sum(
        max(0.0, (info.modified or board.now) - board.leases[unit].since)
        for unit, info in board.parts.items()
        if unit in board.leases
    )
    return Status(
        units=board.units,
        done=sum(unit < board.units for unit in board.parts),
        leased=len(at_work),
        posts=job.rows,
        posts_done=posts_done,
        posts_per_second=pace,
        seconds_left=seconds_left,
        usd=None if price is None else held_s / 3600 * price,
        usd_left=None
        if price is None or seconds_left is None
        else seconds_left / 3600 * price * max(1, len(workers)),
        workers=workers,
        often_taken=tuple(
            unit for unit in board.left if unit in board.leases and board.leases[unit].attempt >= _OFTEN_TAKEN
        ),
    )


def read_status(store: Store, job: Job) -> Status:
    """How far the job is now."""
    board = Board.look(store, job)
    newest = sorted(board.leases.items(), key=lambda one: -one[1].since)[:_LEASES_READ]
    at_work = [(unit, one) for unit, one in newest if unit not in board.parts and board.is_leased(unit)]

    def content(unit: int, attempt: int) -> dict[str, Any]:
        try:
            return object_in(store.read(lease_key(unit, attempt)))
        except (ObjectNotFound, Unreadable):
            return {}

    with ThreadPoolExecutor(8) as readers:
        read = list(readers.map(lambda one: content(one[0], one[1].attempt), at_work or newest[:1]))
    return status_of(job, board, read)


def show(store: Store, console: Console) -> None:
    """Print how far the job is, or its summary. Raises `WrongRequest` where there is none."""
    job = read_job(store)
    success = find_success(store, job)
    _print(console, store, job, success or read_status(store, job))


def watch(
    store: Store, every_s: float, console: Console, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Print the status every `every_s` seconds until the job is done, also where the store does not
    answer for a while.
    """
    job = read_job(store)
    while True:
        try:
            success = find_success(store, job)
            _print(console, store, job, success or read_status(store, job))
            if success is not None:
                return
        except StorageError as error:
            if not error.transient:
                raise
            console.print(f"asked again in {every_s:g} s: {error}")
        sleep(every_s)


def _print(console: Console, store: Store, job: Job, found: Status | Success) -> None:
    names = ", ".join(adapter.name for adapter in job.adapters)
    console.print(f"job     {job.id} at {store.url}: {job.source} by {names}")
    for line in found.lines():
        console.print(line)
