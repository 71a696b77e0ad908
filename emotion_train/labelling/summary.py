"""The end of a labelling job: _SUCCESS.json, created once, after every part was read and found to
have each of its rows once.

The price: its writer reads all parts, some 20 bytes per post.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from typing import ClassVar, Literal

from emotion_train.console import counted, shown
from emotion_train.errors import AlreadyExists, Damaged
from emotion_train.labelling.job import JOB, PARTS, SUCCESS, Job, part_key
from emotion_train.labelling.leases import Board
from emotion_train.labelling.part import PartCount, count_part
from emotion_train.storage.document import FrozenModel, Manifest, read_manifest
from emotion_train.storage.store import Store

_SHIFTED = 0.05  # of all posts
_ERRORS_OFF = 4.0  # standard errors
_NAMED = 3


class PartEntry(FrozenModel):
    key: str
    bytes: int
    sha256: str
    rows: int
    errors: int


class Success(Manifest):
    """The summary of a finished job. `labels` counts posts by label, in the job's order.

    `worker_seconds` adds up all workers; `seconds` runs from the job's beginning to its end. `usd`
    is the cost of `usd_of_rows` posts, or None where no worker knew its price.
    """

    older: ClassVar[tuple[str, ...]] = ()
    digested: ClassVar[tuple[str, ...]] = ("emotion-train/label-success/1",)
    max_bytes: ClassVar[int] = 256 << 20

    schema_version: Literal["emotion-train/label-success/1"] = "emotion-train/label-success/1"
    job: str
    rows: int
    blank: int
    errors: dict[str, int]
    labels: dict[str, int]
    unanswered: int
    accepted: int | None = None
    parts: tuple[PartEntry, ...]
    seconds: float
    worker_seconds: float
    posts_per_second: float
    usd: float | None = None
    usd_of_rows: int = 0
    training: tuple[float, ...] | None = None
    held_out: tuple[float, ...] | None = None
    shift: str | None = None

    def lines(self) -> list[str]:
        """The summary as lines for a terminal."""
        answered = max(1, self.rows - sum(self.errors.values()))
        lines = [
            f"labelled {counted(self.rows, 'post')} in {counted(len(self.parts), 'part')},"
            f" {self.seconds:,.0f} s:"
            f" {self.posts_per_second:,.1f} posts/s{_dollars(self)}"
        ]
        lines += [f"errors: {count:,} {error}" for error, count in self.errors.items()]
        if self.accepted is not None:
            lines.append(f"accepted: {self.accepted:,} ({self.accepted / answered:.1%})")
        width = max(len("label"), *(len(shown(label)) for label in self.labels))
        head = [f"{'label':{width}}  {'posts':>12}  {'share':>7}"]
        head += [f"  {'training':>8}"] * (self.training is not None)
        head += [f"  {'held out':>8}"] * (self.held_out is not None)
        lines.append("".join(head))
        for place, (label, count) in enumerate(self.labels.items()):
            line = f"{shown(label):{width}}  {count:>12,}  {count / answered:>7.2%}"
            for shares in (self.training, self.held_out):
                line += f"  {shares[place]:>8.2%}" if shares is not None else ""
            lines.append(line)
        return lines + ([self.shift] if self.shift else [])


def _dollars(success: Success) -> str:
    if success.usd is None:
        return ""
    of = "" if success.usd_of_rows == success.rows else f" for {success.usd_of_rows:,} of them"
    return f", ${success.usd:,.2f}{of}"


def find_success(store: Store, job: Job) -> Success | None:
    """The job's summary; None where the job is not done. Raises `Damaged` for the summary of
    another job, and where a part that it counts is gone.
    """
    if store.find(SUCCESS) is None:
        return None
    success = read_manifest(
        Success,
        store,
        SUCCESS,
        other_schema="Use the version that wrote it.",
        damaged="Delete it, and type the command again.",
    )
    if success.job != job.id:
        raise Damaged(
            f"{store.url_of(SUCCESS)} is the summary of job {success.job[:40]}, and {JOB} beside it is job"
            f" {job.id}, which has none; delete the summary, and type the command again."
        )
    stored = {info.key: info.size for info in store.list(PARTS)}
    if gone := next((part.key for part in success.parts if stored.get(part.key) != part.bytes), None):
        raise Damaged(
            f"{store.url_of(gone)} is gone, or is not the part that {SUCCESS} counts; delete {SUCCESS} and"
            " what is left of the part, and type the command again: its posts are then labelled again."
        )
    return success


def finish(store: Store, job: Job, board: Board, each: Callable[[int], None]) -> Success:
    """Read every part and create _SUCCESS.json, or return the one that exists. `each` gets the
    number of parts read so far. Raises `Damaged` for a damaged part.
    """
    with tempfile.TemporaryDirectory(prefix="emotion-train-label-") as folder:
        counts: list[PartCount] = []
        for unit in range(len(job.units)):
            counts.append(count_part(store, board.parts[unit], job, unit, Path(folder)))
            each(unit + 1)
    began = store.stat(JOB).modified or board.now
    ended = max((info.modified or board.now) for info in board.parts.values())
    success = success_of(job, counts, max(1e-3, ended - began))
    try:
        store.create(SUCCESS, success.to_bytes())
        return success
    except AlreadyExists:
        earlier = find_success(store, job)
        assert earlier is not None
        return earlier


def success_of(job: Job, counts: Sequence[PartCount], seconds: float) -> Success:
    """The summary of all parts, in the order of the units."""
    labels, errors = Counter[str](), Counter[str]()
    for part in counts:
        labels.update(part.labels)
        errors.update(part.errors)
    rows = sum(part.facts.rows for part in counts)
    answered = rows - sum(errors.values())
    priced = [part.facts for part in counts if part.facts.usd_per_hour is not None]
    by_label = {label: labels[label] for label in job.labels}
    return Success(
        job=job.id,
        rows=rows,
        blank=sum(part.facts.blank for part in counts),
        errors=dict(sorted(errors.items())),
        labels=by_label,
        unanswered=sum(part.unanswered for part in counts),
        accepted=None if job.accept_precision is None else sum(part.accepted for part in counts),
        parts=tuple(
            PartEntry(
                key=part_key(part.facts.unit),
                bytes=part.bytes,
                sha256=part.sha256,
                rows=part.facts.rows,
                errors=part.facts.errors,
            )
            for part in counts
        ),
        seconds=seconds,
        worker_seconds=sum(part.facts.seconds for part in counts),
        posts_per_second=rows / seconds,
        usd=sum(part.seconds / 3600 * (part.usd_per_hour or 0.0) for part in priced) if priced else None,
        usd_of_rows=sum(part.rows for part in priced),
        training=job.training,
        held_out=job.held_out,
        shift=shift_of(job, by_label, answered),
    )


def shift_of(job: Job, labels: dict[str, int], answered: int) -> str | None:
    """A sentence that says whether labels are given about as often as to held-out posts, or as
    training posts have them where no report has held-out ones; None where neither is known.

    A share has shifted where it differs by more than 5 points and four standard errors.
    """
    expected, posts = (
        (job.held_out, job.held_out_posts) if job.held_out is not None else (job.training, 10**9)
    )
    what = "held-out posts" if job.held_out is not None else "training posts"
    if expected is None or not answered:
        return None
    moved: list[tuple[float, str]] = []
    for (label, count), before in zip(labels.items(), expected, strict=True):
        share = count / answered
        error = sqrt(before * (1 - before) / max(1, posts) + share * (1 - share) / answered)
        if abs(share - before) > max(_SHIFTED, _ERRORS_OFF * error):
            moved.append((abs(share - before), f"{shown(label)} {share:.0%} instead of {before:.0%}"))
    if not moved:
        return f"Labels are given about as often as to the {what}."
    named = ", ".join(change for _, change in sorted(moved, reverse=True)[:_NAMED])
    more = f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
    return (
        f"Labels have shifted against the {what}: {named}{more}. The labelled posts differ from them, so the"
        " report's scores may not hold: label some by hand and `emotion-train evaluate --file` them."
    )
