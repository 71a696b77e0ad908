"""One worker: takes a unit, reads and tokenises it ahead of the GPU, writes its part behind the
GPU, and takes the next, until every unit has its part.

Three threads: one takes units and makes batches, the caller's keeps the device busy, one writes. A
worker holds a few batches of 1,024 posts in memory. A worker that finds no free unit waits for the
units of others, up to one unit's time: one of them may die and leave its unit.
"""

from __future__ import annotations

import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from emotion_train.errors import AlreadyExists, StorageError, WrongRequest
from emotion_train.evaluation.decision import Decision
from emotion_train.labelling.job import Job, Reading, part_key
from emotion_train.labelling.leases import Board, Held, Leases
from emotion_train.labelling.part import PartFacts, PartWriter
from emotion_train.labelling.planning import FoundSource
from emotion_train.labelling.rows import Rows, rows_of_unit
from emotion_train.labelling.summary import Success, find_success, finish
from emotion_train.progress import ProgressLine
from emotion_train.storage.patience import Patience, until_it_answers
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    from emotion_train.data.packing import Pack
    from emotion_train.labelling.scorer import Pending, Scorer

T = TypeVar("T")
POSTS_AT_A_TIME = 1024
_BATCHES_AHEAD = 6
_BATCHES_BEHIND = 6
_WAIT_S = 0.2
_LOOK_EVERY_S = 2.0  # at other workers' units, where none is free
_DRAIN_S = 20.0  # for a part that is being written at a preemption notice


class Stopped(Exception):
    """The worker was asked to stop, and did."""


@dataclass(frozen=True)
class Batch:
    """Posts of one unit as they go to the device; `last` marks the unit's last batch."""

    held: Held
    rows: Rows
    packs: Sequence[Pack]
    posts: int  # with a text
    last: bool


@dataclass(frozen=True)
class About:
    """What a worker's leases and parts record of it."""

    worker: str
    device: str
    usd_per_hour: float | None = None


@dataclass
class Pace:
    """What a worker has done. `waiting_s`: how long its device waited for posts."""

    posts: int = 0
    units: int = 0
    others: int = 0  # units whose part another worker was quicker with
    waiting_s: float = 0.0
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def seconds(self) -> float:
        """From the worker's start to its end, or until now."""
        return (time.monotonic() if self.ended is None else self.ended) - self.began


