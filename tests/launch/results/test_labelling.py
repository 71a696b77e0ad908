"""How far a labelling job is, by listings alone."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from emotion_train.errors import StorageError, WrongRequest
from emotion_train.labelling.leases import Board, Leases, Standing
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.store import ObjectInfo
from launch.results.labelling import read_status, show, status_of, watch
from tests.helpers.labelling_jobs import make_job, make_worker, write_lines


def test_pace_finish_and_dollars_are_those_of_the_parts(tmp_path: Path) -> None:
    job, _ = make_job(FolderStore(tmp_path / "out"), str(write_lines(tmp_path / "posts.jsonl", 1000)), 100)
    # two workers, 50 s a unit; four are done, two at work, one was left by a worker that died
    parts = {
        unit: ObjectInfo(f"part-{unit:08d}.parquet", 9, None, 1050.0 + 50 * (unit // 2)) for unit in range(4)
    }
    leases = {
        unit: Standing(0, 1000.0 + 50 * (unit // 2), 1000.0 + 50 * (unit // 2), False) for unit in range(6)
    }
    leases[9] = Standing(5, 100.0, 50.0, False)
    board = Board(10, 60.0, 1110.0, parts, leases, False)
    said = [{"worker": "a", "usd_per_hour": 3.6}, {"worker": "b", "usd_per_hour": 3.6}]
    status = status_of(job, board, said)
    assert (status.done, status.leased, status.left) == (4, 2, 4)
    assert (status.posts, status.posts_done) == (1000, 400)
    assert status.posts_per_second == pytest.approx(400 / 110)
    assert status.seconds_left == pytest.approx(600 / (400 / 110))
    assert status.usd == pytest.approx(4 * 50 * 3.6 / 3600)
    assert status.usd_left == pytest.approx(2 * 165 * 3.6 / 3600)
    assert status.often_taken == (9,)
    assert "4 of 10 done, 2 leased, 4 left" in status.lines()[0]


def test_a_unit_without_posts_counts_none(tmp_path: Path) -> None:
    job, _ = make_job(FolderStore(tmp_path / "out"), str(write_lines(tmp_path / "posts.jsonl", 300)), 100)
    job = job.model_copy(update={"units": (*job.units[:2], job.units[2].model_copy(update={"rows": 0}))})
    parts = {unit: ObjectInfo(f"part-{unit:08d}.parquet", 9, None, 1050.0) for unit in (0, 2)}
    leases = {unit: Standing(0, 1000.0, 1000.0, False) for unit in (0, 2)}
    status = status_of(job, Board(3, 60.0, 1100.0, parts, leases, False), [])
    assert status.posts_done == 100
    assert status.posts_per_second == pytest.approx(1.0)
    assert status.seconds_left == pytest.approx(100.0)


def test_a_job_is_watched_until_it_is_done(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "out")
    job, found = make_job(store, str(write_lines(tmp_path / "posts.jsonl", 100)), 50)
    assert Leases(store, job, "first", {"usd_per_hour": 2.0}).take(Board.look(store, job)) is not None
    status = read_status(store, job)
    assert (status.leased, status.left, status.workers) == (1, 1, ("first",))
    assert status.posts_per_second is None
    written = io.StringIO()
    console = Console(file=written, width=160)

    def label(seconds: float) -> None:
        other = FolderStore(tmp_path / "other")
        other.create("job.json", store.read("job.json"))
        make_worker(other, job, found).run()
        for info in other.list():
            if not info.key.startswith(("leases/", "job")):
                store.create(info.key, other.read(info.key))

    watch(store, 5, console, label)
    assert "0 of 2 done, 1 leased, 1 left" in written.getvalue()
    assert "labelled 100 posts in 2 parts" in written.getvalue()
    with pytest.raises(WrongRequest, match="no labelling job"):
        show(FolderStore(tmp_path / "none"), console)


def test_a_store_that_is_away_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "out")
    job, found = make_job(store, str(write_lines(tmp_path / "posts.jsonl", 10)), 50)
    make_worker(store, job, found).run()
    find, failures = FolderStore.find, [1]

    def away(self: FolderStore, key: str) -> ObjectInfo | None:
        if key == "_SUCCESS.json" and failures.pop(0):
            failures.append(0)
            raise StorageError("The store is away.", transient=True)
        failures.append(0)
        return find(self, key)

    monkeypatch.setattr(FolderStore, "find", away)
    written = io.StringIO()
    watch(store, 5, Console(file=written, width=160), lambda seconds: None)
    assert "asked again in 5 s: The store is away." in written.getvalue()
    assert "labelled 10 posts" in written.getvalue()
