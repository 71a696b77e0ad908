"""Is each post labelled exactly once, whatever happens to the workers? `emotion-train label`,
started by its command line, eight at a time on a real S3 server, killed, stopped and cut off, until
the job is done; then an audit of all parts.

    # ends with 1 when a post is missing or there twice, a part was written again, the summary came
    # early, or a worker ended otherwise than it should
    python benchmarks/label_soak.py --kills 300 --seed 1
    # the control: create-only writes have no condition, and the audit has to find violations
    python benchmarks/label_soak.py --kills 30 --seed 1 --unconditional

What happens, drawn from the seed (the timing is the machine's own):

    kill      SIGKILL to a worker, also while it starts
    term      SIGTERM: its units are free at once and it ends with 33
    freeze    SIGSTOP for longer than a lease, then SIGCONT: others have its units meanwhile
    server    SIGKILL to the S3 server, and a new start of it soon after

One job after the other is labelled until so many kills have come. While it goes on every part that
is seen is noted with its ETag and date; at the end each must be the one that was seen first, the
ids in all parts those of the source, each once, and _SUCCESS.json no older than the newest part.

Workers answer by a hash of the text (`--scorer hash`), so that a start costs no torch; everything
else is the program's own. `--scorer model` loads an adapter of two layers, at some ten seconds of a
core a start.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from soak_page import markdown, tell

from emotion_train.errors import EmotionTrainError, Preempted
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.storage.store import ObjectInfo, Store

ROOT = Path(__file__).parents[1]
BUCKET = "labels"
LEASE_S = 4.0
FROZEN_S = (LEASE_S, 3 * LEASE_S)
STARTING = 0.1  # of what happens may meet a worker that starts
LATEST_S = 900.0  # for a job: a busy machine is no defect
HAPPENINGS = {"kill": 0.78, "term": 0.08, "freeze": 0.1, "server": 0.04}


# --- what each worker runs ---


def worker(arguments: argparse.Namespace) -> int:
    """`emotion-train label` with the scorer and the store of this soak."""
    from emotion_train import cli
    from emotion_train.labelling import request
    from tests.helpers.labelling_jobs import HashScorer

    class Paced(HashScorer):
        def start(self, packs, count):  # type: ignore[no-untyped-def]
            time.sleep(arguments.pace_s)
            return super().start(packs, count)

    if arguments.scorer == "hash":
        vars(request)["load_scorer"] = lambda asked, folders: Paced()
    if arguments.unconditional:
        leave_out_the_condition()
    return cli.main(arguments.words)


def leave_out_the_condition() -> None:
    """Make `create` of every bucket an ordinary write of parts."""
    from emotion_train.storage.s3 import S3Store

    conditional = S3Store.create

    def create(self: S3Store, key: str, data: bytes | Path) -> ObjectInfo:
        return self.write(key, data) if key.startswith("part-") else conditional(self, key, data)

    S3Store.create = create  # type: ignore[method-assign]


# --- the soak ---


@dataclass
class Tally:
    happened: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    posts: int = 0
    parts: int = 0
    attempts: int = 0
    missing: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    early: list[str] = field(default_factory=list)
    wrong_endings: list[str] = field(default_factory=list)

    @property
    def violations(self) -> dict[str, list[str]]:
        return {
            "posts without a label": self.missing,
            "posts twice": self.doubled,
            "parts written again": self.rewritten,
            "summaries before the last part": self.early,
            "endings that are not in the contract": self.wrong_endings,
        }


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    log: Path
    harmed: set[str] = field(default_factory=set)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def at_work(self) -> bool:
        """Whether it has said something, which it does once it knows the job."""
        return self.log.stat().st_size > 0


class Soak:
    def __init__(self, folder: Path, server: LocalS3, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.server = server
        self.arguments = arguments
        self.draw = random.Random(arguments.seed)
        self.tally = Tally()
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.started = 0
        self.source = self.write_posts()
        self.adapter = self.write_adapter()
        self.store: Store = open_store(f"s3://{BUCKET}")
        self.seen: dict[str, ObjectInfo] = {}
        self.workers: list[Running] = []

    # what there is to label

    def write_posts(self) -> str:
        path = self.folder / "posts.jsonl"
        lines = (json.dumps({"text": f"post {n}", "n": n}) + "\n" for n in range(self.arguments.posts))
        path.write_text("".join(lines))
        return str(path)

    def write_adapter(self) -> str:
        """An adapter folder. Only the model's scorer loads it; the other compares its identity."""
        from tests.helpers.tiny_adapter import write_adapter

        return str(write_adapter(self.folder / "adapter", self.arguments.scorer == "model"))

    # workers

    def start(self) -> Running:
        self.started += 1
        log = self.folder / f"worker-{self.started:04d}.log"
        words = ["label", self.source, f"s3://{BUCKET}/job-{self.tally.jobs:03d}", "--adapter", self.adapter]
        words += ["--columns", "n", "--unit-posts", str(self.arguments.unit), "--notices", "none"]
        words += ["--lease-minutes", str(LEASE_S / 60), "--hold-s", "0", "--device", "cpu"]
        line = [sys.executable, __file__, "--worker", "--scorer", self.arguments.scorer]
        line += ["--pace-s", str(self.arguments.pace_s)]
        line += ["--unconditional"] if self.arguments.unconditional else []
        environment = {**self.server.environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            process = subprocess.Popen([*line, "--", *words], env=environment, stdout=file, stderr=file)
        return Running(process, log)

    def end(self, one: Running) -> None:
        code = one.process.wait()
        self.workers.remove(one)
        self.tally.endings["killed" if code == -signal.SIGKILL else str(code)] += 1
        allowed = {0} | ({-signal.SIGKILL} if "kill" in one.harmed else set())
        if "term" in one.harmed:  # before the program listens the signal itself ends it
            allowed |= {Preempted.exit_code, -signal.SIGTERM}
        if code not in allowed:
            last = one.log.read_text(errors="replace").strip().splitlines()[-1:]
            self.tally.wrong_endings.append(f"{one.log.name} ({', '.join(one.harmed)}): {code} {last}")

    # what happens

    def happen(self) -> None:
        name = self.draw.choices(list(HAPPENINGS), list(HAPPENINGS.values()))[0]
        alive = [one for one in self.workers if not one.ended]
        if self.draw.random() > STARTING:  # else nobody would ever come to work
            alive = [one for one in alive if one.at_work]
        if name == "server":
            self.server.kill()
            time.sleep(self.draw.uniform(0, 2))
            self.server.start()
        elif not alive:
            return
        else:
            one = self.draw.choice(alive)
            one.harmed.add(name)
            if name == "freeze":
                one.process.send_signal(signal.SIGSTOP)
                time.sleep(self.draw.uniform(*FROZEN_S))
                one.process.send_signal(signal.SIGCONT)
            else:
                one.process.send_signal(signal.SIGKILL if name == "kill" else signal.SIGTERM)
        self.tally.happened[name] += 1

    @property
    def over(self) -> bool:
        return bool(self.tally.happened["kill"] >= self.arguments.kills) or time.monotonic() > self.deadline

    def go(self) -> None:
        while not self.over:
            self.label_once()
            self.tally.jobs += 1

    def label_once(self) -> None:
        """One job, with as much happening as it takes to keep it from ending early."""
        self.store, self.seen = open_store(f"s3://{BUCKET}/job-{self.tally.jobs:03d}"), {}
        began = time.monotonic()
        while not self.is_done():
            for one in [one for one in self.workers if one.ended]:
                self.end(one)
            while len(self.workers) < self.arguments.workers and not self.is_done():
                self.workers.append(self.start())
            time.sleep(self.draw.uniform(0, self.arguments.every_s))
            if not self.over:
                self.happen()
            self.note()
            if time.monotonic() - began > LATEST_S:
                self.tally.missing.append(f"job {self.tally.jobs} was not done after {LATEST_S:.0f} s")
                break
        self.await_all()
        self.note()
        self.audit()

    def await_all(self) -> None:
        """The others see that the job is done, and end."""
        deadline = time.monotonic() + 120
        for one in list(self.workers):
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.1, deadline - time.monotonic()))
            if not one.ended:
                one.harmed.add("kill")
                one.process.kill()
            self.end(one)

    # what is there

    def is_done(self) -> bool:
        with suppress(EmotionTrainError):
            return self.store.find("_SUCCESS.json") is not None
        return False

    def note(self) -> None:
        """Every part that is there, and whether it is the one that was there before."""
        with suppress(EmotionTrainError):
            for info in self.store.list("part-"):
                first = self.seen.setdefault(info.key, info)
                if (first.etag, first.modified) != (info.etag, info.modified):
                    self.tally.rewritten.append(f"{self.store.url}/{info.key}")
                    self.seen[info.key] = info

    def audit(self, whole: bool = True) -> None:
        """Read all parts; `whole` where every post has to be in them."""
        import pyarrow.parquet as pq

        counts: Counter[str] = Counter()
        newest = 0.0
        for info in self.store.list("part-"):
            table = pq.read_table(io.BytesIO(self.store.read(info.key)))
            counts.update(table.column("n").to_pylist())
            newest = max(newest, info.modified or 0.0)
            self.tally.parts += 1
        wanted = {str(number) for number in range(self.arguments.posts)}
        self.tally.posts += len(counts)
        self.tally.attempts += sum(1 for _ in self.store.list("leases/"))
        if whole:
            self.tally.missing += [f"{self.store.url}: {one}" for one in sorted(wanted - counts.keys())[:5]]
        self.tally.doubled += [f"{self.store.url}: {one}" for one, many in counts.items() if many > 1][:5]
        success = self.store.find("_SUCCESS.json")
        if success is not None and (success.modified or math.inf) < newest:
            self.tally.early.append(self.store.url)


