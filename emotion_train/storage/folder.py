"""Files below one folder as a store.

A write goes to a temporary file beside its place, and is moved there once it is on the disk and not
only in the cache: the price is two fsyncs per object.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from emotion_train.edges.paths import typed_path
from emotion_train.errors import (
    DISK_FULL,
    AlreadyExists,
    ObjectChanged,
    ObjectNotFound,
    StorageError,
)
from emotion_train.storage.buffers import Buffers
from emotion_train.storage.store import TEMPORARY, ObjectInfo, Store, checked_key

_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# a disk or a network mount that may come back
_DISK_AWAY = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.EHOSTUNREACH,
)


class FolderStore(Store):
    """Files below one folder. A killed write leaves a file named `.writing-…`, which no reader
    sees.

    The folder itself may be a symbolic link. A link below it that leads out of it is refused, and
    so is anything that is not a file.
    """

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self._root = typed_path(folder).absolute()

    @property
    def root(self) -> Path:
        """The folder; a write makes it if it is missing."""
        return self._root

    def read(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        path = self._path(key)
        with self._explaining(key), open(path, "rb", opener=_without_waiting) as file:
            if if_match is not None:
                raise ObjectChanged(
                    f"{self.url_of(key)} has no ETag, as it lies in a folder; {if_match} was expected."
                )
            file.seek(start)
            return file.read(-1 if length is None else length)

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, if_match: str | None = None) -> int:
        path = self._path(key)
        with self._explaining(key), open(path, "rb", buffering=0, opener=_without_waiting) as file:
            if if_match is not None:
                raise ObjectChanged(
                    f"{self.url_of(key)} has no ETag, as it lies in a folder; {if_match} was expected."
                )
            file.seek(start)
            filled = 0
            while filled < len(buffer) and (count := file.readinto(buffer[filled:])):
                filled += count
            return filled

    def read_again(
        self, key: str, look: int, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        path = self._path(key)
        with self._explaining(key), open(path, "rb", opener=_without_waiting) as file:
            _forget_cached(file)
        return self.read(key, start=start, length=length, if_match=if_match)

    def stat(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with self._explaining(key):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder")
            return _info(key, path)

    def write(self, key: str, data: bytes | Path | Buffers) -> ObjectInfo:
        path = self._path(key)
        with self._explaining(key, writing=True), _temporary_beside(path, data) as temporary:
            os.replace(temporary, path)
            _sync_folder(path.parent)
            return ObjectInfo(key, path.stat().st_size, None)

    def create(self, key: str, data: bytes | Path) -> ObjectInfo:
        path = self._path(key)
        with self._explaining(key, writing=True), _temporary_beside(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                if path.is_dir() or not self.holds(key, data):
                    raise AlreadyExists(f"{self.url_of(key)} exists already with other content.") from None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise StorageError(
                    f"{self.url} is on a file system without hard links ({error.strerror}), such as a mounted"
                    " bucket: two processes could create the same object there; name a folder on another"
                    " disk, or the bucket itself as s3://bucket/prefix."
                ) from error
            _sync_folder(path.parent)
            return ObjectInfo(key, path.stat().st_size, None)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder_of_all = prefix.rpartition("/")[0]
        top = self._path(folder_of_all) if folder_of_all else self._root
        objects: list[ObjectInfo] = []
        with self._explaining(prefix):
            if self._root.exists() and not self._root.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "is a file")
            for folder, _, names in os.walk(top, onerror=_raise_unless_missing):
                for name in names:
                    path = Path(folder, name)
                    key = path.relative_to(self._root).as_posix()
                    if key.startswith(prefix) and not name.startswith(TEMPORARY):
                        with suppress(FileNotFoundError):  # removed since it was listed
                            objects.append(_info(key, path))
        return iter(sorted(objects, key=lambda info: info.key))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(ObjectNotFound), self._explaining(key):
            path.unlink()
            for folder in path.parents[: len(path.relative_to(self._root).parts) - 1]:
                try:
                    folder.rmdir()
                except OSError:  # other objects are stored there
                    break

    def now(self) -> float:
        """The time by the disk's clock: the date that its server gives a new file."""
        with (
            self._explaining("", writing=True),
            _temporary_beside(self._root / "now", b"") as temporary,
        ):
            return temporary.stat().st_mtime

    def clear_unfinished(self, prefix: str) -> None:
        with self._explaining(prefix):
            for path in (self._root / prefix).rglob(f"{TEMPORARY}*"):
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        path = self._root / checked_key(key)
        real_root = os.path.realpath(self._root)
        if os.path.commonpath([real_root, os.path.realpath(path)]) != real_root:
            raise StorageError(
                f"{self.url}/{key} is a symbolic link that leads out of {self.url}; put the file itself"
                " there."
            )
        return path

    @contextmanager
    def _explaining(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _explain_os_error(error, f"{self.url}/{key}", self._root, writing) from error


def _info(key: str, path: Path) -> ObjectInfo:
    facts = path.stat()
    return ObjectInfo(key, facts.st_size, None, facts.st_mtime)


@contextmanager
def _temporary_beside(path: Path, data: bytes | Path | Buffers) -> Iterator[Path]:
    """A file with that content beside `path`, on the disk and not only in the cache; it is removed
    at the end unless it was moved.
    """
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        with _open_in_its_folder(temporary) as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                with data.open("rb") if isinstance(data, Path) else data.open() as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()


def _open_in_its_folder(path: Path) -> IO[bytes]:
    """A new file. Its folder is made, and made again if `delete` removes the empty folder
    meanwhile.
    """
    for _ in range(100):
        # FileExistsError: an existing folder was removed while mkdir looked at it
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "xb")
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "xb")


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; raises `FileNotFoundError` for a pipe or a device, which could block a reader
    for ever.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "is no file")
    return descriptor


def _forget_cached(file: IO[bytes]) -> None:
    """Ask the system to read the file from its disk next time; nothing happens where the system has
    no such call.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    """Make the names in the folder survive a power cut; Windows cannot open a folder and needs no
    such call.
    """
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _explain_os_error(error: OSError, url: str, root: Path, writing: bool) -> StorageError:
    if isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError)) and (
        writing or root.is_file()
    ):
        return StorageError(
            f"{url} cannot be written or read: there is a file where a folder is needed, or the reverse; name"
            " another folder."
        )
    if not writing and isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return ObjectNotFound(f"There is no object at {url}.")
    if error.errno in DISK_FULL:
        return StorageError(
            f"The disk is full: {url} could not be written ({error.strerror}); free some space or name a"
            " folder on another disk.",
            transient=True,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            f"No permission for {url} ({error.strerror}); name a folder that is yours, or type"
            f" `ls -ld {root}` to see its owner."
        )
    away = error.errno in _DISK_AWAY
    return StorageError(
        f"{url} failed: {error.strerror or error}; check the disk, or name another folder.", transient=away
    )
