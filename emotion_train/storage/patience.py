"""How to wait for a store that fails: pauses that double, and a message once a minute.

Only failures that may pass are waited for; a store's refusals are raised at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from emotion_train.errors import NotStarted, StorageError

T = TypeVar("T")

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
TELL_EVERY_S = 60.0
_SLOW_S = 2.0  # a slower request may never be answered


class Patience:
    """Pauses of 1, 2, 4, 8, 16, 30, 30 … s until `lasts_s` are over; `reset` after a success.

    `lasts_s` None: for ever. Nothing here waits: the caller waits, and listens for its own end.
    """

    def __init__(self, lasts_s: float | None = None) -> None:
        self._deadline = None if lasts_s is None else time.monotonic() + lasts_s
        self._told: float | None = None
        self._pause_s: float | None = None  # the last one

    @property
    def left_s(self) -> float:
        """Seconds until the patience is over; below zero after that."""
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def next_pause_s(self) -> float:
        """The pause before the next attempt."""
        self._pause_s = FIRST_PAUSE_S if self._pause_s is None else min(2 * self._pause_s, LONGEST_PAUSE_S)
        return self._pause_s

    def may_tell(self) -> bool:
        """True at the first call, and then once a minute."""
        now = time.monotonic()
        if self._told is not None and now - self._told < TELL_EVERY_S:
            return False
        self._told = now
        return True

    def reset(self) -> None:
        """Start again with short pauses: the store answers."""
        self._told, self._pause_s = None, None


def until_it_answers(
    action: Callable[[], T],
    patience: Patience,
    wait: Callable[[float], bool],
    tell: Callable[[StorageError], None],
) -> T:
    """What `action` returns, tried again after each transient `StorageError` until `patience` is
    over: then the error is raised. Other errors are raised at once.

    `tell` gets each failure that is waited for. `wait` sleeps a number of seconds, or returns True
    earlier to end the waiting, which raises the last error.
    """
    while True:
        try:
            return action()
        except StorageError as error:
            if not error.transient or patience.left_s <= 0:
                raise
            tell(error)
            if wait(min(patience.next_pause_s(), max(0.0, patience.left_s))):
                raise


class StoreRequest(Generic[T]):
    """A request to a store at the start of a run: `action`, tried in a thread of its own for
    `lasts_s` seconds, so that the caller can react to signals and other processes even if an
    endpoint never answers.

    `what` and `url` name the request and the store in messages. The thread ends with the process.
    """

    def __init__(self, what: str, url: str, action: Callable[[], T], lasts_s: float) -> None:
        self._what, self._url, self._action, self._lasts_s = what, url, action, lasts_s
        self._patience = Patience(lasts_s)
        self._began = time.monotonic()
        self._ended, self._answered = threading.Event(), threading.Event()
        self._problem: StorageError | None = None  # the last failure that was waited for
        self._values: list[T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="request", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the end; returns whether the request has ended."""
        return self._ended.wait(seconds)

    def look(self, seconds: float) -> bool:
        """Wait up to `seconds` for the first attempt; returns whether the request has ended."""
        self._answered.wait(seconds)
        return self._ended.is_set()

    @property
    def is_waiting(self) -> bool:
        """Whether the store has failed or is slow, so the request may take long."""
        slow = time.monotonic() - self._began > _SLOW_S
        return not self._ended.is_set() and (self._problem is not None or slow)

    def news(self) -> str | None:
        """A message that the store is waited for, once a minute while it fails; else None."""
        if self._problem is None or self._ended.is_set() or not self._patience.may_tell():
            return None
        left_s = max(0.0, self._patience.left_s)
        return f"WAITING for {self._what} at {self._url}, for {left_s:.0f} s more at most: {self._problem}"

    def unanswered(self) -> str:
        """A message on what the request waits for."""
        return f"The start was waiting for {self._what} at {self._url}; nothing was trained in it."

    def result(self) -> T:
        """The result of `action`, once the request has ended. Raises its error, and `NotStarted`
        where the store did not answer in time.
        """
        if isinstance(self._error, StorageError) and self._error.transient:
            raise not_started(self._what, self._url, self._lasts_s, self._error) from self._error
        if self._error is not None:
            raise self._error
        return self._values[0]

    def _work(self) -> None:
        try:
            self._values.append(until_it_answers(self._action, self._patience, _slept, self._failed))
        except BaseException as error:  # raised where the result is asked for
            self._error = error
        self._ended.set()
        self._answered.set()

    def _failed(self, error: StorageError) -> None:
        self._problem = error
        self._answered.set()


def not_started(what: str, url: str, lasts_s: float, error: StorageError) -> NotStarted:
    """The error for a start that has waited `lasts_s` seconds."""
    return NotStarted(
        f"The run did not start: {what} at {url} was waited for {lasts_s:g} s (run.start_timeout_s). {error}"
        " The same command starts it when the store answers."
    )


def _slept(seconds: float) -> bool:
    time.sleep(seconds)
    return False
