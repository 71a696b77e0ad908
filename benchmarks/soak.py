"""Does a run survive 500 kills? Real writers on a real S3 server, killed, stopped, doubled and cut
off, and an audit of all they left.

    # ends with 1 when anything was lost, torn or forked
    python benchmarks/soak.py --kills 500 --seed 1
    # the control, without create-only writes: ends with 1 when nothing was
    python benchmarks/soak.py --kills 60 --unconditional

Each writer is a process that does what `emotion_train.train` does around its training loop, with
the same functions: look, probe, claim, resume from the newest state that verifies, save in the
background, clear old checkpoints away, publish. Only the steps are made up: one takes 5 ms and adds
the ids of its examples to a chain of sha256, so that an example lost, repeated or out of order
shows in every later checkpoint. Writers keep a journal, on disk before they continue, of each entry
that the log has acknowledged to them. After a run is published its log, its parts and the journals
are compared with each other and with the same run done by nobody but the auditor.

What happens to the writers, drawn from the seed (their timing is the machine's own):

    kill         SIGKILL at any moment after the start, also while it claims or resumes
    zombie       SIGSTOP; a successor claims and trains; SIGCONT: the first must leave with 34
    duplicates   two are started at once: one must leave with 34, or find the run published
    server dies  SIGKILL to the server while a writer works, and a new start of it some time later

Writers give up on a silent server after a second instead of a minute, so that short outages do what
long ones do: the states wait in a folder of the machine (there are two), and the next writer there
resumes from them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from soak_page import broken_line, markdown, tell

from emotion_train.config import Config, load_config
from emotion_train.data.index import DataObject, Index, RowGroup, Split
from emotion_train.data.order import Order, counter_hash
from emotion_train.errors import EmotionTrainError, StorageError, exit_code
from emotion_train.model.load import BaseInfo
from emotion_train.processes.ranks import Ranks
from emotion_train.runs.checkpoint import MOMENTS, Progress, Question, Snapshot, State, read_saved
from emotion_train.runs.log import Entry, Writer, read_log, read_part, upload_part
from emotion_train.runs.retention import kept_entries
from emotion_train.storage import patience
from emotion_train.storage import s3 as s3_page
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.storage.s3 import S3Store
from emotion_train.training.claim import claim, look_before_claiming
from emotion_train.training.job import Job
from emotion_train.training.start import open_saver

STEPS = 1000  # of one run
STEP_S = 0.005
BATCH = 32
SAVE_EVERY_STEPS = 5
EVALUATE_EVERY_STEPS = 40
KEEP_EVERY = 10  # checkpoints
MACHINES = 2  # folders for states that the bucket did not take
ORDER = Order((400,) * 8, 8, seed=7)
ROWS, HALF = ORDER.row_counts[0], ORDER.rows // 2
NOTHING: dict[str, Any] = {"sha256": "0" * 64, "label_counts": (ROWS // 2,) * 2}  # nobody reads the posts
TRAIN = Split(
    rows=ORDER.rows,
    label_counts=(HALF, HALF),
    lanes=len(ORDER.row_counts),
    objects=(DataObject(key="train", bytes=99, etag=None, footer_bytes=9, footer_sha256="0" * 64),),
    row_groups=tuple(
        RowGroup(object=0, ordinal=i, start=10 * i, length=9, rows=ROWS, **NOTHING)
        for i in range(len(ORDER.row_counts))
    ),
)
INDEX = Index(labels=("calm", "glee"), splits={"train": TRAIN}, source={}, seed=7, versions={})
BASE = BaseInfo("base", "llama", "text", "0" * 64, "0" * 64, 1)
PATIENCE_S = 90.0
UNFENCED_S = 3.0  # how long a zombie of the control may write
KINDS = {"kill": 0.72, "zombie": 0.12, "duplicates": 0.1, "server_dies": 0.06}


# the run that all writers do


@dataclass
class Walk:
    """Where the made-up training is: a digest of all examples in their order, and how often each
    was seen.
    """

    step: int
    chain: bytes
    seen_N: np.ndarray[Any, Any]

    @classmethod
    def begin(cls) -> Walk:
        return cls(0, bytes(32), np.zeros(ORDER.rows, np.int32))

    def take_step(self) -> None:
        epoch, step = divmod(self.step, ORDER.steps(BATCH))
        groups_P, rows_P = ORDER.epoch(epoch).locate(ORDER.positions(step, BATCH))
        examples_P = groups_P * ORDER.row_counts[0] + rows_P
        self.chain = hashlib.sha256(self.chain + examples_P.astype("<i8").tobytes()).digest()
        np.add.at(self.seen_N, examples_P, 1)
        self.step += 1

    def metrics(self) -> dict[str, float | int | str | None]:
        found: dict[str, float | int | str | None] = {"chain": self.chain.hex()}
        if self.step % EVALUATE_EVERY_STEPS == 0:
            found["macro_f1"] = float(counter_hash(ORDER.seed, self.step)[0] % np.uint64(1000)) / 1000
        return found

    def state(self) -> State:
        """Some 40 KiB that depend on every step so far: each byte of the digest is a number."""
        digest_N = np.resize(np.frombuffer(self.chain, np.uint8), ORDER.rows).astype(np.float32)
        seen = torch.from_numpy(self.seen_N.astype(np.float32))
        progress = Progress(step=self.step, examples=int(self.seen_N.sum()))
        moments = {f"{key}.weight": seen.clone() for key in MOMENTS}
        return State(progress, {"weight": torch.from_numpy(digest_N)}, moments)

    @classmethod
    def resume(cls, state: State) -> Walk:
        return cls(
            state.progress.step,
            chain_of(state),
            state.optimizer["exp_avg.weight"].numpy().astype(np.int32),
        )


def chain_of(state: State) -> bytes:
    return state.adapter["weight"][:32].numpy().astype(np.uint8).tobytes()


def undisturbed() -> list[State]:
    """The state after each step of a run that nothing stops."""
    walk = Walk.begin()
    states = [walk.state()]
    for _ in range(STEPS):
        walk.take_step()
        states.append(walk.state())
    return states


def same(one: State, other: State) -> bool:
    def tensors(state: State) -> dict[str, torch.Tensor]:
        return {**state.adapter, **state.optimizer}

    return (
        one.progress == other.progress
        and tensors(one).keys() == tensors(other).keys()
        and all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(one).items())
    )


# a writer: runs in a process of its own


class Task(NamedTuple):
    words: list[str]
    folder: Path
    unconditional: bool


STEP, FIRST, INCARNATION, RESUMED_AT = range(4)  # what a writer shows on its board, -1 until it knows


def work(task: Task, board: Any) -> None:
    """Entry of a writer's process; its exit code is that of the training program."""
    with open(task.folder / "writers.log", "ab", buffering=0) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    s3_page.PATIENT_ATTEMPTS, patience.FIRST_PAUSE_S = 2, 0.1
    s3_page.CREATE_PAUSES_S = (0.0, 0.2)  # type: ignore[assignment]
    keep_journal(task.folder / "journals" / f"{os.getpid()}-{time.monotonic_ns()}")
    if task.unconditional:
        S3Store.create = S3Store.write  # type: ignore[method-assign]
    sys.exit(
        exit_code(
            f"writer {os.getpid()}", lambda: train(load_config(None, task.words), task.unconditional, board)
        )
    )


