"""Workers that come and go: each post once, no part written twice, the summary last."""

from __future__ import annotations

import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emotion_train.errors import AlreadyExists, Damaged, StorageError, WrongRequest
from emotion_train.evaluation.decision import Decision
from emotion_train.labelling.job import SUCCESS, Reading
from emotion_train.labelling.leases import Board, Leases
from emotion_train.labelling.worker import Stopped
from emotion_train.preparation.steps import prepare
from emotion_train.storage import patience
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import ObjectInfo, Store
from tests.helpers.labelling_jobs import (
    LABELS,
    HashScorer,
    labelled,
    make_job,
    make_worker,
    probabilities,
    write_lines,
)
from tests.helpers.tiny_runs import write_posts


def test_a_worker_labels_every_post_once_in_a_folder_and_in_a_bucket(store: Store, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "posts.jsonl", 100)
    with source.open("a") as file:
        file.write('\nno object\n{"text": " "}\n')
    job, found = make_job(store, str(source), 30, Reading(columns=("n",)), probabilities=True)
    success = make_worker(store, job, found).run()
    rows = sorted(labelled(store), key=lambda row: row["row"])
    assert [row["row"] for row in rows] == [*range(1, 101), 102, 103]
    assert [row["n"] for row in rows] == [*map(str, range(100)), None, None]
    assert [row["error"] for row in rows[100:]] == ["not a JSON object", "no text"]
    expected_NC = probabilities([f"post {number}" for number in range(100)])
    for row, prob_C in zip(rows, expected_NC, strict=False):
        assert row["label"] == LABELS[prob_C.argmax()]
        assert row["probability"] == pytest.approx(prob_C.max())
        assert row["probabilities"] == pytest.approx(prob_C.tolist())
    assert (success.rows, success.blank, sum(success.labels.values())) == (102, 1, 100)
    assert success.errors == {"no text": 1, "not a JSON object": 1}
    assert [part.key for part in success.parts] == [info.key for info in store.list("part-")]
    assert success.usd is not None
    assert not [info for info in store.list() if "released" in info.key]


def test_a_worker_waits_for_its_own_last_part_alone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    job, found = make_job(store, str(write_lines(tmp_path / "posts.jsonl", 60)), 20)
    worker = make_worker(store, job, found, look_every_s=3600)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert worker.pace.units == 3
    assert worker.pace.ended is not None


def test_several_workers_share_a_job(bucket_url: str, tmp_path: Path) -> None:
    store = open_store(bucket_url)
    job, found = make_job(store, str(write_lines(tmp_path / "posts.jsonl", 600)), 20)
    workers = [make_worker(store, job, found, f"worker {number}", scorer=Slow()) for number in range(4)]
    done: list[Any] = []
    threads = [threading.Thread(target=lambda one=one: done.append(one.run())) for one in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4
    assert len({success.to_bytes() for success in done}) == 1
    assert sorted(row["row"] for row in labelled(store)) == list(range(1, 601))
    assert sum(one.pace.units for one in workers) == len(job.units) == 30
    assert sum(one.pace.units > 0 for one in workers) > 1
    assert [one.pace.others for one in workers] == [0] * 4  # leases kept them apart


class Slow(HashScorer):
    def start(self, packs: Any, count: int) -> Any:
        time.sleep(0.02)
        return super().start(packs, count)


def test_a_worker_that_is_told_to_leave_frees_its_units_at_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "out")
    job, found = make_job(store, str(write_lines(tmp_path / "posts.jsonl", 5000)), 2500)
    seen: list[int] = []

    class Noticed(HashScorer):
        def start(self, packs: Any, count: int) -> Any:
            seen.append(count)
            return super().start(packs, count)

    leaving = make_worker(store, job, found, "first", scorer=Noticed(), stopping=lambda: len(seen) > 1)
    with pytest.raises(Stopped):
        leaving.run()
    assert leaving.left >= 1
    board = Board.look(store, job)
    assert board.left == [0, 1]
    assert not any(board.is_leased(unit) for unit in board.left)
    assert make_worker(store, job, found, "second").run().rows == 5000
    assert sorted(row["row"] for row in labelled(store)) == list(range(1, 5001))


