"""Pieces of a staged base that are read ahead of their use, into plain memory and, once a device is
known, onto it.

Hashing costs 0.8 s of a core per GiB, spread over all cores; pieces wait in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Place = tuple[int, int]  # number of an object, and of a piece in it
Put = Callable[[Place, npt.NDArray[np.uint8]], Any]  # returns the piece where it waits from then on
_THREADS = 32
_MOVERS = 4  # threads that move pieces which were read before
_END_S = 0.5  # for reads still under way at the end


class PiecesAhead:
    """Reads pieces of a staged base into plain memory by `read`, from now on and in this order, and
    hands out each once. The caller reads a piece that was not brought, so none is read twice.

    After `move` pieces wait where its `put` brings them; the first that it fails for, and those
    after it, wait in plain memory.
    """

    def __init__(
        self,
        places: Sequence[Place],
        size_of: Callable[[Place], int],
        read: Callable[[Place, memoryview], None],
    ) -> None:
        self._size_of, self._read = size_of, read
        self._todo = deque(places)
        self._to_move: deque[Place] = deque()
        self._put: Put | None = None
        self._wanted = set(places)  # neither taken nor failed
        self._brought: dict[Place, Any] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._start(min(_THREADS, len(places)))

    def move(self, put: Put) -> None:
        """Move what was read and not taken by `put`, and from now on what is read."""
        with self._changed:
            if self._closed:
                return
            self._put = put
            self._to_move.extend(sorted(self._brought))
            self._start(min(_MOVERS, len(self._to_move)))

    def take(self, place: Place) -> Any:
        """The piece's verified bytes, in memory or where they were put; waits if they are on their
        way. None where the caller has to read them.
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
            self._closed, self._put = True, None
            self._todo.clear()
            self._to_move.clear()
            self._wanted.clear()
            self._brought.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_END_S / len(self._threads))

    def _start(self, count: int) -> None:
        started = [threading.Thread(target=self._work, name="ahead", daemon=True) for _ in range(count)]
        self._threads += started
        for thread in started:
            thread.start()

    def _work(self) -> None:
        while (found := self._next()) is not None:
            place, in_memory_B = found
            piece_B = self._put_now(place, self._read_now(place) if in_memory_B is None else in_memory_B)
            with self._changed:
                if piece_B is None:  # all may fail like this one: leave them to a caller with patience
                    self._wanted -= {place, *self._todo}
                    self._todo.clear()
                elif place in self._wanted:
                    self._brought[place] = piece_B
                self._changed.notify_all()

    def _next(self) -> tuple[Place, npt.NDArray[np.uint8] | None] | None:
        """A piece to move, or one to read; None at the end."""
        with self._changed:
            while self._to_move:
                if (place := self._to_move.popleft()) in self._brought:
                    return place, self._brought.pop(place)
            return (self._todo.popleft(), None) if self._todo and not self._closed else None

    def _read_now(self, place: Place) -> npt.NDArray[np.uint8] | None:
        try:
            piece_B = np.empty(self._size_of(place), np.uint8)
            self._read(place, piece_B.data)
        except BaseException:  # the caller who needs the piece meets it again and raises it
            return None
        return piece_B

    def _put_now(self, place: Place, piece_B: npt.NDArray[np.uint8] | None) -> Any:
        put = self._put
        if put is None or piece_B is None:
            return piece_B
        try:
            return put(place, piece_B)
        except BaseException:  # no room, say: the caller brings it to its place
            with self._changed:
                self._put = None
                self._to_move.clear()
            return piece_B