def keep_journal(path: Path) -> None:
    """From now on each entry that the log acknowledges to a `Writer` is on the disk before the
    writer continues.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def journaled(method: Callable[..., Entry]) -> Callable[..., Entry]:
        def acknowledged(self: Writer, *given: Any, **named: Any) -> Entry:
            entry = method(self, *given, **named)
            line = json.dumps({"run": self.run_id, "seq": entry.seq, "sha256": digest(entry)})
            os.write(descriptor, f"{line}\n".encode())
            os.fsync(descriptor)
            return entry

        return acknowledged

    Writer.claim = journaled(Writer.claim)  # type: ignore[method-assign]
    Writer.append = journaled(Writer.append)  # type: ignore[method-assign]


def digest(entry: Entry) -> str:
    return hashlib.sha256(entry.to_bytes()).hexdigest()


def train(config: Config, unconditional: bool, board: Any) -> int:
    """From the look at the log to the published run, as `emotion_train.train.run` goes about it on
    rank 0.
    """
    store = open_store(config.run.output_url)
    assert config.run.id is not None
    if look_before_claiming(config, INDEX, store, unconditional).final is not None:
        return 0
    alone: Any = None
    cpu: Any = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    job = Job(
        config,
        INDEX,
        alone,
        store,
        config.run.id,
        cpu,
        "one process",
        Ranks(),
        alone,
        alone,
        datetime.now(UTC),
        "",
        alone,
    )
    claimed = claim(job)
    if isinstance(claimed, Entry):
        return 0
    walk = Walk.resume(claimed.newest.state()) if claimed.newest is not None else Walk.begin()
    question = Question(config, INDEX, BASE)
    with open_saver(job, claimed) as saving:
        for saved in claimed.not_in_log:
            saving.offer(Snapshot(saved.state(), saved.entry.epoch, question, saved.entry.metrics))
        board[STEP] = board[FIRST] = walk.step
        board[INCARNATION] = claimed.writer.incarnation
        board[RESUMED_AT] = time.monotonic()
        while walk.step < STEPS:
            time.sleep(STEP_S)
            walk.take_step()
            board[STEP] = walk.step
            if walk.step % SAVE_EVERY_STEPS == 0:
                saving.offer(
                    Snapshot(walk.state(), walk.step // ORDER.steps(BATCH), question, walk.metrics())
                )
            saving.check()
        while not saving.drain(1.0):
            pass
        publish(claimed.writer, walk)
    return 0


def publish(writer: Writer, walk: Walk) -> None:
    """Parts of the final folder and the final entry, tried again while the store does not
    answer.
    """
    while True:
        try:
            part = upload_part(
                writer.store,
                writer.run_id,
                f"final/{writer.incarnation:08d}/chain.json",
                walk.chain.hex().encode(),
            )
            writer.append("final", STEPS // ORDER.steps(BATCH), STEPS, (part,), walk.metrics())
            return
        except StorageError as error:
            if not error.transient:
                raise
            time.sleep(0.2)


# what is done to them


@dataclass
class Process:
    """A writer as seen from outside."""

    process: Any
    board: Any
    started_at: float

    @property
    def resumed(self) -> bool:
        return bool(self.board[RESUMED_AT] > 0)

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait_until_resumed(self) -> bool:
        """False when it ended before that."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.resumed and not self.ended and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.resumed

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        self.process.join(timeout_s)
        code: int | None = self.process.exitcode
        return code


