"""Old parts go, and nothing that anybody may still need."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import boto3
from botocore.stub import Stubber
from hypothesis import given
from hypothesis import strategies as st

from emotion_train.runs.log import Entry, Part, Writer, read_log, read_part
from emotion_train.runs.retention import collect, kept_entries, removable
from emotion_train.storage.open import open_store
from emotion_train.storage.s3 import S3Store
from emotion_train.storage.store import Store


def claimed(store: Store) -> Writer:
    writer = Writer(store, "run", "a" * 64, "b" * 64)
    writer.claim(0, 0)
    return writer


def save(writer: Writer, step: int, macro_f1: float | None = None) -> Entry:
    parts = tuple(
        writer.upload(f"step-{step:08d}/{name}", f"{name} {step}".encode())
        for name in ("adapter.safetensors", "state.json")
    )
    return writer.append("checkpoint", 0, step, parts, {} if macro_f1 is None else {"macro_f1": macro_f1})


def whole_steps(store: Store) -> list[int]:
    """Steps of the checkpoints that have all their parts; none may have some of them."""
    present = {info.key for info in store.list("run/data/")}
    found = []
    for entry in read_log(store, "run"):
        here = [f"run/{part.key}" in present for part in entry.parts]
        assert all(here) or not any(here)
        if entry.parts and all(here):
            found.append(entry.step)
            for part in entry.parts:
                read_part(store, "run", part)
    return found


def test_the_newest_three_the_best_and_each_kth_are_kept_and_no_entry_goes(store: Store) -> None:
    writer = claimed(store)
    for step in range(1, 13):
        save(writer, step, {2: 0.9, 7: 0.9, 8: 0.5}.get(step))
        collect(writer, keep_every=5)
    assert whole_steps(store) == [2, 5, 10, 11, 12]
    assert len(read_log(store, "run")) == 13


def test_without_keep_every_the_newest_three_and_the_best_are_left(store: Store) -> None:
    writer = claimed(store)
    for step in range(1, 7):
        save(writer, step, 1 / step)
    assert len(collect(writer, None)) == 4
    assert whole_steps(store) == [1, 4, 5, 6]
    assert collect(writer, None) == []


def test_orphans_of_older_writers_go_and_those_of_newer_ones_and_its_own_stay(store: Store) -> None:
    old = claimed(store)
    save(old, 1)
    orphan = old.upload("step-00000002/state.json", b"never committed")
    middle = claimed(store)
    under_way = middle.upload("step-00000003/state.json", b"about to be committed")
    newest = claimed(store)
    newer = newest.upload("step-00000004/state.json", b"about to be committed")
    store.write("run/data/notes.txt", b"not ours")
    assert collect(middle, None) == [orphan.key]
    assert collect(old, None) == []
    for part in (under_way, newer):
        read_part(store, "run", part)
    assert collect(newest, None) == [under_way.key]
    assert store.read("run/data/notes.txt") == b"not ours"
    assert whole_steps(store) == [1]


def test_a_fenced_writer_that_does_not_know_it_deletes_nothing_that_the_new_one_needs(store: Store) -> None:
    old = claimed(store)
    for step in range(1, 6):
        save(old, step, 0.5 if step == 1 else None)
    new = claimed(store)
    save(new, 6, 0.6)
    collect(old, None)
    assert whole_steps(store) == [1, 3, 4, 5, 6]
    collect(new, None)
    assert whole_steps(store) == [4, 5, 6]


def begin_upload(url: str, key: str) -> None:
    """An upload in parts that is not finished."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client, where = boto3.Session().client("s3"), {"Bucket": bucket, "Key": f"{prefix}/{key}"}
    number = client.create_multipart_upload(**where)["UploadId"]
    client.upload_part(**where, UploadId=number, PartNumber=1, Body=b"the beginning")


