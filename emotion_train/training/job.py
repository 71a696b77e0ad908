"""The facts that stay the same from a process's start to its end, and rank 0's hold on the run."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from emotion_train.config import Config
from emotion_train.console import tell
from emotion_train.data.index import Index
from emotion_train.edges.paths import typed_path
from emotion_train.errors import WrongRequest
from emotion_train.processes.borrowed import is_borrowed
from emotion_train.processes.launcher_link import report_published
from emotion_train.runs.log import Entry, Writer
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    from accelerate import Accelerator

    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.load import BaseConfig
    from emotion_train.processes.interruption import Interruptions
    from emotion_train.processes.ranks import Ranks
    from emotion_train.runs.checkpoint import Saved
    from emotion_train.runs.local_states import LocalStates
    from emotion_train.runs.parent import ParentAdapter
    from emotion_train.training.engines import Kind


DATA_PATIENCE_S = 1800.0  # for a bucket that stops answering
_END_AFTER_S = 120.0  # enough for the saver to finish its write


@dataclass(frozen=True)
class Job:
    """The facts that stay the same from the start of this process to its end."""

    config: Config
    index: Index
    data_store: Store
    output_store: Store
    run_id: str
    accelerator: Accelerator
    engine: Kind
    ranks: Ranks
    interruptions: Interruptions
    tokenizer: PostTokenizer
    started: datetime
    again: str  # the command that resumes this run
    base: BaseConfig  # opened once
    parent: ParentAdapter | None = None  # to train on from, in a start without a checkpoint


@dataclass
class Claimed:
    """Rank 0's hold on the run after its claim: the right to write, and the state to resume
    from.
    """

    writer: Writer
    local: LocalStates
    newest: Saved | None = None  # the newest of the log's checkpoints and of the states on this machine
    # the states on this machine that the bucket did not take
    not_in_log: list[Saved] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # fall-backs, of this start and of those before

    def forget_states(self) -> None:
        """Let go of the states that were read, gigabytes for a whole encoder, once the trainer has
        them.
        """
        self.newest = None
        self.not_in_log.clear()

    def fell_back(self, words: str) -> None:
        """Say, log and remember, once, that a checkpoint was passed over."""
        if words not in self.remarks:
            say(words)
            last = self.writer.log[-1]
            self.writer.append("note", last.epoch, last.step, (), {"note": "fall-back", "words": words})
            self.remarks.append(words)


def end_even_if_stuck(after_s: float = _END_AFTER_S, code: int = 1) -> None:
    """End this process after `after_s` seconds, even if its GPU or a thread still waits for a lost
    process or store, unless the process is borrowed.
    """
    if is_borrowed():
        return
    timer = threading.Timer(after_s, os._exit, [code])
    timer.daemon = True
    timer.start()


def too_small(job: Job) -> str:
    """The sentence for a GPU that had no memory left, with the nearest setting that needs less."""
    from emotion_train.processes.machine import memory_of
    from emotion_train.sizing.fit import ran_out
    from emotion_train.training.microbatch import blocks_to_unpack, sizes_of

    (request, layout), gpu_bytes = sizes_of(job), memory_of(job.accelerator.device)
    if kept := blocks_to_unpack(job, gpu_bytes):
        words = (
            f"{request.base} in {request.recipe.precision} ran out of the GPU's memory with the weights of"
            f" {kept} blocks kept unpacked; type model.keep_unpacked=false."
        )
    else:
        words = str(ran_out(request, gpu_bytes, layout))
    return f"{words} The run resumes from its last checkpoint."


def local_folder(config: Config) -> Path:
    """The folder for the waiting states of all runs below one output URL."""
    return folder_here(config) / hashlib.sha256(config.run.output_url.encode()).hexdigest()[:12]


def folder_here(config: Config) -> Path:
    """The folder of runs' files on this machine; raises `WrongRequest` when it is another user's or
    cannot be written to.
    """
    default = Path(
        tempfile.gettempdir(), f"emotion-train-{os.getuid() if hasattr(os, 'getuid') else 'states'}"
    )
    named = config.checkpoint.local_folder
    folder = default if named is None else typed_path(named)
    if hasattr(os, "getuid") and folder.exists() and folder.stat().st_uid != os.getuid():
        raise WrongRequest(
            f"checkpoint.local_folder {folder} belongs to another user; name a folder that is yours."
        )
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is no folder"
        raise WrongRequest(
            f"checkpoint.local_folder is {folder} and {there} {why}; name a folder that is yours."
        )
    return folder.absolute()


def output_log(config: Config) -> Path | None:
    """The file for a run's output once nobody reads it, one for each start on this machine. None
    where `folder_here` is refused, which rank 0 reports before it claims.
    """
    name = f"{config.run.id or 'run'}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    with suppress(WrongRequest):
        return folder_here(config) / "output" / name
    return None


def run_id_of(config: Config, environment: Mapping[str, str]) -> str:
    """The run's name: `run.id`, else SKYPILOT_TASK_ID, which stays the same over recoveries, else
    the time and the config's hash.
    """
    if config.run.id is not None:
        return config.run.id
    if task := environment.get("SKYPILOT_TASK_ID"):
        return re.sub(r"[^A-Za-z0-9._-]", "-", task)[-128:].lstrip("._-")
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{config.sha256()[:6]}"


def data_patience_s(config: Config) -> float:
    """How long the bucket of the data may fail to answer, while other ranks wait for this one."""
    return min(DATA_PATIENCE_S, config.distributed.timeout_s / 2)


def say(words: str) -> None:
    tell(f"emotion-train: {words}")


def say_nothing(words: str) -> None:
    """Nothing is said: for ranks other than 0."""


def published(entry: Entry) -> int:
    """0, the exit code of a published run, for the final entry of its log; nothing else returns it.
    The launcher is told at once, so that later failures change nothing.
    """
    assert entry.kind == "final", f"a {entry.kind} publishes nothing"
    report_published()
    return 0


def say_published(store: Store, run_id: str, entry: Entry, shown: bool) -> None:
    if shown:
        tell(f"published at step {entry.step}: {store.url}/{run_id}", sys.stdout)
        tell(f"next: emotion-launch pull {shlex.quote(f'{store.url}/{run_id}')} --to adapter", sys.stdout)
