"""Triton's built kernels in a bucket, so that a machine that starts empty need not build them: some
15 s of the first step.

One archive for each version of the kernels, of Triton and of Python, and for each kind of GPU.
Triton names what it has built by all that went into it (source, compiler, GPU, arguments), so what
an archive has beyond a run's needs is never used. An archive holds programs, and whoever can write
there can have them run: it is not trusted by default but asked for (`run.kernels_url`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

from emotion_train.edges.bounded import object_in, require_size
from emotion_train.errors import ObjectNotFound, StorageError
from emotion_train.storage.patience import Patience, until_it_answers
from emotion_train.storage.store import Store

MAX_BYTES = 1 << 30  # of an archive, and of what it unpacks to: kernels of a run are some 10 MB
_PLACE = "TRITON_CACHE_DIR"
_LOOK_EVERY_S = 20.0
_BUILDING_S = 15.0
# an entry of Triton's cache, and a file in it
_MEMBER = re.compile(r"([A-Z2-7]{16,})/([A-Za-z0-9_][A-Za-z0-9_.-]*)")
_GROUP = "__grp__"  # begins the names of files that list the others by their full paths


class BuiltKernels:
    """Within the block Triton keeps its kernels in `folder`, which is filled from the store in the
    background: no kernel may be asked for before `ready` has returned.

    Where `keeps` is set the archive is written again, in the background and at the end, whenever
    kernels have been added. A store that fails costs a sentence to `say`, not the run: it is asked
    again for `patience_s` seconds, and no longer than the kernels take to build.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        gpu: str,
        say: Callable[[str], None],
        *,
        keeps: bool,
        patience_s: float = 0.0,
    ) -> None:
        self._store = store
        self._folder = folder
        self._key = archive_name(gpu)
        self._say = say
        self._patience_s = min(patience_s, _BUILDING_S)
        self._keeps = keeps
        self._stop, self._fetched = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="built-kernels", daemon=True)
        self._kept: set[str] = set()  # names of the entries that the archive has
        self._place_before: str | None = None  # where Triton keeps its kernels outside of the block

    def __enter__(self) -> BuiltKernels:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._place_before = os.environ.get(_PLACE)
        os.environ[_PLACE] = str(self._folder)
        self._thread.start()
        return self

    def ready(self) -> None:
        """Return when the store's kernels are there, or could not be had."""
        self._fetched.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._place_before is None:
            os.environ.pop(_PLACE, None)
        else:
            os.environ[_PLACE] = self._place_before
        if self._keeps and kind is None:
            self._thread.join()
            self.keep()

    def fetch(self, patience_s: float = 0.0) -> None:
        """Put the archive's entries beside those that are in the folder."""
        try:
            self._kept = until_it_answers(
                lambda: self._store.read_verified(
                    self._key, lambda data: unpack(data, self._folder), length=MAX_BYTES + 1
                ),
                Patience(patience_s),
                self._stop.wait,
                lambda error: None,
            )
        except ObjectNotFound:
            pass
        except (StorageError, OSError, ValueError) as error:
            self._say(
                f"kernels are built here, since {self._store.url_of(self._key)} could not be used: {error}"
            )

    def keep(self) -> None:
        """Write the archive if the folder has what it lacks."""
        try:
            if entries(self._folder) <= self._kept:
                return
            self.fetch()  # what another run has added since
            names = entries(self._folder)
            if not names <= self._kept:
                self._store.write(self._key, pack(self._folder, names))
                self._kept = names
        except (StorageError, OSError) as error:
            self._say(f"the kernels that were built could not be kept: {error}")

    def _work(self) -> None:
        try:
            self.fetch(self._patience_s)
        finally:
            self._fetched.set()
        while self._keeps and not self._stop.wait(_LOOK_EVERY_S):
            self.keep()


def archive_name(gpu: str) -> str:
    """`gpu` is its architecture, such as sm90."""
    kernels = hashlib.sha256(Path(__file__).with_name("kernels.py").read_bytes()).hexdigest()[:12]
    return (
        f"{kernels}-triton-{version('triton')}-{sys.implementation.cache_tag}-{platform.machine()}-{gpu}.zip"
    )


def entries(folder: Path) -> set[str]:
    """Names of the finished entries of a cache folder of Triton: a kernel's ends with the list of
    its files, another is one library.
    """
    found = [one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")]
    return {
        one.name
        for one in found
        if any(part.name.startswith(_GROUP) or part.suffix == ".so" for part in one.iterdir())
    }


def pack(folder: Path, names: set[str]) -> bytes:
    """An archive of these entries."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(path for name in names for path in (folder / name).iterdir() if path.is_file()):
            file.writestr(f"{path.parent.name}/{path.name}", path.read_bytes())
    return archive.getvalue()


def unpack(data: bytes, folder: Path) -> set[str]:
    """Put the entries that the folder lacks into it, each at once; returns the names of all in the
    archive.

    Triton lists the files of an entry by their full paths, so those are written anew. Raises
    `ValueError` for what is no such archive, and before anything is unpacked for one of too many
    bytes.
    """
    try:
        require_size(len(data), MAX_BYTES)
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            require_size(sum(member.file_size for member in file.infolist()), MAX_BYTES)
            files = {name: file.read(name) for name in file.namelist()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"it is damaged ({error})") from error
    found: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        if (member := _MEMBER.fullmatch(name)) is None:
            raise ValueError(f"it has a file {name!r}, which is none of Triton's")
        found.setdefault(member[1], {})[member[2]] = content
    for entry, parts in found.items():
        if (folder / entry).exists():
            continue
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as name:
            new = Path(name, entry)
            new.mkdir()
            for part, content in parts.items():
                (new / part).write_bytes(
                    _listed_in(folder / entry, content) if part.startswith(_GROUP) else content
                )
            try:
                new.rename(folder / entry)
            except OSError:
                if not (folder / entry).is_dir():  # else another process was faster
                    raise
    return set(found)


def _listed_in(entry: Path, group: bytes) -> bytes:
    """A group file that names its files where they are now."""
    try:
        names = object_in(group)["child_paths"]
        return json.dumps({"child_paths": {name: str(entry / name) for name in names}}).encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{entry.name} in it has no list of its files") from error
