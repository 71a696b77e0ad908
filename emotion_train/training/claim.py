"""Rank 0 claims the run and finds where it resumes.

A wrong request is refused before the claim, so that it fences no writer at work.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, cast

from emotion_train.config import Config
from emotion_train.console import tell
from emotion_train.data.index import Index
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.processes.machine import device_name
from emotion_train.runs.log import Entry, Metrics, Published, Writer, read_log, require_conditional_writes
from emotion_train.runs.question import same_question_as_published
from emotion_train.storage.store import Store
from emotion_train.training.job import Claimed, Job, folder_here, local_folder, say


class Look(NamedTuple):
    """The log before the claim: its final entry, if there is one, and whether another start has
    claimed the run and left a checkpoint.
    """

    final: Entry | None
    owned: bool
    saved: bool = False


def look_before_claiming(config: Config, index: Index, store: Store, allow_unfenced: bool) -> Look:
    """The state of the run's log. Raises for a wrong request, so that it fences no writer at
    work.
    """
    from emotion_train.runs import checkpoint

    assert config.run.id is not None
    folder_here(config)
    entries = read_log(store, config.run.id)
    run_id = config.run.id

    def check(entry: Entry) -> list[str]:
        return checkpoint.check_same_question(
            checkpoint.read_document(store, run_id, entry), config, index, entry, run_id
        )

    if finals := [entry for entry in entries if entry.kind == "final"]:
        if finals[-1].index_sha256 != index.sha256():
            raise WrongRequest(
                f"Run {run_id} is published and was trained on another data set than {config.data.url} is"
                " now: its index differs. Give the old data.url, or another run.id to start a new run."
            )
        with suppress(StorageError):  # a published run may have lost its report
            for words in same_question_as_published(store, run_id, finals[-1], config):
                say(f"this run was published with another {words}")
        return Look(finals[-1], owned=True)
    if checkpoint.newest(entries, check) is None and entries and entries[-1].index_sha256 != index.sha256():
        raise WrongRequest(
            f"Run {run_id} was started on another data set than {config.data.url} is now, and may be at work:"
            " its index differs. Give the old data.url to resume it, or another run.id to start a new run."
        )
    require_conditional_writes(store, run_id, allow_unfenced)
    return Look(None, owned=bool(entries), saved=any(entry.kind == "checkpoint" for entry in entries))


def claim(job: Job, tell_saved: Callable[[bool], None] = lambda saved: None) -> Claimed | Entry:
    """Claim the run, then find its state; from now on no other writer can add to the run.

    Returns the final entry when another writer has published in the meantime. `tell_saved` is
    called before the first checkpoint is read, with whether the newest state of the run is in its
    log.
    """
    return Claiming(job, tell_saved)()


class Claiming:
    """`claim` for a store that may fail: after a `StorageError` the next call continues from there,
    so that the run is claimed once.
    """

    def __init__(self, job: Job, tell_saved: Callable[[bool], None]) -> None:
        self._job = job
        self._tell_saved = tell_saved
        self._writer: Writer | None = None
        self._claimed: Claimed | None = None

    def __call__(self) -> Claimed | Entry:
        self._writer = self._writer or _first_look(self._job)
        try:
            self._claimed = self._claimed or _take_over(self._job, self._writer)
        except Published as already:
            return cast(Entry, already.entry)
        in_log = any(entry.kind == "checkpoint" for entry in self._writer.entries)
        self._tell_saved(in_log and not self._claimed.local.in_use)
        _find_state(self._job, self._claimed)
        return self._claimed


def _first_look(job: Job) -> Writer:
    writer = Writer(job.output_store, job.run_id, job.index.sha256(), job.config.sha256())
    tell(f"run {job.run_id} (run.id={job.run_id} resumes it)\n{job.config.to_yaml()}")
    return writer


def _take_over(job: Job, writer: Writer) -> Claimed:
    from emotion_train.runs.local_states import LocalStates

    saved = [entry for entry in writer.entries if entry.kind == "checkpoint"]
    writer.claim(*((saved[-1].epoch, saved[-1].step) if saved else (0, 0)), facts=_facts(job))
    found = Claimed(writer, LocalStates(local_folder(job.config), job.run_id))
    found.remarks += [
        str(entry.metrics["words"])
        for entry in writer.entries
        if entry.kind == "note" and "words" in entry.metrics
    ]
    return found


def _find_state(job: Job, found: Claimed) -> None:
    """Find the newest state that verifies, and print its differences to this start."""
    from emotion_train.runs import checkpoint

    found.newest = checkpoint.newest(
        found.writer.entries,
        lambda entry: checkpoint.read_saved(job.output_store, job.run_id, entry),
        found.fell_back,
    )
    _prefer_local(job, found)
    if found.newest is not None:
        entry = found.newest.entry
        for words in checkpoint.check_same_question(
            found.newest.document, job.config, job.index, entry, job.run_id
        ):
            say(f"continued with another {words}")
        _say_of_processes(found.writer)


def _say_of_processes(writer: Writer) -> None:
    """Print a note when this claim has another number of processes than the claim before."""
    claims = [entry.metrics.get("processes") for entry in writer.log if entry.kind == "claim"]
    if len(claims) > 1 and claims[-2] not in (None, claims[-1]):
        say(f"continued on another number of processes (was {claims[-2]}, is {claims[-1]})")


def _facts(job: Job) -> Metrics:
    """The facts that `emotion-launch runs` shows, also for a run without a checkpoint."""
    config = job.config
    return {
        "base": config.model.base,
        "layers": config.model.layers,
        "precision": config.model.precision,
        "steps": config.train.steps(job.index.training.rows),
        "usd_per_hour": config.report.usd_per_hour,
        "device": device_name(job.accelerator.device.type),
        "processes": job.ranks.world_size,
    }


def _prefer_local(job: Job, found: Claimed) -> None:
    """Resume from a state that only this machine has when it is newer than the log's newest and
    answers the same question.

    Older states are dropped, since a run that is killed just then would resume from them, behind
    the newest.
    """
    from emotion_train.runs import checkpoint

    def place(entry: Entry) -> tuple[int, bool]:
        return entry.step, "macro_f1" in entry.metrics

    in_log = {place(entry) for entry in found.writer.entries if entry.kind == "checkpoint"}
    states = []
    for entry in found.local.entries():
        try:
            saved = checkpoint.read_saved(found.local.store, job.run_id, entry)
            checkpoint.check_same_question(saved.document, job.config, job.index, entry, job.run_id)
        except (WrongRequest, StorageError) as error:
            say(f"a state on this machine is passed over: {error}")
        else:
            if place(entry) not in in_log and (
                found.newest is None or place(entry) > place(found.newest.entry)
            ):
                states.append(saved)
    if states:
        step = found.newest.entry.step if found.newest is not None else 0
        say(
            f"{found.local.folder} holds step {states[-1].entry.step}, the log has {step}: resuming from the"
            " former"
        )
        found.newest, found.not_in_log = states[-1], states
