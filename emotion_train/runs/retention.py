"""Which parts of a run's old checkpoints may be deleted, and their deletion; a log entry is never
deleted.

It is monotone: because entries are only added, a writer that knows only the beginning of the log
deletes nothing that a writer with the whole log would keep. So a fenced writer that does not know
it does no harm, and a kill in between leaves parts for the next `collect`. The price is one listing
of the run's parts per checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from emotion_train.runs.log import Entry, Writer

KEEP_NEWEST = 3


def collect(writer: Writer, keep_every: int | None) -> list[str]:
    """Delete the parts that `removable` allows, and leftovers of older incarnations' killed writes;
    returns the deleted keys.

    Raises `StorageError`, which does the run no harm.
    """
    store, run = writer.store, f"{writer.run_id}/"
    present = [info.key.removeprefix(run) for info in store.list(f"{run}data/")]
    doomed = removable(writer.log, writer.incarnation, present, keep_every)
    for key in doomed:
        store.delete(run + key)
    for entry in writer.entries:
        if entry.kind == "claim":
            store.clear_unfinished(f"{run}data/{entry.seq:08d}/")
    # a fenced writer, which can commit nothing, may lose the upload that it is at
    first_left = writer.incarnation + is_published(writer.log)
    store.abort_uploads(run, lambda key: _is_of_earlier(key.removeprefix(run), first_left))
    return doomed


def is_published(log: Sequence[Entry]) -> bool:
    return any(entry.kind == "final" for entry in log)


def _is_of_earlier(key: str, incarnation: int) -> bool:
    owner = re.match(r"(?:data|final)/([0-9]{8})/", key)
    return owner is not None and int(owner[1]) < incarnation


def removable(
    log: Sequence[Entry], incarnation: int, present: Iterable[str], keep_every: int | None
) -> list[str]:
    """The keys among `present` that the writer `incarnation`, who knows the log `log`, may delete.

    These are parts of checkpoints that are not kept, and parts of older incarnations without an
    entry, which can no longer get one. The writer's own parts without an entry may be waiting for
    it until the run is published, and a newer incarnation's parts are left alone.
    """
    kept = {part.key for entry in kept_entries(log, keep_every) for part in entry.parts}
    named = {part.key for entry in log for part in entry.parts}
    published = is_published(log)  # nothing waits for an entry any more
    doomed = []
    for key in present:
        owner = re.match(r"data/([0-9]{8})/", key)
        if owner is None or key in kept:
            continue
        is_own = int(owner[1]) == incarnation
        if int(owner[1]) < incarnation or (is_own and (published or key in named)):
            doomed.append(key)
    return doomed


def kept_entries(log: Sequence[Entry], keep_every: int | None) -> list[Entry]:
    """The newest three checkpoints, the best by macro-F1, each `keep_every`-th of the run, and
    every final entry.
    """
    checkpoints = [entry for entry in log if entry.kind == "checkpoint"]
    kept = checkpoints[-KEEP_NEWEST:] + [entry for entry in log if entry.kind == "final"]
    if (best := _best(checkpoints)) is not None:
        kept.append(best)
    if keep_every is not None:
        kept += checkpoints[keep_every - 1 :: keep_every]
    return kept


def _best(checkpoints: Sequence[Entry]) -> Entry | None:
    """The checkpoint with the highest macro-F1, on a tie the earlier one: a checkpoint that is no
    longer the best never becomes the best again.
    """
    scored = [
        (float(score), -entry.seq, entry)
        for entry in checkpoints
        if isinstance(score := entry.metrics.get("macro_f1"), int | float)
    ]
    finite = [one for one in scored if math.isfinite(one[0])]
    return max(finite, key=lambda one: one[:2])[2] if finite else None