class Worker:
    """Labels units of a job until none is left. `stopping` says whether it is to stop; `tell` gets
    messages for a person. It waits up to `patience_s` for a store that does not answer.
    """

    def __init__(
        self,
        store: Store,
        job: Job,
        source: FoundSource,
        scorer: Scorer,
        decision: Decision,
        about: About,
        *,
        stopping: Callable[[], bool] = lambda: False,
        on_bad_stop: bool = False,
        patience_s: float = 3600.0,
        tell: Callable[[str], None] = lambda message: None,
        look_every_s: float = _LOOK_EVERY_S,
    ) -> None:
        self._store = store
        self._job = job
        self._source = source
        self._scorer = scorer
        self._decision = decision
        self._about = about
        self._stopping = stopping
        self._on_bad_stop = on_bad_stop
        self._patience_s = patience_s
        self._tell = tell
        self._look_every_s = look_every_s
        self._telling = Patience()
        facts: dict[str, object] = {"device": about.device, "usd_per_hour": about.usd_per_hour}
        self.leases = Leases(store, job, about.worker, facts)
        self.left = 0  # units that it had when it ended
        self.pace = Pace()
        self._ended = threading.Event()
        self._look = threading.Event()  # set when a part of its own exists, or at the end
        self._writers: dict[int, PartWriter] = {}
        self._marked = time.monotonic()  # when the part before was handed to the writer

    def run(self) -> Success:
        """Label until the job is done; returns its summary.

        Raises `Stopped` where it was asked to stop, after releasing its units; `StorageError` where
        the store does not answer; `WrongRequest` for a source that changed, and with `on_bad_stop`
        for a bad row.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="emotion-train-label-") as folder:
                self._label(Path(folder))
            return self._finish()
        except StorageError as error:
            if error.transient and self._stopping():
                raise Stopped from error
            raise
        finally:
            self._end()
            self.left = self.leases.release_all()
            self.pace.ended = time.monotonic()

    def _end(self) -> None:
        self._ended.set()
        self._look.set()

    # --- the device ---

    def _label(self, folder: Path) -> None:
        ahead = _Ahead(self._batches, self._ended)
        behind = _Behind(lambda batch, prob_NC, seconds: self._write(folder, batch, prob_NC, seconds))
        try:
            with ahead, behind, ProgressLine("labelling", self._job.rows or 0, "posts") as line:
                try:
                    self._keep_busy(ahead, behind, line)
                except BaseException:
                    self._end()
                    raise
        finally:
            for writer in self._writers.values():
                writer.__exit__()

    def _keep_busy(self, ahead: _Ahead, behind: _Behind, line: ProgressLine) -> None:
        """Start each batch before fetching the previous one."""
        running: tuple[Batch, Pending] | None = None
        while True:
            batch = self._next(ahead, behind, wait=running is None)
            started = None
            if isinstance(batch, Batch):
                started = (batch, self._scorer.start(batch.packs, batch.posts))
                self.pace.posts += len(batch.rows)
                line.update(self.pace.posts)
            if running is not None:
                self._hand(behind, *running)
            running = started
            if isinstance(batch, _End):
                return behind.end()

    def _next(self, ahead: _Ahead, behind: _Behind, *, wait: bool) -> Batch | _End | None:
        """The next batch, or the end; None where none is ready and `wait` is off."""
        began = time.monotonic()
        while True:
            if self._stopping():
                raise Stopped
            behind.raise_error()
            item = ahead.get(_WAIT_S if wait else 0.0)
            if item is not None or not wait:
                self.pace.waiting_s += time.monotonic() - began if wait else 0.0
                return item

    def _hand(self, behind: _Behind, batch: Batch, pending: Pending) -> None:
        prob_NC = pending.result()
        now = time.monotonic()
        seconds = now - self._marked
        if batch.last:
            self._marked = now
        while not behind.put((batch, prob_NC, seconds), _WAIT_S):
            behind.raise_error()

    # --- ahead of it ---

    def _batches(self) -> Iterator[Batch]:
        """Batches, unit after unit, as long as there are units."""
        while (held := self._take()) is not None:
            yield from self._of_unit(held)

    def _of_unit(self, held: Held) -> Iterator[Batch]:
        before: Batch | None = None
        for rows in self._patiently_read(held):
            self._refuse_bad(held, rows)
            for start in range(0, max(1, len(rows)), POSTS_AT_A_TIME):
                if before is not None:
                    yield before
                before = self._batch(held, rows.cut(start, start + POSTS_AT_A_TIME), last=False)
        last = before or self._batch(held, Rows([], [], []), last=True)
        yield Batch(held, last.rows, last.packs, last.posts, last=True)

    def _batch(self, held: Held, rows: Rows, *, last: bool) -> Batch:
        texts = [text for text in rows.texts if text is not None]
        return Batch(held, rows, self._scorer.packs(texts), len(texts), last)

    def _patiently_read(self, held: Held) -> Iterator[Rows]:
        """The unit's rows. After a failure of the store they are read again from the start, and
        batches that already came are left out.
        """
        came = 0
        patience = Patience(self._patience_s)
        while True:
            seen = 0
            try:
                for rows in rows_of_unit(self._source, self._job.units[held.unit], self._reading):
                    seen += 1
                    if seen > came:
                        came = seen
                        patience = Patience(self._patience_s)
                        yield rows
                return
            except StorageError as error:
                if not error.transient or patience.left_s <= 0:
                    raise
                self._waits(error)
                if self._ended.wait(patience.next_pause_s()):
                    raise

    @property
    def _reading(self) -> Reading:
        return self._job.reading

    def _refuse_bad(self, held: Held, rows: Rows) -> None:
        for number, error in zip(rows.numbers, rows.errors, strict=True):
            if error is not None and self._on_bad_stop:
                file = self._job.files[self._job.units[held.unit].file].key
                raise WrongRequest(
                    f"Row {number} of {file} cannot be labelled: {error}. Mend it and label into another"
                    " OUT_URL, or leave out --on-bad stop: the row then holds the error."
                )

    def _take(self) -> Held | None:
        """A unit that nobody has; waits while others have all. None once every part exists."""
        while not self._ended.is_set():
            self._look.clear()
            board = self._board()
            if not board.left or board.success:
                return None
            if (held := self._patient(partial(self.leases.take, board))) is not None:
                return held
            self._look.wait(self._look_every_s)
        return None

    # --- behind it ---

    def _write(self, folder: Path, batch: Batch, prob_NC: object, seconds: float) -> None:
        unit = batch.held.unit
        path = folder / part_key(unit)
        writer = self._writers.get(unit)
        if writer is None:
            writer = self._writers[unit] = PartWriter(path, self._job, unit, self._decision)
        writer.add(batch.rows, prob_NC)  # type: ignore[arg-type]
        if batch.last:
            writer.close(self._facts(writer, unit, seconds))
            self._publish(path, unit)
            del self._writers[unit]
            writer.__exit__()
        self._patient(self.leases.renew_due)

    def _facts(self, writer: PartWriter, unit: int, seconds: float) -> PartFacts:
        return PartFacts(
            job=self._job.id,
            unit=unit,
            rows=writer.rows,
            blank=writer.blank,
            errors=writer.errors,
            seconds=seconds,
            worker=self._about.worker,
            device=self._about.device,
            usd_per_hour=self._about.usd_per_hour,
        )

    def _publish(self, path: Path, unit: int) -> None:
        """Create the part, unless another worker was quicker."""
        try:
            self._patient(lambda: self._store.create(part_key(unit), path))
            self.pace.units += 1
        except AlreadyExists:
            self.pace.others += 1
        self.leases.done(unit)
        self._look.set()

    # --- the end ---

    def _finish(self) -> Success:
        """The summary, by this worker or another."""
        while True:
            if self._stopping():
                raise Stopped
            if (success := self._patient(lambda: find_success(self._store, self._job))) is not None:
                return success
            board = self._board()
            if self._patient(partial(self.leases.take_unit, board, board.units)) is not None:
                success = self._patient(partial(self._summarise, board))
                self.leases.done(board.units)
                return success
            self._ended.wait(self._look_every_s)

    def _board(self) -> Board:
        return self._patient(lambda: Board.look(self._store, self._job))

    def _summarise(self, board: Board) -> Success:
        with ProgressLine("checking", len(self._job.units), "parts") as line:

            def each(done: int) -> None:
                line.update(done)
                if self._stopping():
                    raise Stopped
                self.leases.renew_due()

            return finish(self._store, self._job, board, each)

    # --- the store ---

    def _patient(self, action: Callable[[], T]) -> T:
        """What `action` returns, tried again while the store does not answer."""
        return until_it_answers(action, Patience(self._patience_s), self._pause, self._waits)

    def _pause(self, seconds: float) -> bool:
        """Wait; returns True where the worker is to stop."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._ended.wait(min(_WAIT_S, left)) or self._stopping():
                return True
        return False

    def _waits(self, error: StorageError) -> None:
        if self._telling.may_tell():
            self._tell(f"WAITING for the store: {error}")


