"""Does `emotion-launch run` keep its word whatever happens to it? The command that a person types,
behind a network that spoils answers; it and what it starts killed, stopped, doubled, signalled,
left without a reader and cut off from its store, and an audit of all that was left.

    # ends with 1 when anything was lost, torn, forked, trained otherwise or called what it is not
    python benchmarks/front_door_soak.py --disturbances 300 --seed 1
    # the same with checkpoints of 1.7 GiB, one part of them above 1 GiB; takes 30 GB of disk
    python benchmarks/front_door_soak.py --large --disturbances 25 --seed 1

The runs are small and real: two layers, 108 posts, 132 steps, dropout on. Each is started again
until it is published, and is then compared with a run of the same config that nothing happened to:
adapter and losses bit for bit. One run has one process, the next has two, and the third has one or
two by turns, with a tolerance, since two processes add gradients in another order. Of the starts
with one process, half have an accelerate config by which the launcher's child is the trainer
itself, and the others the chain of accelerate and its trainer; their results must be equal.

What happens, drawn from the seed (the timing is the machine's own):

    launcher, accelerate, worker, all   SIGKILL to that process, to one of the trainers, to all; by
                                        their command lines, also while they start; accelerate is
                                        the trainer where the chain has no other process
    sigterm, sigint                     to the launcher: the newest state is saved, it ends with 33
    freeze                              SIGSTOP to all, SIGCONT within two seconds
    zombie                              SIGSTOP to all; a successor claims; SIGCONT: the first must
                                        leave with 34
    twins                               two are started at once: the older claim must leave with 34
    reader                              whoever reads its standard output and error leaves
    full disk                           it is started with both on a full disk
    server dies                         SIGKILL to the S3 server, and a new start of it soon after

Between each run and the server is a proxy: of the answers to GET some have a bit flipped, each at
another place, or break off; of the PUTs some get no answer though they were done, some reach the
server twice, some are late.

Which posts a step was trained on is written down by the trainers themselves (watched/ on their
PYTHONPATH), before each step, and compared with the order that index and seed give. The price of
real processes: some ten seconds a start on two cores, nearly all of it imports.

With `--large` a random encoder of ModernBERT base's shape (150 million weights) is trained whole,
by one process. Most disturbances come while large parts are being uploaded, after a random number
of the requests. No two starts are at work at once, for want of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from soak_page import broken_line, markdown, tell
from watched.sitecustomize import FOLDER_VARIABLE, START_VARIABLE

sys.path.insert(0, str(Path(__file__).parents[1]))
from emotion_train.config import Config, load_config
from emotion_train.data.index import read_index
from emotion_train.data.order import Order
from emotion_train.data.reader import RowGroupReader
from emotion_train.errors import EmotionTrainError
from emotion_train.model.facts import WEIGHTS, WHOLE_WEIGHTS
from emotion_train.preparation.steps import prepare
from emotion_train.report.schema import Report
from emotion_train.runs.checkpoint import read_saved
from emotion_train.runs.log import Entry, read_log, read_part
from emotion_train.runs.published import download
from emotion_train.runs.retention import kept_entries
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.run_chain import is_accelerate, is_trainer, one_process_config
from tests.helpers.tiny_models import causal_checkpoint, encoder_checkpoint
from tests.helpers.tiny_runs import tiny_words, write_posts

ROOT = Path(__file__).parents[1]
BUCKET = "soak"
RUNS, POSTS = f"s3://{BUCKET}/runs", f"s3://{BUCKET}/posts"
WORDS = [
    f"data.url={POSTS}",
    f"run.output_url={RUNS}",
    "checkpoint.every_seconds=null",
    "preemption.notices=none",
    "preemption.hold_s=0",
]
SMALL_WORDS = [
    "train.epochs=12",
    "train.global_batch_size=10",
    "train.tokens_per_microbatch=200",
    # Adam turns rounding into steps of the learning rate where a gradient is near 0, so it is small
    "train.learning_rate=0.001",
    "checkpoint.every_steps=4",
    "checkpoint.keep_every=10",
]
LARGE_WORDS = [
    "train.max_steps=20",
    "train.global_batch_size=2",
    "train.tokens_per_microbatch=64",
    "data.max_length=16",
    "train.learning_rate=0.0001",
    "checkpoint.every_steps=1",
    "checkpoint.keep_every=null",
]
MODERNBERT_BASE: dict[str, Any] = {
    "vocab_size": 50_368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "layer_types": ["sliding_attention" if layer % 3 else "full_attention" for layer in range(22)],
    "local_attention": 128,
    "initializer_range": 0.02,
}
HERE_SHARE = 0.5  # of the starts with one process
MACHINES = 2  # folders for states that the bucket did not take
PATIENCE_S = 1200.0  # a busy machine is no defect
MOST_STEPS = 24  # between two others, while it trains
OUTLIVES_S = 15.0  # what is left of a run so long after its launcher's death is a violation
DISTURBANCES = {
    "launcher": 0.1,
    "accelerate": 0.06,
    "worker": 0.08,
    "all": 0.06,
    "sigterm": 0.1,
    "sigint": 0.04,
    "freeze": 0.14,
    "zombie": 0.06,
    "twins": 0.05,
    "reader": 0.12,
    "full_disk": 0.05,
    "server_dies": 0.14,
}
LARGE_DISTURBANCES = {
    "launcher": 0.14,
    "accelerate": 0.06,
    "worker": 0.3,
    "all": 0.16,
    "sigterm": 0.12,
    "freeze": 0.06,
    "server_dies": 0.16,
}
Shares = dict[str, dict[str, float]]
SPOILT: Shares = {  # of the requests of a method, what happens to which share
    "GET": {"elsewhere": 0.02, "truncated": 0.01},
    "PUT": {"no answer": 0.02, "twice": 0.02, "slow": 0.02},
}
# of some 30 GETs and 150 PUTs for each large checkpoint
LARGE_SPOILT: Shares = {
    "GET": {"elsewhere": 0.003, "truncated": 0.003},
    "PUT": {"no answer": 0.003, "twice": 0.003, "slow": 0.003},
}
LARGE_UPLOADS = 215  # of one large checkpoint: boto3's pieces have 8 MiB
Posts = dict[int, list[str]]  # ids by step


class Lane(NamedTuple):
    """Runs that are alike: the processes of each start, by turns, and how far the result may be
    from that of the undisturbed run, which has as many as the first.
    """

    processes: tuple[int, ...]
    dropout: float
    tolerance: float

    @property
    def name(self) -> str:
        return f"{'-'.join(map(str, self.processes))}-processes"


LANES = (Lane((1,), 0.1, 0.0), Lane((2,), 0.1, 0.0), Lane((1, 2), 0.1, 1e-5))


class Scale(NamedTuple):
    """What is trained, and how often what happens to it."""

    words: list[str]
    lanes: tuple[Lane, ...]
    disturbances: dict[str, float]
    spoilt: Shares
    starts_s: float  # so long a start takes, about; early disturbances come within it
    is_large: bool
    memory: str = "300MiB"  # of the server

    def write_base(self, folder: Path) -> None:
        if self.is_large:
            encoder_checkpoint(folder, "modernbert", **MODERNBERT_BASE)
        else:
            causal_checkpoint(folder, "llama")


SMALL = Scale(SMALL_WORDS, LANES, DISTURBANCES, SPOILT, 12.0, False)
LARGE = Scale(LARGE_WORDS, LANES[:1], LARGE_DISTURBANCES, LARGE_SPOILT, 30.0, True, "2GiB")


class Network(FaultProxy):
    """Spoils requests as `shares` says, and counts the pieces of large uploads that began."""

    def __init__(self, endpoint: str, seed: int, shares: Shares) -> None:
        super().__init__(endpoint, slow_s=0.5)
        self.spoilt: Counter[str] = Counter()
        self.uploads = 0
        self._draw = random.Random(seed)
        self._shares = shares

    def passes(self, method: str, path: str, headers: Message) -> None:
        with self._lock:
            self.uploads += method == "PUT" and "partNumber=" in path

    def take(self, method: str, path: str) -> str | None:
        with self._lock:
            draw = self._draw.random()
            for kind, share in self._shares.get(method, {}).items():
                draw -= share
                if draw < 0:
                    self.spoilt[f"{method} {kind}"] += 1
                    return kind
        return None


@dataclass
class Tally:
    disturbances: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    here: int = 0  # of the starts, those whose trainer is the launcher's child
    runs: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    entries: int = 0
    checkpoints: int = 0
    steps: int = 0
    repeated: int = 0
    parts: int = 0
    outlived_s: list[float] = field(default_factory=list)
    fenced_s: list[float] = field(default_factory=list)
    to_first_step_s: list[float] = field(default_factory=list)
    during_uploads: int = 0
    peak_bytes: int = 0
    saves: list[str] = field(default_factory=list)
    left_in_final: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    forks: list[str] = field(default_factory=list)
    other_posts: list[str] = field(default_factory=list)
    other_results: list[str] = field(default_factory=list)
    wrong_endings: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    garbage: list[str] = field(default_factory=list)

    @property
    def violations(self) -> dict[str, list[str]]:
        return {
            "torn": self.torn,
            "forks": self.forks,
            "steps trained on other posts than the order's": self.other_posts,
            "results that differ from the undisturbed run's": self.other_results,
            "endings that are not in the contract": self.wrong_endings,
            f"processes left {OUTLIVES_S:.0f} s after their launcher": self.left_behind,
            "parts and uploads of published runs that no entry names": self.garbage,
        }


class Launch:
    """One `emotion-launch run` and everything below it."""

    def __init__(
        self,
        number: int,
        count: int,
        line: list[str],
        environment: dict[str, str],
        folder: Path,
        full_disk: bool,
    ) -> None:
        self.number = number
        self.count = count  # of its trainers
        self.harmed: set[str] = set()  # what was done to it
        self.output = folder / f"output-{number:04d}"
        self._mark = f"{START_VARIABLE}={number:04d}".encode()
        self._journals = folder / "journals"
        self.began = time.monotonic()
        self.reader: subprocess.Popen[bytes] | None = None
        environment = {**environment, START_VARIABLE: f"{number:04d}"}
        with Path("/dev/full").open("wb") as full:
            self.process = subprocess.Popen(
                line,
                env=environment,
                stdout=full if full_disk else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if self.process.stdout is not None:
            with self.output.open("wb") as file, self.process.stdout:
                self.reader = subprocess.Popen(["cat"], stdin=self.process.stdout, stdout=file)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, timeout_s: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout_s)
        return None

    def processes(self) -> dict[int, list[bytes]]:
        """The command line of each living process that was started below it, itself included."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._mark in (path / "environ").read_bytes().split(b"\0"):
                    found[int(path.name)] = (path / "cmdline").read_bytes().split(b"\0")
        return found

    def accelerate(self) -> list[int]:
        return [one for one, line in self.processes().items() if is_accelerate(line)]

    def trainers(self) -> list[int]:
        return [one for one, line in self.processes().items() if is_trainer(line)]

    def send(self, number: signal.Signals, processes: list[int]) -> None:
        for one in processes:
            with suppress(ProcessLookupError):
                os.kill(one, number)

    def journals(self) -> dict[tuple[int, int], Posts]:
        """The ids of each step that was begun, by (rank, process id); epoch and step of each line
        agree with its number.
        """
        found: dict[tuple[int, int], Posts] = {}
        for path in sorted(self._journals.glob(f"{self.number:04d}-*")):
            rank, process_id = map(int, path.name.split("-")[1:])
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    step, epoch, inside, ids = json.loads(line)
                    found.setdefault((rank, process_id), {})[step] = [f"{epoch}/{inside}", *ids]
        return found

    @property
    def begun(self) -> int:
        """Steps that it has begun so far."""
        journals = self._journals.glob(f"{self.number:04d}-*")
        return max((path.read_bytes().count(b"\n") for path in journals), default=0)

    def trains(self) -> bool:
        return self.begun > 0

    def last_words(self) -> str:
        with suppress(FileNotFoundError):
            return " | ".join(self.output.read_text(errors="replace").splitlines()[-4:])[-700:]
        return "nobody read what it said"


