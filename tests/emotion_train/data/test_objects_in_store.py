"""Prepares at the same place leave each other's objects alone, and a data set is said to be there
only after a look at every object.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion_train.cli import main
from emotion_train.data import objects
from emotion_train.data.index import Index, read_index
from emotion_train.data.objects import look_at_objects
from emotion_train.errors import ObjectNotFound, WrongRequest
from emotion_train.preparation import steps
from emotion_train.preparation.existing import existing_index
from emotion_train.preparation.steps import PrepareResult, prepare
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from launch.check.dataset import check_objects
from tests.helpers.edited_index import index_of, sealed

SMALL: dict[str, Any] = {"rows_per_group": 16, "rows_per_object": 32}


def posts(path: Path, changed: int = 0) -> Path:
    """120 posts; in another source some of them are others."""
    rows = [(f"post {i}{' changed' * (i < changed)}", ["anger", "joy"][i % 2]) for i in range(120)]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def contents(store: Store) -> dict[str, bytes]:
    return {info.key: store.read(info.key) for info in store.list()}


def keys(index: Index) -> list[str]:
    return [described.key for split in index.splits.values() for described in split.objects]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(WrongRequest) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_object_is_named_for_its_bytes(tmp_path: Path, store: Store) -> None:
    index = prepare(posts(tmp_path / "posts.csv"), store.url, **SMALL).index
    assert len(keys(index)) == 5
    for split in index.splits.values():
        for number, described in enumerate(split.objects):
            sha256 = hashlib.sha256(store.read(described.key)).hexdigest()
            assert described.key.split("/")[1] == f"part-{number:05}-{sha256[:16]}.parquet"


# Two at once


def with_another_in_between(monkeypatch: pytest.MonkeyPatch, other: Callable[[], object]) -> None:
    """The next `prepare` finds an empty place, and `other` runs before it does anything else."""
    look = existing_index

    def look_then_other(store: Store) -> Index | None:
        monkeypatch.setattr(steps, "existing_index", look)
        there = look(store)
        other()
        return there

    monkeypatch.setattr(steps, "existing_index", look_then_other)


def test_of_two_sources_at_once_the_winner_s_data_set_stays_whole(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, others = posts(tmp_path / "mine.csv"), posts(tmp_path / "others.csv", changed=40)
    winners: dict[str, bytes] = {}

    def win() -> None:
        prepare(mine, store.url, **SMALL)
        winners.update(contents(store))

    with_another_in_between(monkeypatch, win)
    words = ["--rows-per-group", "16", "--rows-per-object", "32"]
    assert main(["prepare", str(others), store.url, *words]) == 2
    told = capsys.readouterr().err
    assert "holds another prepared data set (name 'mine.csv' there, 'others.csv' now)" in told
    assert len(winners) == 6
    assert contents(store).items() >= winners.items()
    assert "5 objects of" in check_objects(store, read_index(store))
    assert main(["prepare", str(mine), store.url, *words]) == 0
    assert "already there, the same\n" in capsys.readouterr().out


@pytest.mark.parametrize("index_bytes", ["the same", "others"])
def test_of_one_source_twice_at_once_both_succeed(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, index_bytes: str
) -> None:
    source, first = posts(tmp_path / "posts.csv"), []

    def win() -> None:
        first.append(prepare(source, store.url, **SMALL))
        if index_bytes == "others":  # as another version of a library writes them
            document = json.loads(store.read("index.json"))
            document["versions"]["pyarrow"] = "0.0.1"
            store.write("index.json", sealed(document))

    with_another_in_between(monkeypatch, win)
    second = prepare(source, store.url, **SMALL)
    assert second.created == (index_bytes == "the same")
    assert second.index == read_index(store)
    assert sorted(keys(second.index)) == sorted(keys(first[0].index))
    assert sorted(contents(store)) == sorted([*keys(second.index), "index.json"])
    check_objects(store, second.index)


def test_another_source_is_refused_before_it_writes_anything(tmp_path: Path, store: Store) -> None:
    prepare(posts(tmp_path / "posts.csv"), store.url, **SMALL)
    before = contents(store)
    text = refusal(lambda: prepare(posts(tmp_path / "posts.csv", changed=40), store.url, **SMALL))
    assert "holds another prepared data set (the posts differ)" in text
    assert contents(store) == before


# Killed


def start(source: Path, store: Store) -> subprocess.Popen[bytes]:
    words = ["--rows-per-group", "16", "--rows-per-object", "16"]
    command = [sys.executable, "-m", "emotion_train.cli", "prepare", str(source), store.url, *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "store",
    ["folder", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("s3", "second"))],
    indirect=True,
)
def test_prepares_that_are_killed_two_at_once_leave_what_the_next_one_makes_whole(
    tmp_path: Path, store: Store
) -> None:
    """Real processes, killed when so many objects are there as a fixed seed draws."""
    source = posts(tmp_path / "posts.csv")
    meant = open_store(str(tmp_path / "undisturbed"))
    enough = random.Random(5).randrange(
        1, len(keys(prepare(source, meant.url, rows_per_group=16, rows_per_object=16).index))
    )
    both = [start(source, store) for _ in range(2)]
    while len(list(store.list())) < enough and any(one.poll() is None for one in both):
        time.sleep(0.02)
    for one in both:
        one.kill()
    assert {one.wait() for one in both} <= {-9, 0}
    assert list(store.list())
    both = [start(source, store) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    index, undisturbed = read_index(store), read_index(meant)
    assert sorted(keys(index)) == sorted(keys(undisturbed))
    assert all(store.read(key) == meant.read(key) for key in keys(index))
    check_objects(store, index)


# What is missing or damaged


def test_missing_objects_are_written_anew_and_counted(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    source = posts(tmp_path / "posts.csv")
    whole = prepare(source, store.url, **SMALL).index
    before = contents(store)
    for key in (whole.splits["train"].objects[1].key, whole.splits["test"].objects[0].key):
        store.delete(key)
    assert "is missing" in refusal(lambda: check_objects(store, whole))
    words = ["--rows-per-group", "16", "--rows-per-object", "32"]
    assert main(["prepare", str(source), store.url, *words]) == 0
    out = capsys.readouterr().out
    assert "already there, the same; 2 of its 5 objects were missing and are written anew\n" in out
    assert contents(store) == before
    check_objects(store, whole)
    assert main(["prepare", str(source), store.url, *words]) == 0
    assert "already there, the same\n" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["longer", "in a row group"])
def test_a_damaged_object_is_refused_by_name_until_it_is_deleted(
    tmp_path: Path, store: Store, damage: str
) -> None:
    source = posts(tmp_path / "posts.csv")
    index = prepare(source, store.url, **SMALL).index
    before = contents(store)
    split = index.splits["train"]
    key, group = split.objects[1].key, next(one for one in split.row_groups if one.object == 1)
    raw = bytearray(before[key])
    if damage == "longer":
        raw += b"!"
    else:
        raw[group.start + group.length // 2] ^= 1
    store.write(key, bytes(raw))
    text = refusal(lambda: prepare(source, store.url, **SMALL))
    assert f"is damaged: {key} " in text
    assert f"delete {store.url_of(key)} and type the same command again" in text
    assert store.read(key) == bytes(raw)
    assert key in refusal(lambda: check_objects(store, index))
    store.delete(key)
    assert prepare(source, store.url, **SMALL).written == 1
    assert contents(store) == before


def test_an_object_without_an_index_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, store: Store
) -> None:
    source = posts(tmp_path / "posts.csv")
    index = prepare(source, store.url, **SMALL).index
    before = contents(store)
    store.delete("index.json")
    key = keys(index)[0]
    store.write(key, before[key][:-1] + b"!")
    text = refusal(lambda: prepare(source, store.url, **SMALL))
    assert text.startswith(f"{store.url_of(key)} is damaged")
    assert text.endswith("delete it and type the same command again.")
    with pytest.raises(ObjectNotFound):
        store.stat("index.json")
    store.delete(key)
    prepare(source, store.url, **SMALL)
    assert contents(store) == before


def test_no_byte_can_change_without_being_noticed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    index = prepare(posts(tmp_path / "posts.csv"), store.url, **SMALL).index
    assert look_at_objects(store, index) == ((), {}, 0, 5, 0)
    index = index.model_copy(update={"splits": {"validation": index.splits["validation"]}})
    (key,) = keys(index)
    path = tmp_path / "out" / key
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert list(look_at_objects(store, index).damaged) == [key], at


def test_of_what_no_etag_vouches_for_no_more_is_read_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_READ_BYTES", 100)
    store = open_store(str(tmp_path / "out"))
    index = prepare(posts(tmp_path / "posts.csv"), store.url, **SMALL).index
    sizes = [described.bytes for split in index.splits.values() for described in split.objects]
    found = look_at_objects(store, index, sum(sizes[:2]))
    assert (found.by_etag, found.by_sha256 + found.by_size) == (0, 5)
    assert found.by_sha256 == 2
    assert look_at_objects(store, index, 0)[2:] == (0, 0, 5)


# What an earlier version wrote


def made_earlier(store: Store, result: PrepareResult, **source: Any) -> Index:
    """Give the data set the form that it had before objects were named for their bytes and
    conflicts had a rule.
    """
    document = json.loads(result.index.to_bytes())
    del document["source"]["on_conflict"]
    document["source"] |= source
    for name, split in document["splits"].items():
        for number, described in enumerate(split["objects"]):
            key, raw = f"{name}/part-{number:05}.parquet", store.read(described["key"])
            store.delete(described["key"])
            described |= {"key": key, "etag": store.write(key, raw).etag}
    store.write("index.json", index_of(document).to_bytes())
    return read_index(store)


def test_a_data_set_of_an_earlier_version_is_whole_and_recognised_by_its_posts(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    source = posts(tmp_path / "posts.csv")
    index = made_earlier(store, prepare(source, store.url, **SMALL))
    before = contents(store)
    assert "train/part-00000.parquet" in before
    assert "5 objects of" in check_objects(store, index)
    words = ["--rows-per-group", "16", "--rows-per-object", "32"]
    assert main(["prepare", str(source), store.url, *words]) == 0
    assert "already there, the same\n" in capsys.readouterr().out
    assert contents(store) == before
    store.delete("train/part-00001.parquet")
    assert prepare(source, store.url, **SMALL).written == 1
    assert contents(store) == before


def test_other_posts_than_those_of_an_earlier_version_are_refused_in_one_sentence(
    tmp_path: Path, store: Store
) -> None:
    source = posts(tmp_path / "posts.csv")
    with source.open("a") as file:
        file.write("twice,joy\n" + "twice,anger\n" * 2)
    made_earlier(store, prepare(source, store.url, on_conflict="first", **SMALL))
    before = contents(store)
    text = refusal(lambda: prepare(source, store.url, **SMALL))
    assert "holds a data set of an earlier version of this program" in text
    assert "another one from posts.csv (the posts differ). It" in text
    assert "type another DATA_URL, or --on-conflict first" in text
    assert contents(store) == before
    assert not prepare(source, store.url, on_conflict="first", **SMALL).created