def unfinished(url: str) -> list[str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    answer = boto3.Session().client("s3").list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return sorted(one["Key"].removeprefix(f"{prefix}/") for one in answer.get("Uploads", []))


def test_an_upload_that_a_killed_start_left_goes_and_one_at_work_stays(bucket_url: str) -> None:
    url = f"{bucket_url}/some/prefix"
    store = open_store(url)
    claimed(store)
    begin_upload(url, "run/data/00000000/step-00000001/part")
    begin_upload(url, "run/final/00000000/adapter/model.safetensors")
    left = ["run-2/data/00000000/part", "run/data/00000001/step-00000002/part"]
    left += ["run/data/00000002/step-00000003/part", "run/data/notes"]
    for key in left:
        begin_upload(url, key)
    writer = claimed(store)
    save(writer, 1)
    collect(writer, None)
    assert unfinished(url) == left
    assert whole_steps(store) == [1]


def test_once_a_run_is_published_nothing_that_no_entry_names_is_left(bucket_url: str) -> None:
    url = f"{bucket_url}/published"
    store = open_store(url)
    writer = claimed(store)
    save(writer, 1)
    failed = writer.upload("step-00000002/state.json", b"a newer state took its place")
    begin_upload(url, "run/data/00000000/step-00000002/part")
    assert collect(writer, None) == []
    writer.append("final", 1, 3)
    assert collect(writer, None) == [failed.key]
    assert unfinished(url) == []
    assert whole_steps(store) == [1]


def test_a_bucket_that_does_not_let_uploads_be_listed_is_cleared_all_the_same(bucket_url: str) -> None:
    store = open_store(f"{bucket_url}/refusing")
    writer = claimed(store)
    assert isinstance(store, S3Store)
    for code, status in (("AccessDenied", 403), ("NotImplemented", 501)):
        with Stubber(store._connection().patient) as stub:
            stub.add_client_error("list_multipart_uploads", code, http_status_code=status)
            assert store.abort_uploads("run/", lambda key: True) == ()
    for step in range(1, 6):
        save(writer, step)
    assert len(collect(writer, None)) == 4


def test_what_the_final_entry_names_stays(store: Store) -> None:
    writer = claimed(store)
    named = writer.upload("step-00000001/adapter.safetensors", b"published")
    writer.append("checkpoint", 0, 1, (named,))
    for step in range(2, 6):
        save(writer, step)
    writer.append("final", 1, 5, (named,))
    collect(writer, None)
    assert read_part(store, "run", named) == b"published"


def test_a_kill_while_deleting_leaves_the_rest_to_the_next_time(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    writer = claimed(store)
    for step in range(1, 8):
        save(writer, step)
    program = (
        "import os, signal, sys\nfrom emotion_train.runs import log, retention\n"
        "from emotion_train.storage.open import open_store\nstore = open_store(sys.argv[1])\n"
        "writer = log.Writer(store, 'run', '', '')\nwriter.claim(0, 0)\n"
        "delete = type(store).delete\ncalls = []\n"
        "def once(self, key):\n"
        "    calls.append(key)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 else delete(self, key)\n"
        "type(store).delete = once\nretention.collect(writer, None)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode
        == -signal.SIGKILL
    )
    left = [info.key for info in store.list("run/data/")]
    assert len(left) == 14 - 3
    collect(claimed(store), None)
    assert whole_steps(store) == [5, 6, 7]


def test_files_that_killed_writes_left_are_cleared_away_but_not_those_under_way(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    killed = claimed(store)
    save(killed, 1)
    leftover = tmp_path / "run" / "data" / f"{killed.incarnation:08d}" / ".writing-1"
    leftover.write_bytes(bytes(1000))
    writer = claimed(store)
    save(writer, 2)
    under_way = tmp_path / "run" / "data" / f"{writer.incarnation:08d}" / ".writing-2"
    under_way.write_bytes(b"half")
    collect(writer, None)
    assert not leftover.exists()
    assert under_way.exists()
    assert whole_steps(store) == [1, 2]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Entry], set[str], list[tuple[int, int]]]:
    """A log, parts (committed, orphans and strangers), and (length, incarnation) at each moment
    when its writer may have collected.
    """
    log: list[Entry] = []
    present = {"data/notes.txt"}
    moments = []
    incarnation = 0
    for seq in range(draw(st.integers(1, 25))):
        kind = (
            draw(st.sampled_from(["claim", "checkpoint", "checkpoint", "checkpoint", "note"]))
            if seq
            else "claim"
        )
        incarnation = seq if kind == "claim" else incarnation
        score = draw(st.sampled_from([None, None, 0.1, 0.2, 0.3, 0.9]))
        keys = [f"data/{incarnation:08d}/{seq}"] if kind == "checkpoint" else []
        present |= {*keys, f"data/{incarnation:08d}/orphan-{seq}"}
        log.append(
            Entry(
                seq=seq,
                kind=kind,
                incarnation=incarnation,
                nonce="",
                time_utc="",
                epoch=0,
                step=seq,
                parts=tuple(Part(key=key, bytes=1, sha256="0" * 64) for key in keys),
                index_sha256="",
                config_sha256="",
                metrics={"macro_f1": score},
            )
        )
        moments.append((seq + 1, incarnation))
    return log, present, moments


@given(runs(), st.none() | st.integers(1, 4))
def test_who_knows_less_of_the_log_never_deletes_more(
    run: tuple[list[Entry], set[str], list[tuple[int, int]]], every: int | None
) -> None:
    log, present, moments = run
    before: set[str] = set()
    for length, incarnation in moments:
        doomed = set(removable(log[:length], incarnation, sorted(present), every))
        assert before <= doomed
        assert not doomed & {part.key for entry in kept_entries(log[:length], every) for part in entry.parts}
        assert not any(int(key.split("/")[1]) > incarnation for key in doomed)
        before = doomed