class Soak:
    """One server, and run after run on it until enough has happened."""

    def __init__(
        self,
        folder: Path,
        server: LocalS3,
        network: Network,
        seed: int,
        wanted: int,
        minutes: float,
        scale: Scale,
    ) -> None:
        self.folder, self.server, self.network, self.wanted = folder, server, network, wanted
        self.scale = scale
        self.until = time.monotonic() + 60 * minutes
        self.draw = random.Random(seed)
        self.tally = Tally()
        (folder / "journals").mkdir()
        (folder / "tmp").mkdir()
        server.create_bucket(BUCKET)
        scale.write_base(folder / "base")
        self.one_process = one_process_config(folder)
        prepare(str(write_posts(folder / "source")), POSTS)
        self.store = open_store(RUNS)
        self.config = load_config(None, tiny_words(folder, *WORDS, *scale.words))
        self.posts = posts_of_steps(self.config)
        self.undisturbed: dict[Lane, Path] = {}
        # of the run at work
        self.lane, self.run_id, self.seen = scale.lanes[0], "", list[Entry]()
        self.launches: list[Launch] = []
        self.now: Launch | None = None
        self.look_at = 0.0

    def go(self) -> None:
        number = 0
        while self.goes_on():
            self.lane = self.scale.lanes[number % len(self.scale.lanes)]
            self.one_run(f"run-{(number := number + 1):04d}")
            print(
                f"{self.run_id}, {self.lane.name}: {self.happened} of {self.wanted} disturbances,"
                f" {sum(map(len, self.tally.violations.values()))} violations",
                file=sys.stderr,
                flush=True,
            )

    def goes_on(self) -> bool:
        return self.happened < self.wanted and time.monotonic() < self.until

    @property
    def happened(self) -> int:
        return self.tally.disturbances.total()

    def one_run(self, run_id: str) -> None:
        if self.lane not in self.undisturbed:
            self.undisturbed[self.lane] = self.in_peace()
        if not self.goes_on():
            return
        self.begin(run_id)
        wrong = len(self.tally.wrong_endings)
        while not self.is_published() and len(self.tally.wrong_endings) == wrong:
            if self.goes_on():
                if self.scale.is_large:
                    self.server.free_disk()
                shares = self.scale.disturbances
                (kind,) = self.draw.choices([*shares], [*shares.values()])
                getattr(self, kind)()
            else:
                self.to_the_end(self.at_work())
        if self.now is not None:
            self.to_the_end(self.now)
        self.tally.runs[self.lane.name] += 1
        self.audit()

    def begin(self, run_id: str) -> None:
        self.run_id, self.seen, self.launches, self.now = run_id, [], [], None

    def in_peace(self) -> Path:
        """The published folder of a run of this lane that nothing happens to, not even a flipped
        bit.
        """
        self.run_id = f"whole-{self.lane.name}"
        rarely = ["checkpoint.every_steps=10"] if self.scale.is_large else []
        launch = self.start(
            processes=self.lane.processes[0], endpoint=self.server.endpoint, words=rarely, here=False
        )
        code = launch.wait(PATIENCE_S)
        assert code == 0, f"the undisturbed run ended with {code}: {launch.last_words()}"
        download(f"{RUNS}/{self.run_id}", self.folder / self.run_id)
        return self.folder / self.run_id

    # starting, and what a disturbance waits for

    def start(
        self,
        full_disk: bool = False,
        processes: int | None = None,
        endpoint: str | None = None,
        words: Sequence[str] = (),
        here: bool = True,
    ) -> Launch:
        self.tally.starts += 1
        count = processes or self.lane.processes[self.tally.starts % len(self.lane.processes)]
        here = here and count == 1 and self.draw.random() < HERE_SHARE
        self.tally.here += here
        machine = self.folder / f"machine-{self.draw.randrange(MACHINES)}"
        own = [f"run.id={self.run_id}", f"lora.dropout={self.lane.dropout}"]
        words = tiny_words(self.folder, *WORDS, *self.scale.words, *own, *words)
        accelerate = str(self.one_process) if here else "cpu"
        run = ["run", "--accelerate-config", accelerate, "--processes", str(count)]
        line = [sys.executable, "-m", "launch.cli", *run, *words, f"checkpoint.local_folder={machine}"]
        path = [str(Path(__file__).parent / "watched"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": endpoint or self.network.endpoint,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.folder / "tmp"),
            FOLDER_VARIABLE: str(self.folder / "journals"),
        }
        launch = Launch(self.tally.starts, count, line, environment, self.folder, full_disk)
        self.launches.append(launch)
        return launch

    def at_work(self) -> Launch:
        """A launch of the run that has not ended."""
        if self.now is None or self.now.ended:
            if self.now is not None:
                self.end(self.now)
            self.now = self.start()
        return self.now

    def a_moment(self, launch: Launch, early: float = 0.25) -> bool:
        """Return at some moment: with probability `early` while it starts, else while it trains.
        False when it has ended by then.
        """
        if not launch.trains() and self.draw.random() < early:
            launch.wait(self.draw.uniform(0, self.scale.starts_s))
            return not launch.ended
        if not launch.trains():
            self.wait_until(lambda: launch.trains() or launch.ended, launch, "first step")
            if launch.trains():
                self.tally.to_first_step_s.append(time.monotonic() - launch.began)
        (self.some_uploads if self.scale.is_large else self.some_steps)(launch)
        return not launch.ended

    def some_uploads(self, launch: Launch) -> None:
        until = self.network.uploads + self.draw.randrange(1, 3 * LARGE_UPLOADS // 2)
        self.wait_until(lambda: self.network.uploads >= until or launch.ended, launch, "upload")
        self.tally.during_uploads += not launch.ended

    def some_steps(self, launch: Launch) -> None:
        until = launch.begun + self.draw.randrange(MOST_STEPS)
        self.wait_until(lambda: launch.begun >= until or launch.ended, launch, f"step {until}")

    def wait_until(self, reached: Callable[[], bool], launch: Launch, what: str) -> bool:
        """False, and a violation, when it takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            self.look_at_memory(launch)
            if time.monotonic() > deadline:
                self.tally.wrong_endings.append(
                    f"{self.run_id}: no {what} of start {launch.number} in {PATIENCE_S:.0f} s;"
                    f" {launch.last_words()}"
                )
                launch.send(signal.SIGKILL, [*launch.processes()])
                return False
            time.sleep(0.05)
        return True

    def look_at_memory(self, launch: Launch) -> None:
        """Once a second: the most memory that a trainer had so far."""
        if time.monotonic() < self.look_at:
            return
        self.look_at = time.monotonic() + 1
        for one in launch.trainers():
            with suppress(OSError):
                found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{one}/status").read_text())
                self.tally.peak_bytes = max(self.tally.peak_bytes, int(found[1]) << 10 if found else 0)

    def to_the_end(self, launch: Launch) -> None:
        self.wait_until(lambda: launch.ended, launch, "end")
        self.end(launch)

    # what happens

    def launcher(self) -> None:
        launch = self.at_work()
        if self.a_moment(launch, early=0.4):
            self.count("launcher", launch)
            launch.process.kill()
            self.to_the_end(launch)

    def accelerate(self) -> None:
        self.kill_inside("accelerate", Launch.accelerate)

    def worker(self) -> None:
        self.kill_inside("worker", Launch.trainers)

    def kill_inside(self, kind: str, of: Callable[[Launch], list[int]]) -> None:
        launch = self.at_work()
        if not self.a_moment(launch):
            return
        self.wait_until(lambda: bool(of(launch)) or launch.ended, launch, kind)
        if found := of(launch):
            self.count(kind, launch)
            launch.send(signal.SIGKILL, [self.draw.choice(sorted(found))])
            self.to_the_end(launch)

    def all(self) -> None:
        launch = self.at_work()
        if self.a_moment(launch, early=0.4):
            self.count("all", launch)
            launch.send(signal.SIGKILL, [*launch.processes()])
            self.to_the_end(launch)

    def sigterm(self) -> None:
        self.signalled(signal.SIGTERM)

    def sigint(self) -> None:
        self.signalled(signal.SIGINT)

    def signalled(self, number: signal.Signals) -> None:
        launch = self.at_work()
        if self.a_moment(launch):
            # before its handlers are there a signal ends it as it ends any program
            self.wait_until(lambda: bool(launch.accelerate()) or launch.ended, launch, "accelerate")
            if launch.ended:
                return
            self.count(number.name.lower(), launch)
            launch.process.send_signal(number)
            self.to_the_end(launch)

    def freeze(self) -> None:
        launch = self.at_work()
        if self.a_moment(launch):
            self.count("freeze", launch)
            stopped = [*launch.processes()]
            launch.send(signal.SIGSTOP, stopped)
            time.sleep(self.draw.uniform(0, 2))
            launch.send(signal.SIGCONT, stopped)

    def zombie(self) -> None:
        first = self.at_work()
        if not self.a_moment(first, early=0) or self.is_published():
            return
        self.count("zombie", first)
        stopped = [*first.processes()]
        first.send(signal.SIGSTOP, stopped)
        claims = len(self.claims())
        self.now = second = self.start()
        self.wait_until(lambda: len(self.claims()) > claims or second.ended, second, "claim")
        second.wait(self.draw.uniform(0, self.scale.starts_s))
        first.send(signal.SIGCONT, stopped)
        self.must_be_fenced(first)

    def twins(self) -> None:
        if self.now is not None:
            self.to_the_end_by_force(self.now)
        claims = len(self.claims())
        both = [self.start(), self.start()]
        self.count("twins", *both)
        self.wait_until(
            lambda: len(self.claims()) >= claims + 2 or any(one.ended for one in both), both[1], "claims"
        )
        order = self.claims()[claims:]
        both.sort(key=lambda one: self.place_of(one, order))
        self.now = both[1]
        if len(order) > 1:
            self.must_be_fenced(both[0])
        else:
            self.to_the_end(both[0])

    def reader(self) -> None:
        launch = self.at_work()
        if launch.reader is not None and launch.reader.poll() is None and self.a_moment(launch):
            self.count("reader", launch)
            launch.reader.kill()
            launch.reader.wait()

    def full_disk(self) -> None:
        if self.now is not None and not self.now.ended:
            return
        if self.now is not None:
            self.end(self.now)
        self.now = self.start(full_disk=True)
        self.count("full_disk", self.now)

    def server_dies(self) -> None:
        launch = self.at_work()
        if self.a_moment(launch):
            self.count("server_dies", launch)
            self.server.kill()
            time.sleep(self.draw.uniform(0, 3))
            self.server.start()

    # how each ends

    def count(self, kind: str, *launches: Launch) -> None:
        self.tally.disturbances[kind] += 1
        for launch in launches:
            launch.harmed.add(kind)

    def to_the_end_by_force(self, launch: Launch) -> None:
        """A launch that is in the way of the next scene; it ends as by a termination."""
        if not launch.ended:
            launch.harmed.add("sigterm")
            launch.process.terminate()
        self.to_the_end(launch)

    def must_be_fenced(self, launch: Launch) -> None:
        began = time.monotonic()
        if self.wait_until(lambda: launch.ended, launch, "end of the fenced writer"):
            self.tally.fenced_s.append(time.monotonic() - began)
            launch.harmed.add("fenced")
        self.end(launch)

    def end(self, launch: Launch) -> None:
        """See how it ended, and that nothing of it is left; once a launch."""
        if "ended" in launch.harmed:
            return
        code, ended_at = launch.process.wait(), time.monotonic()
        while (left := launch.processes()) and time.monotonic() - ended_at < OUTLIVES_S:
            time.sleep(0.02)
        if "launcher" in launch.harmed:
            self.tally.outlived_s.append(time.monotonic() - ended_at)
        if left:
            self.tally.left_behind.append(f"{self.run_id}: {len(left)} of start {launch.number}")
            launch.send(signal.SIGKILL, [*left])
        if launch.reader is not None:
            launch.reader.wait()
        self.tally.endings["killed" if code == -signal.SIGKILL else str(code)] += 1
        if (words := self.wrong_about(launch, code)) is not None:
            self.tally.wrong_endings.append(
                f"{self.run_id}: start {launch.number} ({', '.join(sorted(launch.harmed))}) ended with"
                f" {code}{words}; {launch.last_words()}"
            )
        launch.harmed.add("ended")

    def wrong_about(self, launch: Launch, code: int) -> str | None:
        """What is wrong about this exit code, in words; None where nothing is."""
        if code == 0:
            return None if self.is_published() else " and the run is not published"
        if code == 33:
            return self.wrong_about_33(launch)
        if code == 34:
            order = self.claims()
            return None if self.place_of(launch, order) < len(order) - 1 else " though nobody took the run"
        killed = launch.harmed & {"accelerate", "worker", "all", "launcher"}
        if code == 1:
            # a signal before any trainer has begun has nothing to save
            early = launch.harmed & {"sigterm", "sigint"} and not launch.trains()
            return None if killed & {"accelerate", "worker"} or early else ""
        return None if code == -signal.SIGKILL and killed & {"launcher", "all"} else ""

    def wrong_about_33(self, launch: Launch) -> str | None:
        """33 promises that the newest state is in the log."""
        if not launch.harmed & {"sigterm", "sigint"}:
            return " and nobody sent a signal"
        begun = max((max(steps) for steps in launch.journals().values()), default=-1)
        saved = max((entry.step for entry in self.log() if entry.kind == "checkpoint"), default=0)
        return None if saved > begun else f" after step {begun + 1}, and the log has step {saved}"

    # the log, as it is behind the network

    def log(self) -> list[Entry]:
        with suppress(EmotionTrainError):
            self.seen += read_log(self.store, self.run_id, len(self.seen))
        return self.seen

    def is_published(self) -> bool:
        log = self.log()
        return bool(log) and log[-1].kind == "final"

    def claims(self) -> list[Entry]:
        return [entry for entry in self.log() if entry.kind == "claim"]

    def place_of(self, launch: Launch, claims: list[Entry]) -> int:
        """Which of the claims is its own; -1 where none is."""
        own = {process_id for rank, process_id in launch.journals() if rank == 0}
        own |= set(launch.trainers())
        return next((i for i, entry in enumerate(claims) if entry.metrics["process_id"] in own), -1)

    # the audit

    def audit(self) -> None:
        with self.noted(self.tally.torn):
            log = read_log(self.store, self.run_id)  # raises for a gap, and for an entry that is not whole
            self.tally.entries += len(log)
            self.tally.checkpoints += sum(entry.kind == "checkpoint" for entry in log)
            if log[: len(self.seen)] != self.seen:
                self.tally.torn.append(f"{self.run_id}: an entry was replaced after it had been read")
            self.tally.forks += [f"{self.run_id}: {words}" for words in broken_line(log)]
            self.tally.torn += [
                f"{self.run_id}: {entry.metrics.get('words')}" for entry in log if entry.kind == "note"
            ]
            for entry in kept_entries(log, self.config.checkpoint.keep_every):
                self.verify(entry)
            self.compare_posts()
            if log[-1].kind == "final":
                self.compare_results()
                self.look_for_garbage(log)

    def verify(self, entry: Entry) -> None:
        """Every part has its size and sha256; raises otherwise."""
        if entry.kind == "checkpoint":
            read_saved(self.store, self.run_id, entry).state()
        else:
            for part in entry.parts:
                read_part(self.store, self.run_id, part)
        self.tally.parts += len(entry.parts)

    def look_for_garbage(self, log: list[Entry]) -> None:
        """What a published run has beside its log and the parts of kept entries. Objects that a
        killed publication left in final/ are counted apart: no role may delete there.
        """
        kept = {
            part.key for entry in kept_entries(log, self.config.checkpoint.keep_every) for part in entry.parts
        }
        run = f"{self.run_id}/"
        for info in self.store.list(run):
            if (key := info.key.removeprefix(run)) not in kept and not key.startswith("log/"):
                (self.tally.left_in_final if key.startswith("final/") else self.tally.garbage).append(
                    info.key
                )
        self.tally.garbage += self.store.abort_uploads(run, lambda key: True)

    def compare_posts(self) -> None:
        """Each step of each start with the order's, and whether the starts follow each other
        without a gap.
        """
        spans, seen, claims = [], Counter[int](), self.claims()
        # of two that are started at once, either may claim first
        for launch in sorted(self.launches, key=lambda one: self.place_of(one, claims)):
            by_rank = launch.journals()
            steps = sorted(set[int]().union(*by_rank.values()))
            for step in steps:
                begun = [posts[step] for posts in by_rank.values() if step in posts]
                whole = len(begun) == launch.count
                # a rank may be killed before it begins the step that another is in
                if not (whole or step == steps[-1]) or not self.is_right(step, begun, whole):
                    self.tally.other_posts.append(f"{self.run_id}: step {step} of start {launch.number}")
            if steps:
                if steps != list(range(steps[0], steps[-1] + 1)):
                    self.tally.other_posts.append(f"{self.run_id}: start {launch.number} left out steps")
                spans.append((steps[0], steps[-1] + 1))
                seen.update(steps)
        self.tally.steps += seen.total()
        self.tally.repeated += seen.total() - len(seen)
        self.require_no_gap(spans)

    def is_right(self, step: int, begun: list[list[str]], whole: bool) -> bool:
        """Whether the ranks that began the step have posts of it, each post once; all of them where
        all ranks did.
        """
        head, *meant = self.posts[step]
        ids = Counter(one for posts in begun for one in posts[1:])
        right = ids == Counter(meant) if whole else not ids - Counter(meant)
        return right and {posts[0] for posts in begun} == {head}

    def require_no_gap(self, spans: list[tuple[int, int]]) -> None:
        """From the last step back, each start resumed where an earlier one had been."""
        at = len(self.posts)
        for first, end in reversed(spans):
            if end >= at:
                at = first
        if at != 0:
            self.tally.other_posts.append(f"{self.run_id}: nobody trained the steps before {at}: {spans}")

    def compare_results(self) -> None:
        folder, whole = self.folder / self.run_id, self.undisturbed[self.lane]
        download(f"{RUNS}/{self.run_id}", folder)
        name = WHOLE_WEIGHTS if self.scale.is_large else WEIGHTS
        ours, theirs = (load_file(one / name) for one in (folder, whole))
        far = [
            name
            for name in theirs.keys() | ours.keys()
            if name not in ours
            or name not in theirs
            or not torch.allclose(ours[name], theirs[name], rtol=0, atol=self.lane.tolerance)
        ]
        if far:
            self.tally.other_results.append(f"{self.run_id}: {len(far)} tensors of the adapter")
        one, other = (
            Report.model_validate_json((each / "report" / "report.json").read_bytes())
            for each in (folder, whole)
        )
        losses = [
            (a.step, b.step, a.train_loss, b.train_loss)
            for a, b in zip(one.history, other.history, strict=False)
        ]
        self.tally.saves.append(
            f"{one.speed.saves}: {one.speed.stall_seconds:.0f}, {one.speed.upload_seconds:.0f}"
        )
        if len(one.history) != len(other.history) or any(
            step != meant or abs((loss or 0) - (expected or 0)) > self.lane.tolerance
            for step, meant, loss, expected in losses
        ):
            self.tally.other_results.append(f"{self.run_id}: the losses")
        if (one.speed.posts, one.speed.real_tokens) != (other.speed.posts, other.speed.real_tokens):
            self.tally.other_results.append(f"{self.run_id}: the number of posts or tokens")

    @contextmanager
    def noted(self, violations: list[str]) -> Iterator[None]:
        try:
            yield
        except EmotionTrainError as error:
            violations.append(f"{self.run_id}: {error}")


def posts_of_steps(config: Config) -> Posts:
    """What the order says: `epoch/step` and the ids of each step of the run."""
    store = open_store(config.data.url)
    split = read_index(store).split("train")
    order = Order(split.row_counts, split.lanes, config.run.seed)
    size, found = config.train.global_batch_size, dict[int, list[str]]()
    steps = config.train.steps(split.rows)
    with RowGroupReader(store, split) as reader:
        for epoch in range(config.train.epochs):
            for step in range(order.steps(size)):
                groups_P, rows_P = order.epoch(epoch).locate(order.positions(step, size))
                places = zip(groups_P.tolist(), rows_P.tolist(), strict=True)
                ids = [reader.rows(group).ids[row] for group, row in places]
                found[len(found)] = [f"{epoch}/{step}", *ids]
    return {step: posts for step, posts in found.items() if step < steps}


# the page


def table(tally: Tally, network: Network, seconds: float) -> str:
    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):.1f}, {max(values):.1f}" if values else "none"

    rows = {
        "disturbances": tally.disturbances.total(),
        **{name.replace("_", " "): tally.disturbances[name] for name in DISTURBANCES},
        "answers spoilt": ", ".join(f"{count} {kind}" for kind, count in sorted(network.spoilt.items())),
        "starts of `emotion-launch run` / of these one process becomes the trainer": (
            f"{tally.starts} / {tally.here}"
        ),
        "endings": ", ".join(f"{count} with {code}" for code, count in sorted(tally.endings.items())),
        "runs": ", ".join(f"{count} of {name}" for name, count in sorted(tally.runs.items())),
        "log entries / of these checkpoints": f"{tally.entries} / {tally.checkpoints}",
        "parts verified": tally.parts,
        "steps whose posts were compared / trained again": f"{tally.steps} / {tally.repeated}",
        "seconds from a start to its first step: mean, most": spread(tally.to_first_step_s),
        "seconds that trainers outlived a launcher that was killed: mean, most": spread(tally.outlived_s),
        "seconds until a fenced run had ended: mean, most": spread(tally.fenced_s),
        "of the disturbances, while large parts were uploaded": tally.during_uploads,
        "most memory of a trainer, GiB": f"{tally.peak_bytes / 2**30:.1f}",
        "saves of each run: seconds that training waited, seconds of uploads": "; ".join(tally.saves),
        "objects that killed publications left in final/": len(tally.left_in_final),
        **{name: len(found) for name, found in tally.violations.items()},
    }
    return markdown(rows, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--disturbances", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="nothing more happens after this time; the run at work is published",
    )
    parser.add_argument("--large", action="store_true", help="checkpoints with parts above a GiB")
    arguments = parser.parse_args()
    scale = LARGE if arguments.large else SMALL
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the table of what there is
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        LocalS3(Path(folder, "s3"), scale.memory) as server,
    ):
        server.is_all_there_is()
        with Network(server.endpoint, arguments.seed, scale.spoilt) as network:
            soak = Soak(
                Path(folder),
                server,
                network,
                arguments.seed,
                arguments.disturbances,
                arguments.minutes,
                scale,
            )
            try:
                soak.go()
            except KeyboardInterrupt:
                print("ended early; the run at work is not in the table", file=sys.stderr)
            finally:
                for launch in soak.launches:
                    launch.send(signal.SIGKILL, [*launch.processes()])
    tally = soak.tally
    print(table(tally, network, time.monotonic() - began))
    found = tell(tally.violations)
    print(f"\n{len(found)} violations.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
