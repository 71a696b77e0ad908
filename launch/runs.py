"""Runs in a bucket: list them, and pull a published adapter back as files that are known to be whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from emotion_train.errors import WrongRequest
from emotion_train.runlog import Entry, Part, final_entry, read_log, read_part, run_ids, summary
from emotion_train.storage import open_store

_FINAL = "final/"
_ADAPTER = "final/adapter/"
# what a published run consists of; nothing here is ever unpickled
_ALLOWED_SUFFIXES = {".safetensors", ".json", ".jinja", ".md", ".txt", ".html", ".parquet", ".yaml"}
_MAX_FILE_BYTES = 16 << 30
_MAX_FILES = 200


def list_runs(output_url: str) -> list[tuple[str, dict[str, object]]]:
    """(run id, summary) of every run, oldest entry first by name."""
    store = open_store(output_url)
    return [(run_id, summary(entries)) for run_id in run_ids(store) if (entries := read_log(store, run_id))]


def split_run_url(url: str) -> tuple[str, str]:
    """Output URL and run id of `s3://bucket/prefix/<run id>` or `folder/<run id>`."""
    head, slash, run_id = url.rstrip("/").rpartition("/")
    if not slash or not head or head.endswith("/") or not run_id:
        raise WrongRequest(f"{url!r} does not name a run; give OUTPUT_URL/RUN_ID (`emotion-launch runs OUTPUT_URL` lists them).")
    return head, run_id


def pull(run_url: str, folder: Path) -> Entry:
    """Download the adapter, report and predictions of a published run into a new folder.

    The adapter's files lie in the folder itself, the rest in its `report/`. Each file is checked by size and sha256 against the log's
    final entry, and the folder appears only when all are whole. Raises `WrongRequest` when the folder exists or an entry is not safe.
    """
    output_url, run_id = split_run_url(run_url)
    store = open_store(output_url)
    entry = final_entry(store, run_id)
    targets = safe_targets(entry.parts)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WrongRequest(f"{folder} exists and is not an empty folder; give --to a new one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for part, target in targets:
            path = staging / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_part(store, run_id, part))
        staging.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return entry


def safe_targets(parts: tuple[Part, ...]) -> list[tuple[Part, str]]:
    """Where each part goes below the folder; raises `WrongRequest` for a pickle, a stray key, a collision or an absurd size."""
    targets: list[tuple[Part, str]] = []
    taken: set[str] = set()
    for part in parts:
        if not part.key.startswith(_FINAL):
            raise WrongRequest(f"The final entry names {part.key!r}, which is not below {_FINAL}; nothing was pulled.")
        inside = part.key.startswith(_ADAPTER)
        target = part.key.removeprefix(_ADAPTER) if inside else "report/" + part.key.removeprefix(_FINAL)
        if Path(target).suffix.lower() not in _ALLOWED_SUFFIXES:
            raise WrongRequest(
                f"The final entry names {part.key!r}; only safetensors, JSON and text are pulled, never pickles. Nothing was pulled."
            )
        if target.casefold() in taken or part.bytes > _MAX_FILE_BYTES or len(taken) >= _MAX_FILES:
            raise WrongRequest(f"The final entry is not sound at {part.key!r} (a double name, too large or too many); nothing was pulled.")
        taken.add(target.casefold())
        targets.append((part, target))
    return targets