def test_leases_expire_by_the_clock_of_the_store(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "out")
    job, _ = make_job(clock, str(write_lines(tmp_path / "posts.jsonl", 10)), 10, lease_seconds=60)
    dead = Leases(clock, job, "dead", {})
    assert dead.take(Board.look(clock, job)) is not None
    clock.ahead_s = 58
    other = Leases(clock, job, "other", {})
    assert other.take(Board.look(clock, job)) is None
    clock.ahead_s = 63
    board = Board.look(clock, job)
    taken = other.take(board)
    assert taken is not None
    assert (taken.unit, taken.attempt) == (0, 1)
    assert Leases(clock, job, "late", {}).take(board) is None  # of two that saw it expired one has it


class Clock(FolderStore):
    """A folder whose clock is ahead of that which dated its objects."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


def test_a_lease_is_renewed_in_time_and_not_once_another_has_it(tmp_path: Path) -> None:
    clock, own_s = Clock(tmp_path / "out"), [0.0]
    job, _ = make_job(clock, str(write_lines(tmp_path / "posts.jsonl", 10)), 10, lease_seconds=60)
    holder = Leases(clock, job, "holder", {}, clock=lambda: own_s[0])
    held = holder.take(Board.look(clock, job))
    assert held is not None
    holder.renew_due()
    assert held.attempt == 0
    own_s[0] = 31
    holder.renew_due()
    assert held.attempt == 1
    clock.ahead_s = 100
    assert Leases(clock, job, "other", {}).take(Board.look(clock, job)) is not None
    own_s[0] = 63
    holder.renew_due()
    assert (held.attempt, held.lost) == (1, True)
    assert holder.release_all() == 1
    clock.ahead_s = 0
    assert Board.look(clock, job).is_leased(0)  # by the other, which nobody released


def test_the_first_part_stays_whoever_comes_later(tmp_path: Path) -> None:
    store = Quicker(tmp_path / "out")
    job, found = make_job(store, str(write_lines(tmp_path / "posts.jsonl", 10)), 10)
    twin = make_worker(FolderStore(tmp_path / "twin"), job, found)
    twin._store.create("job.json", job.to_bytes())
    twin.run()
    store.first = twin._store.read("part-00000000.parquet")
    late = make_worker(store, job, found, "late")
    late.run()
    assert (late.pace.units, late.pace.others) == (0, 1)
    assert store.read("part-00000000.parquet") == store.first


class Quicker(FolderStore):
    """A folder where another worker creates the part a moment before."""

    first = b""

    def create(self, key: str, data: bytes | Path) -> ObjectInfo:
        if key.startswith("part-"):
            super().create(key, self.first)
        return super().create(key, data)


def test_a_store_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    store = Away(tmp_path / "out")
    job, found = make_job(store, str(write_lines(tmp_path / "posts.jsonl", 40)), 10)
    told: list[str] = []
    store.failures = 6
    assert make_worker(store, job, found, tell=told.append, patience_s=60).run().rows == 40
    assert store.failures == 0
    assert "WAITING" in told[0]
    store.delete(SUCCESS)
    store.failures = 10**6
    with pytest.raises(StorageError) as caught:
        make_worker(store, job, found, patience_s=0).run()
    assert caught.value.exit_code == 1


class Away(FolderStore):
    failures = 0

    def list(self, prefix: str = "") -> Any:
        if self.failures:
            self.failures -= 1
            raise StorageError("The store is away.", transient=True)
        return super().list(prefix)


def test_there_is_no_summary_before_every_part_is_whole(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "out")
    job, found = make_job(store, str(write_lines(tmp_path / "posts.jsonl", 20)), 10)
    other, elsewhere = make_job(
        FolderStore(tmp_path / "other"), str(write_lines(tmp_path / "posts.jsonl", 20)), 10, id="other"
    )
    make_worker(FolderStore(tmp_path / "other"), other, elsewhere).run()
    store.create("part-00000001.parquet", (tmp_path / "other" / "part-00000001.parquet").read_bytes())
    with pytest.raises(Damaged, match="part-00000001"):
        make_worker(store, job, found).run()
    assert store.find(SUCCESS) is None
    store.delete("part-00000001.parquet")
    assert make_worker(store, job, found, "again").run().rows == 20


def test_a_source_that_changes_while_it_is_labelled_is_refused(tmp_path: Path) -> None:
    store, source = FolderStore(tmp_path / "out"), write_lines(tmp_path / "posts.jsonl", 20)
    job, found = make_job(store, str(source), 10)
    source.write_text(source.read_text().replace("post 13", "past 13"))  # as many bytes
    with pytest.raises(WrongRequest, match="changed since the job was planned"):
        make_worker(store, job, found).run()
    assert store.find(SUCCESS) is None


@pytest.mark.parametrize("ending", ["parquet", "jsonl.gz", "arrow"])
def test_a_source_of_a_folder_that_changes_within_its_size_is_refused(tmp_path: Path, ending: str) -> None:
    path, store = tmp_path / f"posts.{ending}", FolderStore(tmp_path / "out")

    def write(letter: str) -> int:
        texts = [f"{letter}{number}" for number in range(6)]
        if ending == "parquet":
            pq.write_table(pa.table({"text": texts}), path, row_group_size=2)
        elif ending == "arrow":
            with pa.ipc.new_file(path, pa.schema([("text", pa.string())])) as file:
                file.write_table(pa.table({"text": texts}))
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            path.write_bytes(gzip.compress(lines.encode(), mtime=0))
        return path.stat().st_size

    size = write("a")
    job, source = make_job(store, str(path), 2)
    assert make_worker(store, job, source).run().rows == 6
    assert write("b") == size
    for info in list(store.list()):
        if info.key != "job.json":
            store.delete(info.key)
    with pytest.raises(WrongRequest, match="changed since the job was planned"):
        make_worker(store, job, source).run()
    assert not list(store.list("part-"))


def test_a_bad_row_stops_the_strict(tmp_path: Path) -> None:
    store, source = FolderStore(tmp_path / "out"), write_lines(tmp_path / "posts.jsonl", 5)
    with source.open("a") as file:
        file.write("{}\n")
    job, found = make_job(store, str(source), 10)
    with pytest.raises(WrongRequest, match=r"Row 6 of posts\.jsonl cannot be labelled: no text"):
        make_worker(store, job, found, on_bad_stop=True).run()
    assert not Board.look(store, job).is_leased(0)


def test_a_data_set_is_labelled_by_row_group_with_its_ids(tmp_path: Path) -> None:
    prepare(str(write_posts(tmp_path / "source")), str(tmp_path / "data"))
    store = FolderStore(tmp_path / "out")
    job, found = make_job(store, str(tmp_path / "data"), 50, Reading(split="train"))
    success = make_worker(store, job, found).run()
    rows = labelled(store)
    assert success.rows == len(rows) == 108
    assert len({row["id"] for row in rows}) == 108
    assert all(row["label"] in LABELS for row in rows)


def test_several_labels_come_as_lists_and_answers_to_accept_are_marked(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "out")
    decision = Decision(targets="several", labels=LABELS, thresholds=(0.4, 0.3, 0.5))
    source = str(write_lines(tmp_path / "posts.jsonl", 200))
    job, found = make_job(store, source, 100, targets="several")
    success = make_worker(store, job, found, decision=decision).run()
    rows = sorted(labelled(store), key=lambda row: row["row"])
    prob_NC = probabilities([f"post {number}" for number in range(200)])
    for row, prob_C in zip(rows, prob_NC, strict=True):
        given = {label for label, p, least in zip(LABELS, prob_C, (0.4, 0.3, 0.5), strict=True) if p >= least}
        assert set(row["labels"]) == given
        assert row["probability"] == sorted(row["probability"], reverse=True)
    assert success.unanswered == sum(not row["labels"] for row in rows) > 0
    assert success.labels["joy"] == sum("joy" in row["labels"] for row in rows)


def test_a_lease_is_taken_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "out")
    job, _ = make_job(store, str(write_lines(tmp_path / "posts.jsonl", 10)), 10)
    board = Board.look(store, job)
    taken = [Leases(store, job, f"worker {number}", {}).take(board) for number in range(5)]
    assert sum(one is not None for one in taken) == 1
    with pytest.raises(AlreadyExists):
        store.create("leases/00000000.0000.json", b"another")
