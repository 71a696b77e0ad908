"""Is a data set whole whatever happens to the prepares that make it? Real `emotion-train prepare`
processes, two at a time, killed at random moments, in a folder and on a real S3 server.

    # ends with 1 when a data set was left broken, changed or unfinished
    python benchmarks/prepare_soak.py --places 40 --seed 1
    # the control, rivals that nobody kills, whose objects have names without a hash: ends with 1
    # when nothing was broken
    python benchmarks/prepare_soak.py --places 8 --seed 1 --overwriting

There are two sources, of which most objects are the same. At each place some scenes are drawn from
the seed (their timing is the machine's own):

    kill     one prepare, SIGKILL at any moment, most often while it writes
    twins    two prepares of one source at once, each perhaps killed
    rivals   one prepare of each source at once, each perhaps killed
    loss     an object of a finished data set is deleted

Then nobody is killed any more: both sources are prepared once more, one after the other, which must
end with 0 for the one whose data set it is and with 2 for the other. All along: when one has ended
with 0, its data set is whole from then on, but for what the soak itself deletes; who ended with 2
has met the index of the other source; and at the end every object holds the bytes that an
undisturbed prepare writes.
"""

from __future__ import annotations

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from soak_page import markdown, tell

from emotion_train.data.index import INDEX_KEY, Index, read_index
from emotion_train.data.objects import look_at_objects
from emotion_train.errors import ObjectNotFound, StorageError, WrongRequest
from emotion_train.preparation.steps import prepare
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

