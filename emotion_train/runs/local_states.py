"""States of a run that wait on this machine's disk while the bucket does not take them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.errors import ObjectNotFound, StorageError
from emotion_train.runs.checkpoint import Snapshot
from emotion_train.runs.log import MAX_ENTRY_BYTES, Entry, upload_part
from emotion_train.storage.folder import FolderStore


class LocalStates:
    """The states of one run that the bucket did not take, in a local folder. Each has an entry
    file, written last, without which it does not count.
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
        """Make these the states in the folder: write the missing ones, then remove all others.
        Raises `StorageError`.
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
        """Write the files of a finished run that the bucket did not take; returns a sentence that
        says where.
        """
        folder = self.folder / "final"
        try:
            for name, data in files.items():
                self.store.write(f"{self.run_id}/final/{name}", data)
        except StorageError as error:
            return f"Its adapter and report cannot be kept on this machine either: {error}"
        return f"Its adapter and report are kept in {folder}."

    def clear(self) -> None:
        """Remove everything of this run. A file that cannot be removed stays, but is older than the
        log.
        """
        with self._lock:
            self._kept.clear()
            shutil.rmtree(self.folder, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """The entries of whole states in the folder, by step; a state that cannot be read, or that
        another process just removed, is skipped.
        """
        entries = []
        for info in self.store.list(f"{self.run_id}/"):
            if info.key.count("/") == 1 and info.key.endswith(".json"):
                try:
                    entries.append(
                        self.store.read_verified(
                            info.key,
                            lambda raw: Entry.model_validate(object_in(raw, MAX_ENTRY_BYTES, finite=False)),
                            length=MAX_ENTRY_BYTES + 1,
                        )
                    )
                except (Unreadable, ValidationError, ObjectNotFound):
                    continue
        return sorted(entries, key=lambda entry: (entry.step, "macro_f1" in entry.metrics))

    def _remove_all_but(self, names: set[str]) -> None:
        """Remove all other states, entry files first: a state without one does not count."""
        keys = [info.key for info in self.store.list(f"{self.run_id}/")]
        for key in sorted(keys, key=lambda key: (not key.endswith(".json") or key.count("/") > 1, key)):
            if key.split("/")[1].removesuffix(".json") not in names:
                self.store.delete(key)
        self._kept &= names
