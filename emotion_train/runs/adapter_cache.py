"""An adapter named by a URL, as a folder on this machine with every byte verified: the URL of a
run, of the adapter below it, or of a copy in a bucket.

Pulled adapters stay in a cache by their content, so a second call reads only the run's log, or the
listing of a copy, and hashes the cached files. The price: the cache grows until somebody deletes it
(`~/.cache/emotion-train/adapters`, or below `XDG_CACHE_HOME`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from emotion_train.console import tell
from emotion_train.edges.bounded import Unreadable, object_file
from emotion_train.edges.paths import typed_path
from emotion_train.errors import ObjectNotFound, StorageError, WrongRequest
from emotion_train.model.facts import FACTS
from emotion_train.progress import ProgressLine
from emotion_train.runs.log import Entry, final_entry, read_log, read_part
from emotion_train.runs.published import REPORT, require_pullable, safe_targets, split_run_url
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import ObjectInfo, Store

_IN_A_RUN = re.compile(r"(?P<run>.+)/final/(?P<incarnation>[0-9]{8})/adapter")
_ADAPTER, _MANIFEST = "adapter", "manifest.json"  # of each place in the cache, CACHE/NAME.NUMBER
_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class FoundAdapter:
    """A folder with an adapter; `run_url` is the run that published it, if the run was named."""

    folder: Path
    run_url: str | None = None


@dataclass(frozen=True)
class _File:
    """A file of a cached adapter, by its size and sha256."""

    bytes: int
    sha256: str


def find_adapter(place: str) -> FoundAdapter:
    """The adapter in a local folder, used in place, or at a URL: a run (OUTPUT_URL/RUN_ID), the
    adapter in the run's final/, or a copy in a bucket.

    A folder may be a run in a folder store. Raises `WrongRequest` where there is neither run nor
    adapter, or the run is not published; and as `read_part`.
    """
    url = place.rstrip("/") or place
    local = _local_folder(url)
    if (in_a_run := _IN_A_RUN.fullmatch(url)) is not None and (entries := _log_of(in_a_run["run"])):
        finals = [entry.incarnation for entry in entries if entry.kind == "final"]
        if finals[-1:] != [int(in_a_run["incarnation"])]:
            raise WrongRequest(
                f"{url} is not the adapter that the run published; give the run, {in_a_run['run']}, once"
                " `emotion-launch show` calls it published."
            )
        return _of_run(in_a_run["run"])
    if local is not None and ((local / FACTS).exists() or not _log_of(url)):
        return FoundAdapter(local)
    if local is not None or _log_of(url):
        return _of_run(url)
    return _of_copy(url)


def _local_folder(url: str) -> Path | None:
    """The folder that a path or a file:// URL names; None for a bucket."""
    path = typed_path(url)
    if path.exists():
        return path
    store = open_store(url)
    if not isinstance(store, FolderStore):
        return None
    return store.root if "://" in url else path


def _log_of(run_url: str) -> list[Entry]:
    """The log of the run at this URL; empty where there is none."""
    try:
        output_url, run_id = split_run_url(run_url)
        store = open_store(output_url)
    except WrongRequest:
        return []
    if isinstance(store, FolderStore) and not (store.root / run_id / "log").is_dir():
        return []
    return read_log(store, run_id)


def _of_run(run_url: str) -> FoundAdapter:
    output_url, run_id = split_run_url(run_url)
    store = open_store(output_url)
    entry = final_entry(store, run_id)
    parts = {
        target: part
        for part, target in safe_targets(entry)
        if not target.startswith("report/") or target == f"report/{REPORT}"
    }
    wanted = {target: _File(part.bytes, part.sha256) for target, part in parts.items()}
    folder = _cached(
        _digest([[target, part.bytes, part.sha256] for target, part in sorted(parts.items())]),
        run_url,
        lambda _: wanted,
        sum(part.bytes for part in parts.values()),
        lambda target: read_part(store, run_id, parts[target]),
        list(parts),
    )
    return FoundAdapter(folder, run_url)


def _of_copy(url: str) -> FoundAdapter:
    """An adapter that somebody copied into a bucket. Its files have no known checksums, so the
    store's sizes and ETags are compared.
    """
    store = open_store(url)
    try:
        store.stat(FACTS)
    except ObjectNotFound:
        raise WrongRequest(
            f"There is neither a run nor an adapter at {url}; give OUTPUT_URL/RUN_ID of a run that"
            " `emotion-launch runs OUTPUT_URL` lists as published, or a folder that `emotion-launch pull`"
            " wrote, or its copy in a bucket."
        ) from None
    objects = {info.key: info for info in store.list()}
    require_pullable(f"The copy {url}", [(key, key, info.size) for key, info in objects.items()])
    folder = _cached(
        _digest([url, *([info.key, info.size, info.etag] for info in objects.values())]),
        url,
        _manifest_of,
        sum(info.size for info in objects.values()),
        lambda key: _read_object(store, objects[key]),
        list(objects),
    )
    return FoundAdapter(folder)