POSTS = 240
CHANGED = 30  # posts that are others in the second source
SIZES = {"rows_per_group": 16, "rows_per_object": 16}
SCENES = {"kill": 0.4, "twins": 0.25, "rivals": 0.25, "loss": 0.1}
MOST_SCENES = 4  # at one place
PATIENCE_S = 120.0
KILLED = -9
# The control: an object's name has no hash, and what is there is replaced.
OVERWRITING = """
import re, sys
from emotion_train.preparation import shards
def publish(writer, path, described):
    key = re.sub("-[0-9a-f]{16}(?=[.]parquet)", "", described.key)
    etag = None if writer._store is None else writer._store.write(key, path).etag
    return described.model_copy(update={"key": key, "etag": etag})
shards.SplitWriter._publish = publish
from emotion_train.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Tally:
    prepares: int = 0
    kills: int = 0
    places: int = 0
    losses: int = 0
    scenes: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    wrong_endings: list[str] = field(default_factory=list)

    @property
    def violations(self) -> dict[str, list[str]]:
        return {
            "looks at data sets that were not whole": self.broken,
            "endings that are not in the contract": self.wrong_endings,
        }


class Prepare:
    """One process at work on a place."""

    def __init__(self, source: Path, url: str, log: Path, overwriting: bool) -> None:
        program = ["-c", OVERWRITING] if overwriting else ["-m", "emotion_train.cli"]
        sizes = [word for name, size in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(size))]
        self.source = source
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *program, "prepare", str(source), url, *sizes],
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def end(self, after_s: float | None = None) -> int:
        """The exit code, `KILLED` when it was still at work after that time."""
        try:
            return self.process.wait(PATIENCE_S if after_s is None else after_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    @property
    def last_words(self) -> str:
        return " | ".join(self._log.read_text(errors="replace").splitlines()[-2:])[-400:]


class Place:
    """One DATA_URL and what happens there."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak = soak
        self.draw = random.Random(f"{soak.seed}/{number}")  # the timing of a place changes no other
        self.scenes = self.draw.choices([*SCENES], [*SCENES.values()], k=self.draw.randint(1, MOST_SCENES))
        self.store = open_store(
            f"s3://soak/{number:04}" if number % 2 else str(soak.folder / f"place-{number:04}")
        )
        self.owner: Path | None = None  # source of the data set that somebody was told is there
        self.lost = False  # the soak has deleted something that no prepare has mended yet

    def go(self) -> None:
        for scene in ["rivals"] if self.soak.overwriting else self.scenes:
            self.soak.tally.scenes[scene] += 1
            getattr(self, scene)()
        self.finish()

    def kill(self) -> None:
        self.run([self.a_source()], always=True)

    def twins(self) -> None:
        self.run([self.a_source()] * 2)

    def rivals(self) -> None:
        self.run(list(self.soak.sources))

    def loss(self) -> None:
        """Delete one object of the data set; where there is none yet, make one before."""
        if self.index() is None:
            self.run([self.a_source()], never=True)
        index = self.index()
        if index is not None and not self.lost:
            described = self.draw.choice([one for split in index.splits.values() for one in split.objects])
            self.store.delete(described.key)
            self.lost, self.soak.tally.losses = True, self.soak.tally.losses + 1

    def finish(self) -> None:
        """Nobody is killed any more; each source once, and the audit."""
        codes = {}
        for source in self.draw.sample(self.soak.sources, 2):
            codes[source] = self.run([source], never=True)[0]
        winners = [source for source, code in codes.items() if code == 0]
        if sorted(codes.values()) != [0, 2]:
            self.soak.tally.wrong_endings.append(f"{self.store.url}: at the end {sorted(codes.values())}")
        for source in winners:
            self.audit(source)

    def run(self, sources: Sequence[Path], always: bool = False, never: bool = False) -> list[int]:
        """Prepares of these sources at once; kills some of them. Returns their exit codes."""
        soak, mine = self.soak, []
        for number, source in enumerate(sources):
            kills = not (never or soak.overwriting) and (always or self.draw.random() < 0.5)
            mine.append((soak.start(source, self.store.url, number), self.moment() if kills else None))
        began = time.monotonic()
        codes = []
        for one, moment in sorted(mine, key=lambda item: item[1] or PATIENCE_S):
            left_s = None if moment is None else max(0.0, began + moment - time.monotonic())
            codes.append(one.end(left_s))
            soak.tally.kills += codes[-1] == KILLED
            soak.tally.endings["killed" if codes[-1] == KILLED else str(codes[-1])] += 1
        for (one, _), code in zip(sorted(mine, key=lambda item: item[1] or PATIENCE_S), codes, strict=True):
            self.judge(one, code)
        if self.owner is not None and not self.lost:
            self.must_be_whole()
        return codes

    def a_source(self) -> Path:
        return self.draw.choice(self.soak.sources)

    def moment(self) -> float:
        """Seconds after which a prepare is killed."""
        least = 0.0 if self.draw.random() < 0.15 else 0.9 * self.soak.writing_s
        return self.draw.uniform(least, 1.1 * self.soak.whole_s)

    def judge(self, one: Prepare, code: int) -> None:
        index = self.index()
        there = None if index is None else Path(str(index.source["name"])).name
        if code == 0 and there == one.source.name and self.owner in (None, one.source):
            self.owner, self.lost = one.source, False
        elif code != KILLED and not (code == 2 and there not in (None, one.source.name)):
            self.soak.tally.wrong_endings.append(
                f"{self.store.url}: prepare of {one.source.name} ended with {code} where the index is of"
                f" {there}; {one.last_words}"
            )

    def must_be_whole(self) -> None:
        index = self.index()
        if index is None:
            self.soak.tally.broken.append(f"{self.store.url}: the index has gone")
            return
        found = look_at_objects(self.store, index)
        if words := [*(f"{key} is missing" for key in found.missing), *found.damaged.values()]:
            self.soak.tally.broken.append(f"{self.store.url}: {', '.join(words)}")

    def audit(self, source: Path) -> None:
        """Compare every object with that of an undisturbed prepare, byte by byte."""
        self.must_be_whole()
        index, meant = self.index(), self.soak.undisturbed[source]
        if index is None:
            return
        for name, split in read_index(meant).splits.items():
            for ours, theirs in zip(index.splits[name].objects, split.objects, strict=True):
                try:
                    same = self.store.read(ours.key) == meant.read(theirs.key)
                except ObjectNotFound:
                    same = False
                if not same:
                    self.soak.tally.broken.append(f"{self.store.url}: {ours.key} has other bytes")
                    return

    def index(self) -> Index | None:
        try:
            self.store.stat(INDEX_KEY)
        except ObjectNotFound:
            return None
        try:
            return read_index(self.store)
        except (WrongRequest, StorageError) as error:
            self.soak.tally.broken.append(f"{self.store.url}: {error}")
            return None


