"""Download of a published adapter, verified by each file's size and sha256 in the final entry."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from emotion_train.data.text_filter import FILE_NAME, MAX_POSTS, file_bytes
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.progress import ProgressLine
from emotion_train.runs.log import Entry, Part, final_entry, first_collision, read_part
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

_ADAPTER = "adapter/"
# the kinds of files of a published run; none is ever unpickled
_ALLOWED_SUFFIXES = {
    ".safetensors",
    ".json",
    ".jinja",
    ".md",
    ".txt",
    ".html",
    ".parquet",
    ".yaml",
    ".csv",
} | {".tfevents"}
REPORT = "report.json"
MAX_REPORT_BYTES = 64 << 20
_MAX_FILE_BYTES = 16 << 30
_MAX_FILES = 200
TRAINING_FILTER = f"data/{FILE_NAME}"  # the place of the training texts' filter in a pulled folder


def split_run_url(url: str) -> tuple[str, str]:
    """The output URL and run id of `s3://bucket/prefix/<run id>` or `folder/<run id>`. Raises
    `WrongRequest` for a URL that names no run.
    """
    head, slash, run_id = url.rstrip("/").rpartition("/")
    if not slash or not head or head.endswith("/") or not run_id:
        raise WrongRequest(
            f"{url!r} does not name a run; give OUTPUT_URL/RUN_ID (`emotion-launch runs OUTPUT_URL` lists"
            " them)."
        )
    return head, run_id


def published_report(store: Store, run_id: str, final: Entry) -> bytes | None:
    """The report.json that the run's final entry names; None where it names none, or one that is
    too large to be a report. Raises `StorageError`.
    """
    key = f"final/{final.incarnation:08d}/{REPORT}"
    part = next((part for part in final.parts if part.key == key), None)
    return None if part is None or part.bytes > MAX_REPORT_BYTES else read_part(store, run_id, part)


def download(run_url: str, folder: Path, with_training_filter: bool = False) -> list[Part]:
    """Download the adapter, report and predictions of a published run into a new folder, with the
    filter of its training texts on request; returns the downloaded parts.

    The adapter's files go into the folder itself, the filter into its `data/`, the rest into its
    `report/`. Each file is checked by size and sha256 against the log's final entry, and the folder
    appears only when all are whole. Raises `WrongRequest` when the folder exists, an entry is not
    safe, or the filter is missing.
    """
    output_url, run_id = split_run_url(run_url)
    store = open_store(output_url)
    entry = final_entry(store, run_id)
    targets = safe_targets(entry)
    if (filtered := training_filter(entry)) is not None and with_training_filter:
        targets.append((filtered, TRAINING_FILTER))
    elif with_training_filter:
        raise WrongRequest(
            f"Run {run_id} has no filter of its training texts, as an earlier version published it; pull it"
            " without --with-training-filter."
        )
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise WrongRequest(f"{folder} exists and is not an empty folder; give --to a new one.")
        _fetch(store, run_id, targets, folder)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error.strerror}); give --to a folder on a disk with room that you"
            " may write."
        ) from error
    return [part for part, _ in targets]


def _fetch(store: Store, run_id: str, targets: list[tuple[Part, str]], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    done = 0
    try:
        with ProgressLine("pulling", sum(part.bytes for part, _ in targets) >> 20, "MiB") as line:
            for part, target in targets:
                path = staging / target
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read_part(store, run_id, part))
                done += part.bytes
                line.update(done >> 20)
        staging.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def training_filter(entry: Entry) -> Part | None:
    """The filter of the training texts that a final entry names; None where an earlier version
    published the run. Raises `WrongRequest` for an absurd size.
    """
    for part in entry.parts:
        if re.fullmatch(rf"data/{entry.incarnation:08d}/[0-9a-f]{{12}}/{re.escape(FILE_NAME)}", part.key):
            if part.bytes > file_bytes(MAX_POSTS):
                raise WrongRequest(f"The final entry is not sound at {part.key!r} (too large).")
            return part
    return None


def safe_targets(entry: Entry) -> list[tuple[Part, str]]:
    """Each part with its path below the folder, without the training texts' filter; raises
    `WrongRequest` for a pickle, a stray key, a collision or an absurd size.
    """
    targets: list[tuple[Part, str]] = []
    final = f"final/{entry.incarnation:08d}/"
    filtered = training_filter(entry)
    for part in entry.parts:
        if part is filtered:
            continue
        if not part.key.startswith(final):
            raise WrongRequest(
                f"The final entry names {part.key!r}, which is not below {final}; nothing was pulled."
            )
        name = part.key.removeprefix(final)
        target = name.removeprefix(_ADAPTER) if name.startswith(_ADAPTER) else f"report/{name}"
        targets.append((part, target))
    require_pullable("The final entry", [(part.key, target, part.bytes) for part, target in targets])
    return targets


def require_pullable(source: str, files: Sequence[tuple[str, str, int]]) -> None:
    """Raises `WrongRequest` for a pickle, a collision, or an absurd size or number among the files
    (name at the source, path in the folder, bytes).
    """
    for name, target, size in files:
        if Path(target).suffix.lower() not in _ALLOWED_SUFFIXES and target != TRAINING_FILTER:
            raise WrongRequest(
                f"{source} names {name!r}; only safetensors, JSON and text are pulled, never pickles. Nothing"
                " was pulled."
            )
        if size > _MAX_FILE_BYTES or len(files) > _MAX_FILES:
            raise WrongRequest(
                f"{source} is not sound at {name!r} (too large or too many); nothing was pulled."
            )
    if (double := first_collision(target for _, target, _ in files)) is not None:
        raise WrongRequest(
            f"{source} is not sound at {double!r} (a double name on some disks); nothing was pulled."
        )