class _End:
    """Stands for the end of the batches."""


class _Ahead:
    """Runs an iterator in a thread of its own, as far ahead as the queue is long."""

    def __init__(self, make: Callable[[], Iterator[Batch]], ended: threading.Event) -> None:
        self._make = make
        self._ended = ended
        self._ready: queue.Queue[Batch | BaseException | _End] = queue.Queue(_BATCHES_AHEAD)
        self._thread = threading.Thread(target=self._work, name="label-reader", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._thread.join(_DRAIN_S)

    def get(self, timeout_s: float) -> Batch | _End | None:
        """The next batch, `_End` at the end, None where none came in time; raises the iterator's
        error.
        """
        try:
            item = self._ready.get(timeout_s > 0, timeout_s or None)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            for batch in self._make():
                if not self._put(batch):
                    return
            self._put(_End())
        except BaseException as error:  # raised where the batches are taken
            self._put(error)

    def _put(self, item: Batch | BaseException | _End) -> bool:
        while not self._ended.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=_WAIT_S)
                return True
        return False


class _Behind:
    """Calls `action` with each item put, in order, in a thread of its own."""

    def __init__(self, action: Callable[..., None]) -> None:
        self._action = action
        self._waiting: queue.Queue[tuple[object, ...] | None] = queue.Queue(_BATCHES_BEHIND)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="label-writer", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        """Wait up to `_DRAIN_S` seconds until all items are done."""
        deadline = time.monotonic() + _DRAIN_S
        while self._thread.is_alive() and time.monotonic() < deadline and not self._put_end():
            pass
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def put(self, item: tuple[object, ...], timeout_s: float) -> bool:
        """Queue an item; returns whether there was room in time."""
        with suppress(queue.Full):
            self._waiting.put(item, timeout=timeout_s)
            return True
        return False

    def end(self) -> None:
        """Return when all items are done; raises the error of `action`."""
        while not self._put_end():
            self.raise_error()
        self._thread.join()
        self.raise_error()

    def _put_end(self) -> bool:
        with suppress(queue.Full):
            self._waiting.put(None, timeout=_WAIT_S)
            return True
        return False

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is None:  # else the queue is only emptied
                try:
                    self._action(*item)
                except BaseException as error:  # raised in the thread of the device
                    self._error = error