class Soak:
    """Places one after the other, in a folder and in a bucket by turns."""

    def __init__(self, folder: Path, seed: int, overwriting: bool) -> None:
        self.folder = folder
        self.seed = seed
        self.overwriting = overwriting
        self.tally = Tally()
        self.sources = [write_posts(folder / "one.csv", 0), write_posts(folder / "other.csv", CHANGED)]
        self.undisturbed: dict[Path, Store] = {}
        for source in self.sources:
            url = str(folder / f"undisturbed-{source.stem}")
            prepare(source, url, **SIZES)
            self.undisturbed[source] = open_store(url)
        self.whole_s, self.writing_s = self.time_one()

    def time_one(self) -> tuple[float, float]:
        """Seconds of a prepare, and of them those until its first object is there."""
        store = open_store(str(self.folder / "timed"))
        one, began, writing_s = self.start(self.sources[0], store.url, 0), time.monotonic(), 0.0
        while one.process.poll() is None:
            if not writing_s and list(store.list()):
                writing_s = time.monotonic() - began
            time.sleep(0.005)
        return time.monotonic() - began, writing_s

    def go(self, places: int) -> Tally:
        for number in range(places):
            Place(self, number).go()
            self.tally.places += 1
            print(f"{number + 1} of {places} places, {self.tally.kills} kills", file=sys.stderr, flush=True)
        return self.tally

    def start(self, source: Path, url: str, number: int) -> Prepare:
        self.tally.prepares += 1
        return Prepare(source, url, self.folder / f"prepare-{number}.log", self.overwriting)


def write_posts(path: Path, changed: int) -> Path:
    rows = [
        (f"post {number}{' changed' * (number < changed)}", ("anger", "joy", "fear")[number % 3])
        for number in range(POSTS)
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "text", "label"), *((i, *row) for i, row in enumerate(rows))])
    return path


def table(tally: Tally, seconds: float) -> str:
    rows = {
        "prepares started": tally.prepares,
        "of these killed (SIGKILL)": tally.kills,
        "places (folders and prefixes of a bucket by turns)": tally.places,
        "scenes": ", ".join(f"{tally.scenes[name]} {name}" for name in SCENES),
        "objects deleted by the soak": tally.losses,
        "prepares that ended by themselves": ", ".join(
            f"{count} with {code}" for code, count in sorted(tally.endings.items()) if code != "killed"
        ),
        **{name: len(found) for name, found in tally.violations.items()},
    }
    return markdown(rows, seconds)


def verdict(tally: Tally, overwriting: bool) -> int:
    """Prints what is wrong, and returns the exit code."""
    found = tell(tally.violations)
    if overwriting:
        outcome = "as there must be" if tally.broken else "and there must be broken data sets"
        print(f"\nObjects were overwritten: {len(found)} violations, {outcome}.")
        return 0 if tally.broken else 1
    print(f"\n{len(found)} violations.")
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--overwriting",
        action="store_true",
        help="the control: rivals, names without a hash, and objects are replaced; must do harm",
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prepare-soak-") as folder, LocalS3(Path(folder, "s3")) as server:
        server.is_all_there_is()
        server.create_bucket("soak")
        tally = Soak(Path(folder), arguments.seed, arguments.overwriting).go(arguments.places)
    print(table(tally, time.monotonic() - began))
    return verdict(tally, arguments.overwriting)


if __name__ == "__main__":
    sys.exit(main())
