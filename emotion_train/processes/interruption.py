"""What interrupts training between two steps: a due save, a preemption notice, a save that failed
for good.

Each rank sends what it knows, and all ranks act on the same answer at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from emotion_train.errors import EmotionTrainError, Preempted
from emotion_train.processes.ranks import Ranks, Signal

if TYPE_CHECKING:
    from emotion_train.processes.notices import Notice

GOING = Signal.STOP | Signal.LEAVE
_KINDS = {
    "rebalance": Signal.REBALANCE,
    "terminate": Signal.STOP,
    "sigterm": Signal.STOP,
    "sigint": Signal.LEAVE,
}
_LOOK_EVERY_S = 0.5


class Interruptions:
    """This rank's part of the exchange between ranks. `notice` gives the machine's latest notice,
    and `hold_s` is the time to wait for the kill.
    """

    def __init__(
        self, ranks: Ranks, notice: Callable[[], Notice | None], hold_s: float, tell: Callable[[str], None]
    ) -> None:
        self.ranks = ranks
        self._notice = notice
        self._hold_s = hold_s
        self._tell = tell
        self._said: int | None = None  # serial of the notice last sent to the other ranks

    def exchange(self, own: Signal = Signal.NONE) -> Signal:
        """The signals that any rank sent by the last call (with one process: by this one); each
        notice is sent once.
        """
        return self.ranks.exchange(own | self._news())

    def exchange_now(self) -> Signal:
        """The signals that any rank sent by now, in this call included; waits for all ranks."""
        return self.ranks.exchange_now(self._news())

    def going(self) -> bool:
        """Whether this rank knows that it will end; other ranks may not know it yet."""
        return self._kind() in ("terminate", "sigterm", "sigint")

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until this rank knows that it will end."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self.going():
            time.sleep(min(_LOOK_EVERY_S, left))

    def hold(self, saved: str, end: Callable[[str], EmotionTrainError] = Preempted) -> None:
        """Wait until the process is killed; `saved` says how far the run is saved.

        Returns when the termination was withdrawn on every rank. Raises `Preempted`, or the error
        that `end` makes of the sentence, after `hold_s` seconds, and at once after SIGINT.
        """
        notice = self._notice()
        self._tell(f"{notice.words if notice is not None else 'Another machine of this run goes'}: {saved}")
        deadline = time.monotonic() + self._hold_s
        while True:
            kind = self._kind()
            going = kind in ("terminate", "sigterm")
            over = self.ranks.is_main and time.monotonic() >= deadline
            any_going, any_left, time_over = self.ranks.sum(np.array([going, kind == "sigint", over])) > 0
            if any_left or (any_going and time_over):
                raise end(f"{saved} The next start resumes from there.")
            if not any_going:
                self._tell("The termination was withdrawn: training continues")
                return
            time.sleep(min(_LOOK_EVERY_S, max(0.0, deadline - time.monotonic())))

    def _kind(self) -> str | None:
        notice = self._notice()
        return None if notice is None else notice.kind

    def _news(self) -> Signal:
        notice = self._notice()
        if notice is None or notice.serial == self._said:
            return Signal.NONE
        self._said = notice.serial
        return _KINDS[notice.kind]
