"""How to wait for a store that fails: pauses that double, and a word about it once a minute."""

from __future__ import annotations

import time

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
TELL_EVERY_S = 60.0


class Patience:
    """Pauses of 1, 2, 4, 8, 16, 30, 30 … s until `lasts_s` are over; `reset` after a success.

    `lasts_s` None: for ever. Nothing here waits: who waits also listens for its own end.
    """

    def __init__(self, lasts_s: float | None = None) -> None:
        self._deadline = None if lasts_s is None else time.monotonic() + lasts_s
        self._told: float | None = None
        self._pause_s: float | None = None  # the last one

    @property
    def left_s(self) -> float:
        """Seconds until it is over; below zero after that."""
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
        """The store answers again."""
        self._told, self._pause_s = None, None
