"""All ranks of a starting run ask its stores together: they wait for a rank without an answer, and
end together.

Every request of the start to a store goes through `PatientStart`. The price: one more small
all-reduce for each request, and two a second while a store is away. Letters: R = rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from emotion_train.errors import EmotionTrainError, NotStarted, Preempted
from emotion_train.processes.interruption import Interruptions
from emotion_train.storage.patience import StoreRequest
from emotion_train.training.job import end_even_if_stuck

T = TypeVar("T")
_LOOK_EVERY_S = 0.5  # how often the ranks tell each other that they wait
_END_AFTER_S = 2.0


class PatientStart:
    """Asks on every rank or on rank 0, again while a store does not answer, for `timeout_s` seconds
    a request.

    Meanwhile no rank waits for another for more than a moment, so that `distributed.timeout_s` ends
    nothing. A preemption notice to any rank ends the start of all: with 33 where the newest state
    of the run is known to be in its log (`note_saved`), else with 1.
    """

    def __init__(self, interruptions: Interruptions, timeout_s: float, say: Callable[[str], None]) -> None:
        self._interruptions = interruptions
        self._ranks = interruptions.ranks
        self._timeout_s = timeout_s
        self._say = say
        self._saved = False

    def note_saved(self, saved: bool) -> None:
        """Note whether the newest state of the run is in its log; called on rank 0 once the log is
        read.
        """
        self._saved = saved

    def everywhere(self, what: str, url: str, action: Callable[[], T]) -> T:
        """The result of `action` on each rank; called on all ranks. An `EmotionTrainError` of one
        rank is raised on every rank.

        Raises `NotStarted` when the store has not answered in time, and when a preemption notice or
        Ctrl-C comes during the wait.
        """
        return self.answer(StoreRequest(what, url, action, self._timeout_s))

    def only_on_main(self, what: str, url: str, action: Callable[[], T]) -> T | None:
        """The result of `action` on rank 0, None elsewhere; called on all ranks. Raises as
        `everywhere` does.
        """
        if not self._ranks.is_main:
            self._together(None)
            return None
        return self.everywhere(what, url, action)

    def on_main(self, what: str, url: str, action: Callable[[], T]) -> T:
        """Rank 0's result of `action`, on every rank; raises as `everywhere` does."""
        return cast(T, self._ranks.from_main(self.only_on_main(what, url, action)))

    def answer(self, request: StoreRequest[T]) -> T:
        """The result of a request that may have begun earlier; called on all ranks, each with its
        own. Raises as `everywhere`.
        """
        self._together(request)
        return request.result()

    def _together(self, request: StoreRequest[T] | None) -> None:
        """Return on all ranks when the requests of all have ended well."""
        while True:
            ended = request is None or request.wait(_LOOK_EVERY_S)
            failure = _failure(request) if request is not None and ended else None
            waits = request is not None and request.is_waiting
            own = [not ended, failure is not None, waits, self._interruptions.going()]
            pending_R, failed_R, waiting_R, going_R = self._of_all_ranks(own)
            if failed_R.any():
                raise self._first(failure)
            if not pending_R.any():
                return
            if waiting_R.any() and going_R.any():
                self._leave(request)
            elif request is not None and self._ranks.rank == waiting_R.argmax():
                self._tell(request)

    def _of_all_ranks(self, own: list[bool]) -> npt.NDArray[np.bool_]:
        """The answer of each rank (second axis) to each of these questions (first axis)."""
        said = np.zeros((len(own), self._ranks.world_size))
        said[:, self._ranks.rank] = own
        return self._ranks.sum(said) > 0

    def _tell(self, request: StoreRequest[T]) -> None:
        if (words := request.news()) is not None:
            self._say(words)

    def _first(self, failure: EmotionTrainError | None) -> EmotionTrainError:
        """The failure of the lowest rank that has one, on every rank."""
        found = next((one for one in self._ranks.gather(failure) if one is not None), None)
        return cast(EmotionTrainError, self._ranks.from_main(found))

    def _leave(self, request: StoreRequest[T] | None) -> None:
        """Wait for the end of the preempted machine; returns when the notice was withdrawn."""
        nothing = "A store did not answer another process of the run; nothing was trained in this start."
        words, saved = self._ranks.from_main((request.unanswered() if request else nothing, self._saved))
        try:
            self._interruptions.hold(words, Preempted if saved else NotStarted)
        except EmotionTrainError as error:  # threads may still wait for the store
            end_even_if_stuck(_END_AFTER_S, error.exit_code)
            raise


def _failure(request: StoreRequest[T]) -> EmotionTrainError | None:
    """The error of an ended request, None without one; a defect is raised at once."""
    try:
        request.result()
    except EmotionTrainError as error:
        return error
    return None