def table(tally: Tally, arguments: argparse.Namespace, seconds: float) -> str:
    rows: dict[str, object] = {
        "workers at a time, scorer": f"{arguments.workers}, {arguments.scorer}",
        "SIGKILL": tally.happened["kill"],
        "SIGTERM": tally.happened["term"],
        "SIGSTOP for longer than a lease": tally.happened["freeze"],
        "server killed": tally.happened["server"],
        "endings": ", ".join(f"{count} with {code}" for code, count in sorted(tally.endings.items())),
        "jobs / parts / posts read": f"{tally.jobs} / {tally.parts:,} / {tally.posts:,}",
        "leases and releases": f"{tally.attempts:,}",
        **{name: len(found) for name, found in tally.violations.items()},
    }
    return markdown(rows, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8, help="at a time (default: 8)")
    parser.add_argument("--posts", type=int, default=4000, help="of a job (default: 4000)")
    parser.add_argument("--unit", type=int, default=50, help="posts of a unit (default: 50)")
    parser.add_argument("--pace-s", type=float, default=0.3, help="of a unit, at least (default: 0.3)")
    parser.add_argument("--every-s", type=float, default=2.0, help="between two happenings, at most")
    parser.add_argument("--minutes", type=float, default=math.inf, help="nothing more happens after this")
    parser.add_argument("--scorer", choices=("hash", "model"), default="hash")
    parser.add_argument("--unconditional", action="store_true", help="the control")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="label-soak-") as folder, LocalS3(Path(folder, "s3")) as server:
        server.is_all_there_is()
        server.create_bucket(BUCKET)
        soak = Soak(Path(folder), server, arguments)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the table of what there is
        try:
            soak.go()
        except KeyboardInterrupt:
            print("ended early; of the job at work the parts that there are were audited", file=sys.stderr)
            soak.note()
            soak.audit(whole=False)
        finally:
            for one in soak.workers:
                with suppress(ProcessLookupError):
                    os.kill(one.process.pid, signal.SIGKILL)
    print(table(soak.tally, arguments, time.monotonic() - began))
    found = tell(soak.tally.violations)
    print(f"\n{len(found)} violations.")
    return int(bool(found) != arguments.unconditional)


if __name__ == "__main__":
    sys.exit(main())
