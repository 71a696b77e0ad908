"""An adapter named by a URL comes whole into the cache, once, and out of it only whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion_train.errors import StorageError, WrongRequest
from emotion_train.model.facts import FACTS
from emotion_train.runs import adapter_cache
from emotion_train.runs.adapter_cache import cache_folder, find_adapter
from emotion_train.runs.log import Writer, upload_part
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.s3 import S3Store
from emotion_train.storage.store import Store

FILES = {
    "adapter/adapter_model.safetensors": b"weights",
    f"adapter/{FACTS}": b"{}",
    "adapter/decision.json": b'{"thresholds": [0.5]}',
    "report.json": b'{"a": 1}',
    "report.html": b"<p>",
}
IN_CACHE = {
    "adapter_model.safetensors": b"weights",
    FACTS: b"{}",
    "decision.json": b'{"thresholds": [0.5]}',
    "report/report.json": b'{"a": 1}',
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are read of any store."""
    keys: list[str] = []
    for kind in (FolderStore, S3Store):

        def read(self: Store, key: str, *, _read: Any = kind.read, **more: Any) -> bytes:
            keys.append(key)
            data: bytes = _read(self, key, **more)
            return data

        monkeypatch.setattr(kind, "read", read)
    return keys


def publish(store: Store, files: dict[str, bytes] = FILES, run_id: str = "run", final: bool = True) -> str:
    writer = Writer(store, run_id, "a" * 64, "b" * 64)
    writer.claim(0, 0)
    parts = tuple(
        upload_part(store, run_id, f"final/{writer.incarnation:08d}/{name}", data)
        for name, data in files.items()
    )
    if final:
        writer.append("final", 3, 30, parts, {"macro_f1": 0.5})
    return f"{store.url}/{run_id}"


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("tail", ["", "/", "/final/00000000/adapter", "/final/00000000/adapter/"])
def test_a_run_is_pulled_once_and_then_only_its_log_is_read(
    store: Store, cache: Path, tail: str, reads: list[str]
) -> None:
    url = publish(store)
    found = find_adapter(url + tail)
    assert found.run_url == url
    assert found.folder.parent.parent == cache
    assert content(found.folder) == IN_CACHE
    assert any("/final/" in key for key in reads)
    reads.clear()
    assert find_adapter(url + tail) == found
    assert reads
    assert not [key for key in reads if "/log/" not in key]


def test_equal_adapters_of_two_runs_are_one_in_the_cache(store: Store) -> None:
    one, other = find_adapter(publish(store)), find_adapter(publish(store, run_id="other"))
    assert one.folder == other.folder
    third = find_adapter(publish(store, FILES | {"adapter/labels.json": b"[]"}, "third"))
    assert third.folder != one.folder


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "more"])
def test_what_is_damaged_in_the_cache_is_pulled_again(store: Store, damage: str) -> None:
    url = publish(store)
    weights = find_adapter(url).folder / "adapter_model.safetensors"
    if damage == "more":
        weights.with_name("x.bin").write_bytes(b"pickle")
    elif damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(b"weightz" if damage == "changed" else b"weight")
    assert content(find_adapter(url).folder) == IN_CACHE
    [place] = cache_folder().iterdir()
    assert {path.name for path in place.iterdir()} == {"adapter", "manifest.json"}


def test_a_damaged_part_leaves_nothing_in_the_cache(store: Store, cache: Path) -> None:
    url = publish(store)
    store.write("run/final/00000000/adapter/adapter_model.safetensors", b"weightz")
    with pytest.raises(StorageError, match="sha256"):
        find_adapter(url)
    assert list(cache.iterdir()) == []


def damage(url: str) -> None:
    (find_adapter(url).folder / "adapter_model.safetensors").write_bytes(b"weightz")


@pytest.mark.parametrize("damaged", [False, True])
def test_several_processes_at_once_get_one_folder(
    store: Store, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at once, all of which have pulled it when the first puts it in its place."""
    url = publish(store)
    if damaged:
        damage(url)
    found: list[Path] = []
    pulled = threading.Barrier(4)
    monkeypatch.setattr(adapter_cache, "_put_in_place", after(pulled.wait, adapter_cache._put_in_place))
    threads = [threading.Thread(target=lambda: found.append(find_adapter(url).folder)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert content(found[0]) == IN_CACHE
    assert list(cache_folder().iterdir()) == [found[0].parent]


def after(first: Callable[[], object], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, before each call of which `first` is called."""

    def both(*arguments: Any) -> Any:
        first()
        return function(*arguments)

    return both


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    "between",
    [
        "a process",
        pytest.param("a process, then damage", marks=pytest.mark.slow),
        pytest.param("damage and a process, twice", marks=pytest.mark.slow),
    ],
)
def test_whatever_others_do_between_two_steps_the_folder_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool, between: str
) -> None:
    """Each look at the cache and each rename of one process in turn has the whole of others before
    it. What is damaged after the last look is found by the next.
    """
    url = publish(open_store(str(tmp_path / "runs")))
    steps = ["_newest", "_numbered", "_is_whole", "rename"]
    for turn in range(40):
        shutil.rmtree(cache_folder(), ignore_errors=True)
        if damaged:
            damage(url)
        left, others = turn, list[Path]()

        def at_a_step() -> None:
            nonlocal left
            left -= 1
            if left == -1:
                for _ in range(1 + ("twice" in between)):
                    if "damage and" in between:
                        damage(url)
                    others.append(find_adapter(url).folder)  # noqa: B023
                    if "then damage" in between:
                        damage(url)

        with monkeypatch.context() as patch:
            for step in steps:
                home = os if step == "rename" else adapter_cache
                patch.setattr(home, step, after(at_a_step, getattr(home, step)))
            folder = find_adapter(url).folder
        if between == "a process":
            assert content(folder) == IN_CACHE
            assert not others or others[-1] == folder
        assert content(find_adapter(url).folder) == IN_CACHE
        assert len(list(cache_folder().iterdir())) == 1
        if left >= 0:
            break
    assert turn > len(steps)
    assert left >= 0  # every step had its turn


