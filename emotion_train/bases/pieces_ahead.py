"""Pieces of a staged base that are read before anything can take them, into plain memory.

Hashing costs a core 0.8 s a GiB, on as many cores as there are; what is read waits in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Place = tuple[int, int]  # number of an object, and of a piece in it
_THREADS = 32
_END_S = 0.5  # for reads that are on their way when nobody wants them any more


class PiecesAhead:
    """Pieces of a staged base, which `read` fills a buffer with, in plain memory: each is read from
    now on, in this order, and handed out once. A piece that was not brought is read by who needs
    it, so none is read twice.
    """

    def __init__(
        self,
        places: Sequence[Place],
        size_of: Callable[[Place], int],
        read: Callable[[Place, memoryview], None],
    ) -> None:
        self._size_of, self._read = size_of, read
        self._todo = deque(places)
        self._wanted = set(places)  # neither taken nor failed
        self._brought: dict[Place, npt.NDArray[np.uint8]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name="ahead", daemon=True)
            for _ in range(min(_THREADS, len(places)))
        ]
        for thread in self._threads:
            thread.start()

    def take(self, place: Place) -> npt.NDArray[np.uint8] | None:
        """The piece's verified bytes, waited for where they are on their way; None where the caller
        has to read them.
        """
        with self._changed:
            if place in self._todo:
                self._todo.remove(place)
                self._wanted.remove(place)
            self._changed.wait_for(lambda: place in self._brought or place not in self._wanted)
            self._wanted.discard(place)
            return self._brought.pop(place, None)

    def close(self) -> None:
        """Let go of what nobody took, and end the threads."""
        with self._changed:
            self._closed = True
            self._todo.clear()
            self._wanted.clear()
            self._brought.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_END_S / len(self._threads))

    def _work(self) -> None:
        while (place := self._next()) is not None:
            piece_B = self._brought_now(place)
            with self._changed:
                if piece_B is None:  # what fails once may fail for all: they are left to who has patience
                    self._wanted -= {place, *self._todo}
                    self._todo.clear()
                elif place in self._wanted:
                    self._brought[place] = piece_B
                self._changed.notify_all()

    def _brought_now(self, place: Place) -> npt.NDArray[np.uint8] | None:
        try:
            piece_B = np.empty(self._size_of(place), np.uint8)
            self._read(place, piece_B.data)
        except BaseException:  # whoever needs the piece meets it again, and says it
            return None
        return piece_B

    def _next(self) -> Place | None:
        with self._changed:
            return self._todo.popleft() if self._todo and not self._closed else None