def _read_object(store: Store, info: ObjectInfo) -> bytes:
    def verify(data: bytes) -> bytes:
        if len(data) != info.size:
            raise ValueError(f"{len(data)} bytes")
        return data

    try:
        return store.read_verified(info.key, verify, if_match=info.etag)
    except ValueError as error:
        raise StorageError(
            f"{store.url_of(info.key)} has {error} and was listed with {info.size:,}; try again.",
            transient=True,
        ) from None


def _digest(content: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40]


def cache_folder() -> Path:
    """The folder of cached adapters, below `XDG_CACHE_HOME`, else `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "emotion-train" / "adapters"


def _cached(
    name: str,
    url: str,
    sums: Callable[[Path], Mapping[str, _File] | None],
    total: int,
    read: Callable[[str], bytes],
    targets: Sequence[str],
) -> Path:
    """The cached adapter of this name, pulled by `read` unless the files of `sums` are cached."""
    cache = cache_folder()
    try:
        place = _newest(cache, name)
        if place is None or not _is_whole(place, sums):
            tell(f"emotion-train: pulling the adapter of {url} into {cache}")
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".pulling-", dir=cache))
            try:
                _pull(staging / "pulled", total, read, targets)
                place = _put_in_place(staging, cache, name, sums)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"The cache {cache} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder on a"
            " disk with room that you may write, or pull the adapter by `emotion-launch pull`."
        ) from error
    return place / _ADAPTER


def _pull(pulled: Path, total: int, read: Callable[[str], bytes], targets: Sequence[str]) -> None:
    """Write the files, and a manifest of their sizes and sums beside them."""
    manifest: dict[str, list[int | str]] = {}
    done = 0
    with ProgressLine("pulling", total >> 20, "MiB") as line:
        for target in targets:
            data = read(target)
            path = pulled / _ADAPTER / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            manifest[target] = [len(data), hashlib.sha256(data).hexdigest()]
            done += len(data)
            line.update(done >> 20)
    (pulled / _MANIFEST).write_text(json.dumps(manifest))


def _put_in_place(
    staging: Path, cache: Path, name: str, sums: Callable[[Path], Mapping[str, _File] | None]
) -> Path:
    """The newest place of this name: the pulled folder, moved there by one rename, or the folder
    that another process put there first.

    A whole folder is never moved. A damaged folder is replaced by one with the next number and then
    removed, so no number is used twice while a larger one exists.
    """
    while True:
        newest = _newest(cache, name)
        if newest is not None and _is_whole(newest, sums):
            return newest
        place = _place(cache, name, 0 if newest is None else _number(newest) + 1)
        try:
            os.rename(staging / "pulled", place)
        except OSError:
            if _newest(cache, name) == newest:
                raise
            continue  # another process was quicker
        if _newest(cache, name) == place:
            break
        with suppress(OSError):  # the number was free because a larger one has replaced it
            os.rename(place, staging / "pulled")
    for older in _numbered(cache, name):
        if _number(older) < _number(place):
            with suppress(OSError):  # another process removes it
                os.rename(older, staging / older.name)
    return place


def _place(cache: Path, name: str, number: int) -> Path:
    return cache / f"{name}.{number}"


def _number(place: Path) -> int:
    return int(place.suffix[1:])


def _numbered(cache: Path, name: str) -> list[Path]:
    return [path for path in cache.glob(f"{name}.*") if path.suffix[1:].isdecimal()]


def _newest(cache: Path, name: str) -> Path | None:
    return max(_numbered(cache, name), key=_number, default=None)


def _manifest_of(place: Path) -> dict[str, _File] | None:
    """The sizes and sums of a copy's files when they were pulled; None if they cannot be read."""
    try:
        document = object_file(place / _MANIFEST, _MANIFEST_BYTES)
        return {target: _File(int(size), str(sha256)) for target, (size, sha256) in document.items()}
    except (OSError, Unreadable, ValueError, TypeError):
        return None


def _is_whole(place: Path, sums: Callable[[Path], Mapping[str, _File] | None]) -> bool:
    """Whether the adapter at this place has exactly the files of `sums`."""
    folder, files = place / _ADAPTER, sums(place)
    if files is None or not folder.is_dir():
        return False
    try:
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    except OSError:  # another process removes it
        return False
    return present == files.keys() and all(_is_file(folder / name, file) for name, file in files.items())


def _is_file(path: Path, wanted: _File) -> bool:
    try:
        with path.open("rb") as file:
            return (
                os.fstat(file.fileno()).st_size == wanted.bytes
                and hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256
            )
    except OSError:
        return False
