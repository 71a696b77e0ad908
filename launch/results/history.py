"""The facts in a run's log: state, step, score, machine, hours and dollars, and its story from
claim to claim.

Only log entries are read, never a part. The metrics of each writer's claim hold base, machine and
price; where a log lacks them, they are shown as unknown. A bucket does not show whether a writer
still lives: a run counts as training while its newest entry is younger than ten minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from emotion_train.errors import Damaged, ObjectNotFound, StorageError, WrongRequest
from emotion_train.progress import plain_line
from emotion_train.report.units import training_words
from emotion_train.runs.log import LIVE_S, Entry, is_smoke, read_log, run_ids, summary, when
from emotion_train.storage.store import Store

_READERS = 8


@dataclass(frozen=True)
class Incarnation:
    """One writer: its claim and its other entries. `held_s` is the time from its claim to its
    newest entry, the least time that its machine was held.
    """

    claim: Entry
    entries: tuple[Entry, ...]

    @property
    def held_s(self) -> float:
        return max(0.0, (when(self.entries[-1]) - when(self.claim)).total_seconds()) if self.entries else 0.0

    @property
    def step(self) -> int:
        return max([self.claim.step, *(entry.step for entry in self.entries)])

    @property
    def notice(self) -> str | None:
        """The notice that announced its end, where its last checkpoint was saved for one."""
        notices = [entry.metrics.get("notice") for entry in self.entries if entry.kind == "checkpoint"]
        return str(notices[-1]) if notices and notices[-1] in ("preempted", "interrupted") else None


@dataclass(frozen=True)
class RunFacts:
    """One row of the table of runs; None where the log does not hold a fact."""

    run_id: str
    state: str  # training, stopped, published or damaged
    step: int | None = None
    steps: int | None = None
    macro_f1: float | None = None
    split: str | None = None
    base: str | None = None
    layers: int | float | None = None  # model.layers; None: all of its blocks
    gpu: str | None = None
    started: datetime | None = None
    updated: datetime | None = None
    hours: float | None = None
    usd: float | None = None
    starts: int = 0
    unpriced: int = 0  # starts without a known price, which `usd` leaves out
    smoke: bool = False


def incarnations(entries: Sequence[Entry]) -> list[Incarnation]:
    """The writers of a run in the order of their claims."""
    writers = []
    for claim in (entry for entry in entries if entry.kind == "claim"):
        writers.append(
            Incarnation(
                claim,
                tuple(entry for entry in entries if entry.incarnation == claim.seq and entry.kind != "claim"),
            )
        )
    return writers


def facts_of(run_id: str, entries: Sequence[Entry], now: datetime) -> RunFacts:
    """The row of a run; `entries` is its whole log."""
    writers = incarnations(entries)
    brief = summary(entries)
    published = brief["state"] == "published"
    live = (now - when(entries[-1])).total_seconds() < LIVE_S
    claimed: dict[str, Any] = {
        key: value for writer in writers for key, value in writer.claim.metrics.items() if value is not None
    }
    return RunFacts(
        run_id=run_id,
        state="published" if published else "training" if live else "stopped",
        step=brief["step"],
        steps=_whole(claimed.get("steps")),
        macro_f1=brief["macro_f1"],
        split=(
            str(brief["split"] or "test")
            if published
            else "validation"
            if brief["macro_f1"] is not None
            else None
        ),
        base=_text(claimed.get("base")),
        layers=_number(claimed.get("layers")),
        gpu=machine(claimed),
        started=when(entries[0]),
        updated=when(entries[-1]),
        hours=sum(writer.held_s for writer in writers) / 3600,
        usd=_dollars(writers),
        starts=len(writers),
        unpriced=sum(_price(writer) is None for writer in writers),
        smoke=is_smoke(run_id),
    )


def progress_line(entries: Sequence[Entry], now: datetime) -> str | None:
    """The line that the trainer itself prints, as of the newest checkpoint; None where the run is
    published, or its newest writer has saved no checkpoint.

    The time left is estimated from the newest writer's first and newest checkpoints, or from its
    claim where there is only one. Loss and posts/s are left out where the log lacks them.
    """
    if any(entry.kind == "final" for entry in entries) or not (writers := incarnations(entries)):
        return None
    saved = [entry for entry in writers[-1].entries if entry.kind == "checkpoint"]
    steps = _whole(writers[-1].claim.metrics.get("steps"))
    if not saved or steps is None:
        return None
    first, newest = saved[0] if len(saved) > 1 else writers[-1].claim, saved[-1]
    taken, seconds = newest.step - first.step, (when(newest) - when(first)).total_seconds()
    left = None
    if taken > 0 and seconds > 0:
        since = (now - when(newest)).total_seconds()
        left = max(0.0, (steps - newest.step) * seconds / taken - max(0.0, since))
    loss = _newest_number(saved, "loss")
    words = training_words(
        loss if loss is not None else _newest_number(saved, "train_loss"),
        _newest_number(saved, "posts_per_second"),
        _newest_number(entries, "macro_f1"),
    )
    return plain_line("training", newest.step, steps, "steps", left, words)


def _newest_number(entries: Sequence[Entry], name: str) -> float | None:
    numbers = [value for entry in entries if isinstance(value := entry.metrics.get(name), int | float)]
    return float(numbers[-1]) if numbers else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def machine(said: dict[str, Any]) -> str | None:
    """`2 x NVIDIA H100 80GB HBM3` from a claim's metrics."""
    device, processes = said.get("device"), said.get("processes")
    if not isinstance(device, str):
        return None
    return f"{processes} x {device}" if isinstance(processes, int) and processes > 1 else device


