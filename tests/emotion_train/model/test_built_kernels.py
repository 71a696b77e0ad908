"""Triton's cache folder goes into a store and comes out on another machine, and nothing else comes
out.
"""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from emotion_train.errors import StorageError
from emotion_train.model import built_kernels
from emotion_train.model.built_kernels import BuiltKernels, archive_name, entries, pack, unpack
from emotion_train.processes.ranks import Ranks
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from emotion_train.training.start import keep_kernels
from tests.helpers.tiny_runs import tiny_config

FIRST, SECOND, THIRD = ("FIRSTENTRYOFTRITON", "SECONDENTRYOFTRITON", "THIRDENTRYOFTRITON")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton is not installed beside a PyTorch for CPUs
    monkeypatch.setattr(built_kernels, "version", lambda name: "3.6.0")
    monkeypatch.setenv("TRITON_CACHE_DIR", "as it was")


def build(folder: Path, name: str) -> None:
    """An entry as Triton 3.6 writes it: files, and a list of them by their full paths."""
    entry = folder / name
    entry.mkdir(parents=True)
    (entry / "_drop.cubin").write_bytes(name.encode() * 100)
    (entry / "_drop.json").write_text('{"num_warps": 4}')
    (entry / "__grp___drop.json").write_text(
        json.dumps({"child_paths": {one: str(entry / one) for one in ("_drop.cubin", "_drop.json")}})
    )


def library(folder: Path, name: str) -> None:
    """An entry with what starts a kernel."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__triton_launcher.cpython-311-x86_64-linux-gnu.so").write_bytes(b"ELF")
    (folder / name / "tmp.pid_1").mkdir()  # left by a process that was killed


@contextmanager
def opened(
    store: Store, folder: Path, words: list[str], keeps: bool = True, patience_s: float = 0.0
) -> Iterator[BuiltKernels]:
    """Kernels that have come."""
    with BuiltKernels(store, folder, "sm90", words.append, keeps=keeps, patience_s=patience_s) as kernels:
        kernels.ready()
        yield kernels


def test_what_one_machine_has_built_another_finds_at_its_own_place(bucket_url: str, tmp_path: Path) -> None:
    store, words = open_store(bucket_url), list[str]()
    with opened(store, tmp_path / "one", words):
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "one")
        build(tmp_path / "one", FIRST)
        build(tmp_path / "one", SECOND)
        (tmp_path / "one" / SECOND / "__grp___drop.json").unlink()  # is being built
        library(tmp_path / "one", THIRD)
    with opened(store, tmp_path / "two", words, keeps=False):
        assert entries(tmp_path / "two") == {FIRST, THIRD}
    assert os.environ["TRITON_CACHE_DIR"] == "as it was"
    files = {path.name: path.read_bytes() for path in (tmp_path / "one" / FIRST).iterdir()}
    listed = json.loads((tmp_path / "two" / FIRST / "__grp___drop.json").read_bytes())["child_paths"]
    assert {name: Path(path).read_bytes() for name, path in listed.items()} == {
        name: files[name] for name in listed
    }
    assert all(path.startswith(str(tmp_path / "two")) for path in listed.values())
    assert words == []


def test_runs_that_build_different_kernels_add_to_one_archive(tmp_path: Path) -> None:
    store, words = open_store(str(tmp_path / "store")), list[str]()
    with (
        opened(store, tmp_path / "one", words),
        opened(store, tmp_path / "two", words),
        opened(store, tmp_path / "three", words, keeps=False),
    ):
        build(tmp_path / "one", FIRST)
        build(tmp_path / "two", SECOND)
        build(tmp_path / "three", THIRD)
    with opened(store, tmp_path / "four", words):
        assert entries(tmp_path / "four") == {FIRST, SECOND}
    assert words == []


def test_kernels_are_kept_while_a_run_goes_on_and_none_when_it_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(built_kernels, "_LOOK_EVERY_S", 0.01)
    store = open_store(str(tmp_path / "store"))

    def interrupted_run() -> None:
        with opened(store, tmp_path / "one", []) as kernels:
            build(tmp_path / "one", FIRST)
            while not list(store.list()):
                time.sleep(0.01)
            kernels._stop.set()
            kernels._thread.join()
            build(tmp_path / "one", SECOND)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert unpack(store.read(archive_name("sm90")), tmp_path / "one") == {FIRST}


def test_a_run_begins_while_its_kernels_are_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked_for, answered = open_store(str(tmp_path / "store")), Event(), Event()
    with opened(store, tmp_path / "one", []):
        build(tmp_path / "one", FIRST)
    real = FolderStore.read

    def slow(self: FolderStore, key: str, **where: Any) -> bytes:
        asked_for.set()
        assert answered.wait(60)
        return real(self, key, **where)

    monkeypatch.setattr(FolderStore, "read", slow)
    with BuiltKernels(store, tmp_path / "two", "sm90", print, keeps=False) as kernels:
        assert asked_for.wait(60)
        assert entries(tmp_path / "two") == set()
        answered.set()
        kernels.ready()
        assert entries(tmp_path / "two") == {FIRST}


def test_an_archive_is_written_only_when_it_lacks_something(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    with opened(store, tmp_path / "one", []):
        build(tmp_path / "one", FIRST)
    written = (tmp_path / "store" / archive_name("sm90")).stat().st_mtime_ns
    for folder in ("one", "two"):
        with opened(store, tmp_path / folder, []):
            assert entries(tmp_path / folder) == {FIRST}
    assert (tmp_path / "store" / archive_name("sm90")).stat().st_mtime_ns == written


def test_triton_finds_its_own_place_again_after_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an error, and where nobody had named a place: one process may train twice."""
    monkeypatch.delenv("TRITON_CACHE_DIR")

    def failing_run() -> None:
        with opened(open_store(str(tmp_path / "store")), tmp_path / "one", []):
            assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "one")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_run()
    assert "TRITON_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("main", [True, False])
