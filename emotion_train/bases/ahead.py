"""Reading a base ahead of its use: while libraries are imported and a run is checked, threads read
the bytes of a staged base into plain memory, verify them, and bring them to the GPU once it is
known (`model/pieces_on_device.py`).

Reading ahead refuses nothing and waits for no store: the code that needs the bytes meets any
problem again and reports it. The price is host memory, up to `room_bytes` until the model has taken
the bytes, and wasted reads where the start is refused later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from emotion_train.bases.architecture import text_model
from emotion_train.bases.depth import Layers
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.pieces_ahead import Put
from emotion_train.bases.staged import StagedBase


class BaseAhead:
    """The first `layers` blocks of the base `name`, found in a thread and, if staged, read ahead.
    Use it in a with statement; reading stops at its end.
    """

    def __init__(self, name: str, layers: Layers | None, room_bytes: int) -> None:
        self._name, self._layers, self._room_bytes = name, layers, room_bytes
        self._found: BaseFiles | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._looked = threading.Event()

    def __enter__(self) -> BaseAhead:
        threading.Thread(target=self._work, name="base", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
        if self._found is not None and self._found.staged is not None:
            self._found.staged.read_no_more()

    def files(self) -> BaseFiles:
        """The base's files. Raises as `BaseFiles.find`, called again if the thread failed."""
        self._looked.wait()
        return BaseFiles.find(self._name, self._layers) if self._found is None else self._found

    def move(self, put_for: Callable[[StagedBase], Put | None]) -> None:
        """Move what is read ahead of a staged base by the `Put` that `put_for` gives, as
        `PiecesAhead.move` does; in a thread, which ends quietly where it fails.
        """
        threading.Thread(target=self._move, args=(put_for,), name="base", daemon=True).start()

    def _move(self, put_for: Callable[[StagedBase], Put | None]) -> None:
        self._looked.wait()
        staged = None if self._found is None else self._found.staged
        with suppress(Exception):  # the pieces wait where they are
            if staged is not None and not self._closed and (put := put_for(staged)) is not None:
                staged.move_ahead(put)

    def _work(self) -> None:
        try:
            with suppress(Exception):  # `files` meets it again and raises it
                self._found = BaseFiles.find(self._name, self._layers)
                self._begin(self._found)
        finally:
            self._looked.set()

    def _begin(self, found: BaseFiles) -> None:
        if found.staged is None:
            return
        layers = text_model(found).layers
        with self._lock:
            if not self._closed:
                found.staged.read_ahead(layers, self._room_bytes)