@dataclass
class Tally:
    kills: int = 0
    zombies: int = 0
    duplicates: int = 0
    server_kills: int = 0
    from_machine: int = 0
    runs: int = 0
    entries: int = 0
    checkpoints: int = 0
    acknowledged: int = 0
    parts: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    lost_steps: list[int] = field(default_factory=list)
    lost_in_outages: list[int] = field(default_factory=list)
    resume_seconds: list[float] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    forks: list[str] = field(default_factory=list)
    wrong_endings: list[str] = field(default_factory=list)

    @property
    def violations(self) -> dict[str, list[str]]:
        return {
            "torn": self.torn,
            "acknowledged but lost or changed": self.lost,
            "forks": self.forks,
            "endings that are not in the contract": self.wrong_endings,
        }


class Soak:
    """One server, and run after run on it until enough writers were killed."""

    def __init__(self, folder: Path, server: LocalS3, seed: int, unconditional: bool) -> None:
        self.folder = folder
        self.server = server
        self.draw = random.Random(seed)
        self.unconditional = unconditional
        self.tally = Tally()
        self.expected = undisturbed()
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(
            ["__main__", __name__, "boto3", "obstore", "obstore.auth.boto3", "emotion_train.runs.saver"]
        )
        self.url = "s3://soak"
        self.server.create_bucket("soak")
        self.store = open_store(self.url)
        self.run_id = ""
        self.seen: list[Entry] = []  # of the run's log, as it was when each entry was first read
        self.killed_at: int | None = None  # step of the owner that was killed last
        self.killed_in_outage = False
        (folder / "journals").mkdir()

    def go(self, kills: int) -> Tally:
        # imports what each writer then has from the start
        warm = self.processes.Process(target=time.sleep, args=(0,))
        warm.start()
        warm.join()
        while self.tally.kills < kills:
            self.tally.runs += 1
            self.run_id, self.seen, self.killed_at = f"run-{self.tally.runs:04d}", [], None
            wrong = len(self.tally.wrong_endings)
            while not self.published and self.tally.kills < kills and len(self.tally.wrong_endings) == wrong:
                (kind,) = self.draw.choices([*KINDS], [*KINDS.values()])
                getattr(self, kind)()
                self.look()
            if len(self.tally.wrong_endings) == wrong:
                self.finish()
            self.audit()
            self.tally.from_machine = (
                (self.folder / "writers.log").read_text(errors="replace").count("resuming from the former")
            )
            print(f"run {self.tally.runs}: {self.tally.kills} of {kills} kills", file=sys.stderr, flush=True)
        return self.tally

    @property
    def published(self) -> bool:
        return bool(self.seen) and self.seen[-1].kind == "final"

    def start(self) -> Process:
        words = [
            *(
                "data.url=unused",
                f"run.output_url={self.url}",
                f"run.id={self.run_id}",
                "preemption.notices=none",
            ),
            *(
                f"checkpoint.keep_every={KEEP_EVERY}",
                f"checkpoint.local_folder={self.folder}/machine-{self.draw.randrange(MACHINES)}",
            ),
        ]
        board = self.processes.RawArray("d", [-1.0] * 4)
        process = self.processes.Process(
            target=work, args=(Task(words, self.folder, self.unconditional), board)
        )
        started_at = time.monotonic()
        process.start()
        return Process(process, board, started_at)

    # the kinds

    def kill(self) -> None:
        one = self.start()
        self.let_it_work(one, early=0.25)
        self.end(one)

    def zombie(self) -> None:
        first = self.start()
        if not self.let_it_work(first):
            return self.end(first)
        first.send(signal.SIGSTOP)
        second = self.start()
        self.let_it_work(second)
        self.tally.zombies += 1
        first.send(signal.SIGCONT)
        self.must_be_fenced(first)
        self.end(first, second)

    def duplicates(self) -> None:
        both = [self.start(), self.start()]
        self.tally.duplicates += 1
        for one in both:
            one.wait_until_resumed()
        both.sort(key=lambda one: one.board[INCARNATION])
        if all(one.resumed for one in both):
            self.must_be_fenced(both[0])
        self.let_it_work(both[1])
        self.end(*both)

    def server_dies(self) -> None:
        one = self.start()
        self.let_it_work(one, early=0.2)
        self.server.kill()
        self.tally.server_kills += 1
        time.sleep(self.draw.uniform(0, 3.0))
        if self.draw.random() < 0.5:  # what was not saved waits on this machine
            self.end(one, outage=True)
            self.server.start()
            return
        self.server.start()
        self.let_it_work(one)
        time.sleep(self.draw.uniform(0, 1.5))
        self.end(one, outage=True)

    def finish(self) -> None:
        """Let the run come to its end."""
        while not self.published and not self.tally.wrong_endings:
            one = self.start()
            one.wait(PATIENCE_S)
            self.end(one)
            self.look()

    # what they have in common

    def let_it_work(self, one: Process, early: float = 0.0) -> bool:
        """Return at some moment after it has resumed, or, with probability `early`, at some moment
        before; False when it had not.
        """
        if self.draw.random() < early:
            one.wait(self.draw.uniform(0, 0.5))
            return one.resumed
        if one.wait_until_resumed():
            one.wait(self.draw.uniform(0, 0.6))
        return one.resumed

    def must_be_fenced(self, one: Process) -> None:
        code = one.wait(UNFENCED_S if self.unconditional else PATIENCE_S)
        if code is None:
            self.tally.forks.append(
                f"{self.run_id}: writer {one.board[INCARNATION]:.0f} went on although another had claimed"
                " the run"
            )

    def end(self, *writers: Process, outage: bool = False) -> None:
        """Kill those that live, and see how the others ended."""
        for one in writers:
            killed = not one.ended
            one.send(signal.SIGKILL)
            code = one.wait(PATIENCE_S)
            killed = killed and code == -signal.SIGKILL
            self.tally.kills += killed
            self.tally.endings["killed" if killed else str(code)] += 1
            allowed = (
                {0} | ({34} if len(writers) > 1 else set()) | ({2} if outage and not one.resumed else set())
            )
            if not killed and code not in allowed:
                self.tally.wrong_endings.append(
                    f"{self.run_id}: a writer ended with {code}; {self.last_words()}"
                )
            if one.resumed and not outage:
                self.tally.resume_seconds.append(one.board[RESUMED_AT] - one.started_at)
        self.count_lost_steps(
            sorted((one for one in writers if one.resumed), key=lambda one: one.board[INCARNATION]), outage
        )

    def count_lost_steps(self, owners: list[Process], outage: bool) -> None:
        """Steps that the last writer had done when it was killed, less those that its successor had
        when it resumed.
        """
        for one in owners:
            if self.killed_at is not None:
                lost = self.tally.lost_in_outages if self.killed_in_outage else self.tally.lost_steps
                lost.append(max(0, self.killed_at - int(one.board[FIRST])))
                self.killed_at = None
        if owners and owners[-1].process.exitcode == -signal.SIGKILL:
            self.killed_at, self.killed_in_outage = int(owners[-1].board[STEP]), outage

    def last_words(self) -> str:
        lines = (self.folder / "writers.log").read_text(errors="replace").splitlines()
        return " | ".join(lines[-3:])[-600:]

    # the audit

    def look(self) -> None:
        """Read what is new in the log, and see that the newest checkpoint is whole; nobody writes
        meanwhile.
        """
        with self.noted(self.tally.torn):
            self.seen += read_log(self.store, self.run_id, len(self.seen))
            for entry in [entry for entry in self.seen if entry.kind == "checkpoint"][-1:]:
                self.verify(entry)

    def audit(self) -> None:
        """Compare the log, its parts and the journals with each other and with the undisturbed
        run.
        """
        log: list[Entry] = []
        with self.noted(self.tally.torn):
            log = read_log(self.store, self.run_id)  # raises for a gap, and for an entry that is not whole
        self.tally.entries += len(log)
        checkpoints = [entry for entry in log if entry.kind == "checkpoint"]
        self.tally.checkpoints += len(checkpoints)
        if log[: len(self.seen)] != self.seen:
            self.tally.lost.append(f"{self.run_id}: an entry was replaced after it had been read")
        self.compare_with_journals({entry.seq: digest(entry) for entry in log})
        self.tally.forks += [f"{self.run_id}: {words}" for words in forks(log, self.expected)]
        for entry in kept_entries(log, KEEP_EVERY):
            with self.noted(self.tally.torn):
                self.verify(entry)
        self.tally.torn += [
            f"{self.run_id}: {entry.metrics.get('words')}"
            for entry in log
            if entry.kind == "note" and entry.metrics.get("note") == "fall-back"
        ]

    def verify(self, entry: Entry) -> None:
        """Every part of an entry has its size and sha256, and a checkpoint holds the state of its
        step; raises otherwise.
        """
        for part in entry.parts:
            read_part(self.store, self.run_id, part)
            self.tally.parts += 1
        if entry.kind == "checkpoint" and not same(
            read_saved(self.store, self.run_id, entry).state(), self.expected[entry.step]
        ):
            self.tally.forks.append(
                f"{self.run_id}: entry {entry.seq} does not hold the state of step {entry.step}"
            )

    def compare_with_journals(self, found: dict[int, str]) -> None:
        for path in sorted((self.folder / "journals").iterdir()):
            for line in path.read_text().splitlines(keepends=True):
                if not line.endswith("\n"):  # killed before the writer knew
                    continue
                acknowledged = json.loads(line)
                if acknowledged["run"] == self.run_id:
                    self.tally.acknowledged += 1
                    if found.get(acknowledged["seq"]) != acknowledged["sha256"]:
                        self.tally.lost.append(
                            f"{self.run_id}: entry {acknowledged['seq']} is not the one that was acknowledged"
                        )

    @contextmanager
    def noted(self, violations: list[str]) -> Iterator[None]:
        try:
            yield
        except EmotionTrainError as error:
            violations.append(f"{self.run_id}: {error}")


