"""Pieces of a staged base that are read ahead of their use, into plain memory.

Hashing costs 0.8 s of a core per GiB, spread over all cores; pieces wait in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Place = tuple[int, int]  # number of an object, and of a piece in it
_THREADS = 32
_END_S = 0.5  # for reads still under way at the end


class PiecesAhead:
    """Reads pieces of a staged base into plain memory by `read`, from now on and in this order, and
    hands out each once. The caller reads a piece that was not brought, so none is read twice.
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
        """The piece's verified bytes; waits if they are being read. None where the caller has to
        read them.
        """
        with self._changed:
            if place in self._todo:
                self._todo.remove(place)
                self._wanted.remove(place)
            self._changed.wait_for(lambda: place in self._brought or place not in self._wanted)
            self._wanted.discard(place)
            return self._brought.pop(place, None)

    def close(self) -> None:
        """Drop the pieces that nobody took, and end the threads."""
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
                if piece_B is None:  # all may fail like this one: leave them to a caller with patience
                    self._wanted -= {place, *self._todo}
                    self._todo.clear()
                elif place in self._wanted:
                    self._brought[place] = piece_B
                self._changed.notify_all()

    def _brought_now(self, place: Place) -> npt.NDArray[np.uint8] | None:
        try:
            piece_B = np.empty(self._size_of(place), np.uint8)
            self._read(place, piece_B.data)
        except BaseException:  # the caller who needs the piece meets it again and raises it
            return None
        return piece_B

    def _next(self) -> Place | None:
        with self._changed:
            return self._todo.popleft() if self._todo and not self._closed else None
