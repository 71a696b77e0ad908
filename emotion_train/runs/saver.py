"""Commits checkpoints in a background thread, so that training waits for the copy to host memory
and for nothing else.

One upload at a time; of the states that wait the newest wins, but one that was evaluated is kept.
While the bucket fails, they also wait in a folder of this machine, from which the next start takes
them. The price: a state in host memory for each that waits, at most five.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from emotion_train.errors import ObjectNotFound, StorageError
from emotion_train.runs.checkpoint import Snapshot, commit
from emotion_train.runs.log import MAX_ENTRY_BYTES, Entry, Writer, upload_part
from emotion_train.storage.folder import FolderStore

# evaluated states that wait; of more, those that are neither the best nor the newest are let go
_MOST_SCORED = 4
_CLOSE_S = 10.0  # a process that ends for another reason waits this long for what it has saved last
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_TELL_EVERY_S = 60.0


class LocalStates:
    """The states of one run that the bucket did not take, in a folder of this machine; an entry
    file written last makes each whole.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.store = FolderStore(folder)
        self.folder = folder / run_id
        self.run_id = run_id
        self._kept: set[str] = set()
        self._lock = threading.Lock()

    @property
    def in_use(self) -> bool:
        return self.folder.exists()

    def keep(self, snapshots: Sequence[Snapshot], incarnation: int) -> None:
        """Make these the states in the folder: write those that are not there, then remove the
        others. Raises `StorageError`.
        """
        with self._lock:
            for snapshot in snapshots:
                if snapshot.name not in self._kept:
                    parts = tuple(
                        upload_part(self.store, self.run_id, f"{snapshot.name}/{name}", data)
                        for name, data in snapshot.files()
                    )
                    entry = Entry(
                        seq=0,
                        kind="checkpoint",
                        incarnation=incarnation,
                        nonce="",
                        time_utc="",
                        epoch=snapshot.epoch,
                        step=snapshot.step,
                        parts=parts,
                        index_sha256=snapshot.question.index.sha256(),
                        config_sha256=snapshot.question.config.sha256(),
                        metrics=dict(snapshot.metrics),
                    )
                    self.store.write(f"{self.run_id}/{snapshot.name}.json", entry.to_bytes())
                    self._kept.add(snapshot.name)
            self._remove_all_but({snapshot.name for snapshot in snapshots})

    def keep_final(self, files: Mapping[str, bytes]) -> str:
        """Write what the bucket did not take of a finished run; where it is, in words."""
        folder = self.folder / "final"
        try:
            for name, data in files.items():
                self.store.write(f"{self.run_id}/final/{name}", data)
        except StorageError as error:
            return f"Its adapter and report cannot be kept on this machine either: {error}"
        return f"Its adapter and report are kept in {folder}."

    def clear(self) -> None:
        """Remove everything of this run; a file that cannot be removed stays, and is older than the
        log.
        """
        with self._lock:
            self._kept.clear()
            shutil.rmtree(self.folder, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """The whole states in the folder, by step; one that cannot be read, or that another process
        removed just now, is passed over.
        """
        found = []
        for info in self.store.list(f"{self.run_id}/"):
            if info.key.count("/") == 1 and info.key.endswith(".json"):
                try:
                    found.append(Entry.model_validate_json(self.store.read(info.key, length=MAX_ENTRY_BYTES)))
                except (ValidationError, ObjectNotFound):
                    continue
        return sorted(found, key=lambda entry: (entry.step, "macro_f1" in entry.metrics))

    def _remove_all_but(self, names: set[str]) -> None:
        """Entry files first: what has none is not whole."""
        keys = [info.key for info in self.store.list(f"{self.run_id}/")]
        for key in sorted(keys, key=lambda key: (not key.endswith(".json") or key.count("/") > 1, key)):
            if key.split("/")[1].removesuffix(".json") not in names:
                self.store.delete(key)
        self._kept &= names


class Saver:
    """Owns `writer` from its claim until it is drained; a context manager that ends the thread.

    `clear_up` is called in the thread after each commit; a store that fails there is told of and no
    more.
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
        self._told = -_TELL_EVERY_S
        self.failure: BaseException | None = None  # ended the thread: `Fenced`, or a defect
        self.problem: StorageError | None = None  # why the last attempt failed; None when it did not
        self.upload_seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="saver", daemon=True)

    def __enter__(self) -> Saver:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """End the thread; what a store that fails did not take by then stays on this machine."""
        if self.failure is None and not self.drain(0 if self.problem is not None else _CLOSE_S):
            self._tell(self.keep_what_waits())
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_FIRST_PAUSE_S)

    def offer(self, snapshot: Snapshot) -> None:
        """Let the thread commit this state, in place of older ones that wait and were not
        evaluated.
        """
        with self._changed:
            self._waiting.append(snapshot)
            self._let_go()
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Whether all that was offered is committed, waiting for it up to that time. Raises what
        ended the thread.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._waiting and self.failure is None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))  # a signal's handler runs in between
            self.check()
            return not self._waiting

    def check(self) -> None:
        """Raises what ended the thread."""
        if self.failure is not None:
            raise self.failure

    def keep_what_waits(self) -> str:
        """Write the states that wait into the local folder; where the newest state is, in words."""
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
        pause = _FIRST_PAUSE_S
        while (snapshot := self._next()) is not None:
            try:
                self._commit(snapshot)
                self._succeeded(snapshot)
                pause = _FIRST_PAUSE_S
            except StorageError as error:
                self._failed(error)
                self._wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            except BaseException as error:  # handed to the training loop, which raises it
                with self._changed:
                    self.failure = error
                    self._changed.notify_all()
                return

    def _commit(self, snapshot: Snapshot) -> None:
        began = time.monotonic()
        try:
            commit(self._writer, snapshot)
        finally:
            self.upload_seconds += time.monotonic() - began

    def _next(self) -> Snapshot | None:
        """The state to try now; None when the saver is closed."""
        with self._changed:
            self._in_flight = None
            self._let_go()
            while not self._waiting and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            self._in_flight = self._waiting[0]
        if self.problem is not None:
            self.keep_what_waits()
        return self._in_flight

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._closing and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    def _failed(self, error: StorageError) -> None:
        self.problem = error
        kept = self.keep_what_waits()
        if time.monotonic() - self._told >= _TELL_EVERY_S:
            self._told = time.monotonic()
            self._tell(f"NOT SAVED, training goes on: {error} {kept}")

    def _succeeded(self, snapshot: Snapshot) -> None:
        with self._changed:
            self._waiting.remove(snapshot)
            self._in_flight = None
            all_saved = not self._waiting
            self._changed.notify_all()
        if self.problem is not None:
            self._tell(f"step {snapshot.step} is saved: {self._writer.store.url} takes checkpoints again")
            self.problem, self._told = None, -_TELL_EVERY_S
        if all_saved and self._local.in_use:
            self._local.clear()
        try:
            self._clear_up()
        except StorageError as error:
            self._tell(f"Old checkpoints were not cleared away: {error}")