def test_a_run_on_a_gpu_keeps_its_kernels_where_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = tiny_config(
        tmp_path, f"run.kernels_url={tmp_path / 'kept'}", f"checkpoint.local_folder={tmp_path / 'local'}"
    )
    ranks = cast(Ranks, SimpleNamespace(is_main=main))
    with ExitStack() as stack:
        keep_kernels(config, ranks, torch.device("cpu"), stack)()
        assert os.environ["TRITON_CACHE_DIR"] == "as it was"
        keep_kernels(config, ranks, torch.device("cuda"), stack)()
        build(Path(os.environ["TRITON_CACHE_DIR"]), FIRST)
    assert [path.name for path in (tmp_path / "local" / "kernels").iterdir()] == [FIRST]
    assert (tmp_path / "kept" / archive_name("sm90")).exists() == main


def archive(**files: bytes) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as file:
        for name, content in files.items():
            file.writestr(name.replace("__", "/", 1), content)
    return whole.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (archive(**{f"{FIRST}__x": b"1" * 500})[:-40], "damaged"),
        (archive(**{f"{FIRST}__x": b"1" * 500}).replace(b"1" * 9, b"2" * 9), "damaged"),
        (archive(**{"..__x": b""}), "none of Triton's"),
        (archive(**{f"{FIRST}__..": b""}), "none of Triton's"),
        (archive(**{f"{FIRST}__.hidden": b""}), "none of Triton's"),
        (archive(x=b""), "none of Triton's"),
        (archive(**{f"{FIRST}____grp__x.json": b"[]"}), "no list of its files"),
    ],
)
def test_an_archive_that_is_damaged_or_no_cache_is_passed_over_whole(
    tmp_path: Path, data: bytes, words: str
) -> None:
    store, said = open_store(str(tmp_path / "store")), list[str]()
    store.write(archive_name("sm90"), data)
    with opened(store, tmp_path / "one", said, keeps=False):
        assert list((tmp_path / "one").iterdir()) == []
    assert len(said) == 1
    assert words in said[0]