def forks(log: list[Entry], expected: list[State]) -> list[str]:
    """Where a log is not one line, or a chain is another than the undisturbed run's."""
    found = broken_line(log)
    for entry in log:
        if entry.kind in ("checkpoint", "final"):
            chain = chain_of(expected[entry.step]).hex()
            if entry.metrics.get("chain") != chain:
                found.append(
                    f"entry {entry.seq} has another history of examples than step {entry.step} of the"
                    " undisturbed run"
                )
    return found


# the page


def table(tally: Tally, seconds: float) -> str:
    lost, outages, resumed = (
        tally.lost_steps or [0],
        tally.lost_in_outages or [0],
        sorted(tally.resume_seconds) or [0.0],
    )
    rows = {
        "writers killed (SIGKILL)": tally.kills,
        "zombies (SIGSTOP, successor, SIGCONT)": tally.zombies,
        "pairs started at once": tally.duplicates,
        "server killed": tally.server_kills,
        "writers that ended by themselves": ", ".join(
            f"{count} with {code}" for code, count in sorted(tally.endings.items()) if code != "killed"
        ),
        "resumed from a state that only their machine had": tally.from_machine,
        "runs": tally.runs,
        "log entries": tally.entries,
        "of these checkpoints": tally.checkpoints,
        "acknowledged entries compared": tally.acknowledged,
        "parts verified": tally.parts,
        f"lost steps per kill (of {1000 * STEP_S:.0f} ms each): mean, max": (
            f"{statistics.mean(lost):.1f}, {max(lost)}"
        ),
        "the same when the server was killed before": f"{statistics.mean(outages):.1f}, {max(outages)}",
        "resume, seconds: mean, p95": (
            f"{statistics.mean(resumed):.2f}, {resumed[int(0.95 * (len(resumed) - 1))]:.2f}"
        ),
        **{name: len(found) for name, found in tally.violations.items()},
    }
    return markdown(rows, seconds)


def verdict(tally: Tally, unconditional: bool) -> int:
    """Prints what is wrong, and returns the exit code."""
    found = tell(tally.violations)
    if unconditional:
        print(
            f"\nThe condition was off: {len(found)} violations,"
            f" {'as there must be' if found else 'and there must be some'}."
        )
        return 0 if found else 1
    print(f"\n{len(found)} violations.")
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--unconditional",
        action="store_true",
        help="the control: writers create without the condition, and must do harm",
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, LocalS3(Path(folder, "s3")) as server:
        server.is_all_there_is()
        tally = Soak(Path(folder), server, arguments.seed, arguments.unconditional).go(arguments.kills)
    print(table(tally, time.monotonic() - began))
    return verdict(tally, arguments.unconditional)


if __name__ == "__main__":
    sys.exit(main())
