"""The log of a run: create-only entries, fencing by collision, parts that are verified when read."""

from __future__ import annotations

import json

import pytest

from emotion_train.errors import Fenced, StorageError, WrongRequest
from emotion_train.runlog import Part, Writer, entry_key, final_entry, read_log, read_part, run_ids, summary
from emotion_train.storage import Store


def writer(store: Store, run_id: str = "run") -> Writer:
    return Writer(store, run_id, index_sha256="a" * 64, config_sha256="b" * 64)


def test_entries_come_back_in_order_with_their_schema(store: Store) -> None:
    log = writer(store)
    log.claim(0, 0)
    part = log.upload("step-00000005/adapter.safetensors", b"weights")
    log.append("checkpoint", 1, 5, (part,), {"macro_f1": 0.5})
    claim, saved = read_log(store, "run")
    assert (claim.kind, claim.seq, claim.incarnation) == ("claim", 0, 0)
    assert (saved.kind, saved.seq, saved.step, saved.parts[0].key) == (
        "checkpoint",
        1,
        5,
        "data/00000000/step-00000005/adapter.safetensors",
    )
    document = json.loads(store.read(entry_key("run", 1)))
    assert document["schema"] == "emotion-train/log/1"
    assert read_part(store, "run", saved.parts[0]) == b"weights"


def test_a_claim_fences_the_older_writer(store: Store) -> None:
    old = writer(store)
    old.claim(0, 0)
    new = writer(store)
    new.claim(0, 0)
    with pytest.raises(Fenced) as caught:
        old.append("checkpoint", 0, 1)
    assert caught.value.exit_code == 34
    assert [entry.incarnation for entry in read_log(store, "run")] == [0, 1]


def test_of_two_claims_at_once_one_wins(store: Store) -> None:
    first, second = writer(store), writer(store)
    first.claim(0, 0)
    with pytest.raises(Fenced):
        second.claim(0, 0)


def test_a_part_that_was_replaced_is_refused(store: Store) -> None:
    log = writer(store)
    part = log.upload("x.safetensors", b"right")
    for wrong in (b"wrong", b"too long"):
        store.write(f"run/{part.key}", wrong)
        with pytest.raises(StorageError, match="replaced or damaged"):
            read_part(store, "run", part)


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../b", "a//b", "a\\b", "C:/x", ""])
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