def test_a_store_that_fails_costs_a_sentence_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, said = open_store(str(tmp_path / "store")), list[str]()

    def failing(*given: object, **named: object) -> bytes:
        raise StorageError("the bucket is away")

    monkeypatch.setattr(store, "read", failing)
    monkeypatch.setattr(store, "write", failing)
    with opened(store, tmp_path / "one", said):
        build(tmp_path / "one", FIRST)
    assert [word.partition(",")[0].partition(":")[0] for word in said] == [
        *(
            "kernels are built here",
            "kernels are built here",
            "the kernels that were built could not be kept",
        ),
    ]


def test_an_archive_holds_one_version_of_the_kernels_for_one_kind_of_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = archive_name("sm90")
    assert here.endswith("-sm90.zip")
    assert archive_name("sm89") != here
    monkeypatch.setattr(built_kernels, "version", lambda name: "3.7.0")
    assert archive_name("sm90") != here


def test_an_archive_of_an_entry_that_is_there_leaves_it_alone(tmp_path: Path) -> None:
    build(tmp_path / "one", FIRST)
    data = pack(tmp_path / "one", {FIRST})
    (tmp_path / "one" / FIRST / "_drop.cubin").write_bytes(b"in use")
    assert unpack(data, tmp_path / "one") == {FIRST}
    assert (tmp_path / "one" / FIRST / "_drop.cubin").read_bytes() == b"in use"


def test_an_archive_of_too_many_bytes_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that is itself too large, nor a small one that unpacks to more."""
    monkeypatch.setattr(built_kernels, "MAX_BYTES", 1 << 20)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{FIRST}/_drop.cubin", bytes(2 << 20))
    assert len(packed.getvalue()) < 1 << 14
    read: list[str] = []

    def noted(file: zipfile.ZipFile, name: str) -> bytes:
        read.append(name)
        return b""

    monkeypatch.setattr(zipfile.ZipFile, "read", noted)
    for archive in (packed.getvalue(), packed.getvalue() + bytes(1 << 20)):
        with pytest.raises(ValueError, match="it has more than 1,048,576 bytes"):
            unpack(archive, tmp_path)
    assert read == []


def test_of_a_large_object_no_more_is_read_than_an_archive_may_have(tmp_path: Path) -> None:
    asked: list[int | None] = []

    def read(key: str, length: int | None = None) -> bytes:
        asked.append(length)
        return b"no archive"

    def read_verified(key: str, verify: Callable[[bytes], Any], **where: Any) -> Any:
        return verify(read(key, **where))

    store = cast(Store, SimpleNamespace(read=read, read_verified=read_verified, url_of=lambda key: key))
    words: list[str] = []
    BuiltKernels(store, tmp_path, "sm90", words.append, keeps=True).fetch()
    assert asked == [built_kernels.MAX_BYTES + 1]
    assert "could not be used: it is damaged" in words[0]


@pytest.mark.parametrize("patience_s", [0.0, 3600.0])
def test_a_store_that_is_away_for_a_moment_is_asked_again_where_there_is_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    store, words = open_store(str(tmp_path / "store")), list[str]()
    with opened(store, tmp_path / "one", words):
        build(tmp_path / "one", FIRST)
    failures, real = iter(range(1)), FolderStore.read

    def away(self: FolderStore, key: str, **where: Any) -> bytes:
        if next(failures, None) is not None:
            raise StorageError("The network is gone.", transient=True)
        return real(self, key, **where)

    monkeypatch.setattr(FolderStore, "read", away)
    with opened(store, tmp_path / "two", words, keeps=False, patience_s=patience_s):
        assert entries(tmp_path / "two") == ({FIRST} if patience_s else set())
    assert bool(words) == (patience_s == 0)