def _dollars(writers: Sequence[Incarnation]) -> float | None:
    """Dollars over all starts up to their newest entries, each at the price of its own machine;
    None when no price is known. Starts without a price are left out.
    """
    spent = [writer.held_s / 3600 * price for writer in writers if (price := _price(writer)) is not None]
    return sum(spent) if spent else None


def _price(writer: Incarnation) -> float | None:
    """Dollars an hour of its machines, as its claim says."""
    price = writer.claim.metrics.get("usd_per_hour")
    return float(price) if isinstance(price, int | float) else None


def list_runs(store: Store, now: datetime | None = None) -> list[RunFacts]:
    """Every run below an output URL, by name; a run whose log cannot be read is listed as
    damaged.
    """

    def one(run_id: str) -> RunFacts:
        try:
            entries = read_log(store, run_id)
        except (WrongRequest, ObjectNotFound, Damaged):  # also one that is being deleted
            entries = []
        return facts_of(run_id, entries, now or datetime.now(UTC)) if entries else RunFacts(run_id, "damaged")

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(one, run_ids(store)))


def follow(
    store: Store, run_id: str, every_s: float, sleep: Callable[[float], None] = time.sleep
) -> Iterator[list[Entry] | StorageError]:
    """The log as it grows: first the entries that exist, then at each look the new ones, an empty
    list when none came; ends with the final entry.

    Each entry is read once. Where the store does not answer, its error comes instead of a list, and
    the store is asked again. Raises `WrongRequest` when there is no such run.
    """
    known = 0
    while True:
        new: list[Entry] | StorageError
        try:
            new = read_log(store, run_id, known)
        except StorageError as error:
            if not error.transient:
                raise
            new = error
        if isinstance(new, list):
            if not new and known == 0:
                raise WrongRequest(
                    f"There is no run {run_id!r} at {store.url}; `emotion-launch runs {store.url}` lists"
                    " the runs there."
                )
            known += len(new)
        yield new
        if isinstance(new, list) and any(entry.kind == "final" for entry in new):
            return
        sleep(every_s)


def story(entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """The entries worth a line, each with its text: claims, scores, notes, notices, the end, and
    the last checkpoint of each writer.
    """
    lines: list[tuple[Entry, str]] = []
    claims = [entry for entry in entries if entry.kind == "claim"]
    for number, entry in enumerate(claims):
        lines.append((entry, _words_of_claim(entry, entries, number)))
    for writer in incarnations(entries):
        checkpoints = [entry for entry in writer.entries if entry.kind == "checkpoint"]
        for entry in writer.entries:
            if (
                entry.kind != "checkpoint"
                or "macro_f1" in entry.metrics
                or "notice" in entry.metrics
                or entry == checkpoints[-1]
            ):
                lines.append((entry, _words(entry)))
    return sorted(lines, key=lambda line: line[0].seq)


def _words_of_claim(claim: Entry, entries: Sequence[Entry], number: int) -> str:
    claimed = dict(claim.metrics)
    on = f" on {name}" if (name := machine(claimed)) is not None else ""
    if number == 0:
        return f"started{on}"
    before = next(writer for writer in reversed(incarnations(entries)) if writer.claim.seq < claim.seq)
    why = {"preempted": "after a preemption", "interrupted": "after an interruption"}.get(
        before.notice or "", "after an end without notice"
    )
    return f"start {number + 1}{on} {why}, from step {claim.step}"


def _words(entry: Entry) -> str:
    if entry.kind == "note":
        return str(entry.metrics.get("words") or entry.metrics.get("note") or "a note")
    score = entry.metrics.get("macro_f1")
    words = [f"macro-F1 {score:.4f}"] if isinstance(score, int | float) else []
    if entry.kind == "final":
        return ", ".join([f"published, {entry.metrics.get('split') or 'test'}", *words])
    if isinstance(loss := entry.metrics.get("train_loss"), int | float):
        words.append(f"training loss {loss:.4f}")
    if "notice" in entry.metrics:
        words.append(str(entry.metrics["notice"]))
    size = sum(part.bytes for part in entry.parts)
    return ", ".join(["checkpoint", *words, f"{size / 2**20:.1f} MiB"])