@pytest.mark.slow
def test_processes_that_start_together_get_one_folder(tmp_path: Path) -> None:
    url = publish(open_store(str(tmp_path / "runs")))
    program = (
        "import os, sys, time, pathlib\n"
        "from emotion_train.runs.adapter_cache import find_adapter\n"
        "url, home = sys.argv[1], pathlib.Path(sys.argv[2])\n"
        "for turn in range(20):\n"
        "    (home / f'{turn}-{os.getpid()}').touch()\n"
        "    while len(list(home.glob(f'{turn}-*'))) < 4: time.sleep(0.001)\n"
        "    os.environ['XDG_CACHE_HOME'] = str(home / f'cache{turn}')\n"
        "    weights = find_adapter(url).folder / 'adapter_model.safetensors'\n"
        "    assert weights.read_bytes() == b'weights'\n"
        "    print(weights)\n"
    )
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-c", program, url, str(tmp_path / "home")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert len(set(told)) == 1
    assert len(set(told[0].split())) == 20


def test_a_run_that_is_not_published_is_refused(store: Store) -> None:
    url = publish(store, final=False)
    with pytest.raises(WrongRequest, match="not published yet"):
        find_adapter(url)
    with pytest.raises(
        WrongRequest, match=r"is not the adapter that the run published; give the run, .*/run, once"
    ):
        find_adapter(f"{url}/final/00000000/adapter")


def test_the_adapter_of_a_writer_that_did_not_publish_is_refused(store: Store) -> None:
    publish(store, final=False)
    url = publish(store)
    with pytest.raises(WrongRequest, match="is not the adapter that the run published"):
        find_adapter(f"{url}/final/00000000/adapter")
    assert content(find_adapter(f"{url}/final/00000001/adapter").folder) == IN_CACHE


def test_a_folder_of_this_machine_is_used_where_it_is(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / FACTS).write_text("{}")
    for place in (str(tmp_path / "adapter"), f"{tmp_path}/adapter/", f"file://{tmp_path}/adapter"):
        assert find_adapter(place).folder == tmp_path / "adapter"
    assert find_adapter(str(tmp_path / "nowhere")).folder == tmp_path / "nowhere"  # refused by its reader
    assert not cache.exists()


def test_a_copy_in_a_bucket_is_pulled_once(bucket_url: str, reads: list[str]) -> None:
    store = open_store(f"{bucket_url}/copies/adapter")
    for name, data in IN_CACHE.items():
        store.write(name, data)
    found = find_adapter(store.url)
    assert found.run_url is None
    assert content(found.folder) == IN_CACHE
    reads.clear()
    assert find_adapter(store.url) == found
    assert reads == []
    (found.folder / FACTS).write_bytes(b"[]")
    assert content(find_adapter(store.url).folder) == IN_CACHE
    store.write(FACTS, b'{"b": 1}')
    assert content(find_adapter(store.url).folder) == IN_CACHE | {FACTS: b'{"b": 1}'}


def test_a_copy_with_a_pickle_is_refused(bucket_url: str, cache: Path) -> None:
    store = open_store(f"{bucket_url}/adapter")
    store.write(FACTS, b"{}")
    store.write("adapter_model.bin", b"pickle")
    with pytest.raises(WrongRequest, match=r"The copy .* names 'adapter_model.bin'; only .* never pickles"):
        find_adapter(store.url)
    assert not cache.exists()


def test_neither_run_nor_adapter_is_one_sentence(bucket_url: str) -> None:
    with pytest.raises(WrongRequest, match=r"There is neither a run nor an adapter at s3://.*; give OUT"):
        find_adapter(f"{bucket_url}/nowhere")


@pytest.mark.parametrize("place", ["s3//bucket/runs/one", "gs://bucket/runs/one", "s3:/bucket/run"])
def test_a_mistyped_url_is_told_as_everywhere(place: str) -> None:
    with pytest.raises(WrongRequest, match="The URL"):
        find_adapter(place)


def test_a_cache_that_cannot_be_written_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = publish(open_store(str(tmp_path / "runs")))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"set XDG_CACHE_HOME to a folder"):
        find_adapter(url)


def test_a_manifest_that_is_damaged_is_none(bucket_url: str) -> None:
    store = open_store(f"{bucket_url}/adapter")
    store.write(FACTS, b"{}")
    folder = find_adapter(store.url).folder
    for text in ("", "[]", json.dumps({FACTS: 5}), json.dumps({FACTS: [2, "0" * 64]})):
        (folder.parent / "manifest.json").write_text(text)
        folder = find_adapter(store.url).folder
        assert content(folder) == {FACTS: b"{}"}
