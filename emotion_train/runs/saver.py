"""Commits checkpoints in a background thread, so that training waits only for the copy to host
memory.

There is one upload at a time. The newest waiting state replaces the others, except evaluated ones.
While the bucket fails, states also wait in a local folder, from which the next start takes them.
The price: each waiting state, at most five, takes host memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from emotion_train.errors import Fenced, StorageError
from emotion_train.runs.checkpoint import Snapshot, commit
from emotion_train.runs.local_states import LocalStates
from emotion_train.runs.log import Writer
from emotion_train.storage.patience import Patience

# most evaluated states that wait; beyond that, neither the best nor the newest is dropped
_MOST_SCORED = 4
_CLOSE_S = 10.0  # wait of a process that ends for another reason, for its last saved state
# while nothing is saved, the log is asked this often whether another writer has taken over the run;
# each request costs 0.3 cents a day in a bucket
_LOOK_EVERY_S = 5.0
_END_S = 1.0  # for the thread to end


class Committed(NamedTuple):
    """A state that the log has, and how long its upload took."""

    step: int
    bytes: int
    seconds: float


class Saver:
    """Owns `writer` from its claim until it is drained; a context manager that ends the thread.

    `clear_up` is called in the thread after each commit; a store's failure there only gives a
    message.
    """

    def __init__(
        self,
        writer: Writer,
        local: LocalStates,
        tell: Callable[[str], None],
        clear_up: Callable[[], object] = lambda: None,
    ) -> None:
        self._writer = writer
        self._local = local
        self._tell = tell
        self._clear_up = clear_up
        self._waiting: list[Snapshot] = []  # the first is in flight while the thread tries it
        self._in_flight: Snapshot | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._patience = Patience()
        self.failure: BaseException | None = None  # ended the thread: `Fenced`, or a defect
        self.problem: StorageError | None = None  # why the last attempt failed; None when it did not
        self.on_fenced: Callable[[], None] = lambda: None  # called in the thread
        self.upload_seconds = 0.0
        self.newest: Committed | None = None  # of those of this start
        self._thread = threading.Thread(target=self._work, name="saver", daemon=True)

    def __enter__(self) -> Saver:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """End the thread; states that a failing store did not take stay on this machine."""
        if self.failure is None and not self.drain(0 if self.problem is not None else _CLOSE_S):
            self._tell(self.keep_what_waits())
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_END_S)

    def offer(self, snapshot: Snapshot) -> None:
        """Let the thread commit this state, in place of older waiting states without a score."""
        with self._changed:
            self._waiting.append(snapshot)
            self._let_go()
            self._changed.notify_all()

    def make_room(self) -> None:
        """Forget the waiting states that the state to be copied next will replace, so that both are
        never in memory together. While the store fails they stay, as this machine's disk has them.
        """
        with self._changed:
            if self.problem is None:
                self._waiting = [
                    one for one in self._waiting if one is self._in_flight or one.macro_f1 is not None
                ]

    def drain(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s`; returns whether all offered states are committed. Raises the
        error that ended the thread.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._waiting and self.failure is None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))  # a signal's handler runs in between
            self.check()
            return not self._waiting

    def check(self) -> None:
        """Raises the error that ended the thread."""
        if self.failure is not None:
            raise self.failure

    def keep_what_waits(self) -> str:
        """Write the waiting states into the local folder; returns a sentence that says where."""
        with self._changed:
            waiting = list(self._waiting)
        try:
            self._local.keep(waiting, self._writer.incarnation)
        except StorageError as error:
            return f"The newest state cannot be kept on this machine either: {error}"
        return (
            f"The newest state is kept in {self._local.folder}, as {self._writer.store.url} does not take it."
        )

    def _let_go(self) -> None:
        """Forget the states that a newer one replaces."""
        if not self._waiting:
            return
        newest = self._waiting[-1]
        kept = [
            one
            for one in self._waiting
            if one is newest or one is self._in_flight or one.macro_f1 is not None
        ]
        while (
            len(scored := [one for one in kept if one.macro_f1 is not None and one is not self._in_flight])
            > _MOST_SCORED
        ):
            best = max(scored, key=lambda one: one.macro_f1 or 0)
            kept.remove(next(one for one in scored if one is not best and one is not newest))
        self._waiting = kept

    def _work(self) -> None:
        try:
            while (snapshot := self._next()) is not None:
                try:
                    self._commit(snapshot)
                    self._succeeded(snapshot)
                except StorageError as error:
                    self._failed(error)
                    self._wait(self._patience.next_pause_s())
        except BaseException as error:  # handed to the training loop, which raises it
            with self._changed:
                self.failure = error
                self._changed.notify_all()
            if isinstance(error, Fenced):
                self.on_fenced()

    def _commit(self, snapshot: Snapshot) -> None:
        began = time.monotonic()
        try:
            entry = commit(self._writer, snapshot)
            self.newest = Committed(
                entry.step, sum(part.bytes for part in entry.parts), time.monotonic() - began
            )
        finally:
            self.upload_seconds += time.monotonic() - began

    def _next(self) -> Snapshot | None:
        """The state to try now; None when the saver is closed. Raises `Fenced`."""
        while not self._wait_for_a_state():
            with suppress(StorageError):  # a store's failure matters once there is a state to save
                self._writer.require_ownership()
        with self._changed:
            if self._closing:
                return None
            self._in_flight = self._waiting[0]
        if self.problem is not None:
            self.keep_what_waits()
        return self._in_flight

    def _wait_for_a_state(self) -> bool:
        """Whether a state waits or the saver is closed; False when it is time to ask the log."""
        with self._changed:
            self._in_flight = None
            self._let_go()
            if not self._waiting and not self._closing:
                self._changed.wait(_LOOK_EVERY_S)
            return bool(self._waiting) or self._closing

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._closing and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    def _failed(self, error: StorageError) -> None:
        self.problem = error
        kept = self.keep_what_waits()
        if self._patience.may_tell():
            self._tell(f"NOT SAVED, training continues: {error} {kept}")

    def _succeeded(self, snapshot: Snapshot) -> None:
        with self._changed:
            self._waiting.remove(snapshot)
            self._in_flight = None
            all_saved = not self._waiting
            self._changed.notify_all()
        if self.problem is not None:
            self._tell(f"step {snapshot.step} is saved: {self._writer.store.url} takes checkpoints again")
            self.problem = None
            self._patience.reset()
        if all_saved and self._local.in_use:
            self._local.clear()
        try:
            self._clear_up()
        except StorageError as error:
            self._tell(f"Old checkpoints were not cleared away: {error}")
