"""Pulling a published run: whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import pytest

from emotion_train.data.text_filter import FILE_NAME
from emotion_train.errors import Fenced, StorageError, WrongRequest
from emotion_train.runs.log import Entry, Part, Writer, upload_part
from emotion_train.runs.published import download, safe_targets
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from launch.cli import main


def published(store: Store, files: dict[str, bytes], trained_on: bytes | None = None) -> tuple[str, Entry]:
    writer = Writer(store, "run", "a" * 64, "b" * 64)
    writer.claim(0, 0)
    parts = tuple(
        upload_part(store, "run", f"final/{writer.incarnation:08d}/{name}", data)
        for name, data in files.items()
    )
    if trained_on is not None:
        parts += (writer.upload(FILE_NAME, trained_on),)
    return f"{store.url}/run", writer.append("final", 3, 30, parts, {"macro_f1": 0.5})


FILES = {
    "adapter/adapter_model.safetensors": b"weights",
    "adapter/adapter_config.json": b"{}",
    "report.json": b'{"a": 1}',
}


def test_a_published_run_is_pulled_whole(store: Store, tmp_path: Path) -> None:
    url, entry = published(store, FILES)
    assert download(url, tmp_path / "here" / "adapter") == list(entry.parts)
    found = {
        path.relative_to(tmp_path / "here/adapter").as_posix(): path.read_bytes()
        for path in (tmp_path / "here").rglob("*")
        if path.is_file()
    }
    assert found == {
        "adapter_model.safetensors": b"weights",
        "adapter_config.json": b"{}",
        "report/report.json": b'{"a": 1}',
    }


def test_a_damaged_part_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    url, _ = published(store, FILES)
    store.write("run/final/00000000/report.json", b'{"a": 2}')
    with pytest.raises(StorageError, match="sha256"):
        download(url, tmp_path / "adapter")
    assert list(tmp_path.glob("*dapter*")) == []


def test_a_folder_with_files_is_not_overwritten(store: Store, tmp_path: Path) -> None:
    url, _ = published(store, FILES)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("keep")
    with pytest.raises(WrongRequest, match="not an empty folder"):
        download(url, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("final/00000000/adapter/adapter_model.bin", "pickles"),
        ("final/00000000/adapter/model.pt", "pickles"),
        ("final/00000000/adapter/optimizer.pkl", "pickles"),
        ("data/00000000/x.json", "not below final/"),
        ("final/00000001/adapter/x.json", "not below final/00000000/"),
        ("final/00000000/adapter/ADAPTER_config.json", "double name"),
        ("final/00000000/adapter/adapter_config.json/x.json", "double name"),
    ],
)
def test_unsafe_parts_are_refused(key: str, reason: str) -> None:
    with pytest.raises(WrongRequest, match=reason):
        safe_targets(final("final/00000000/adapter/adapter_config.json", key))


def test_two_parts_that_land_in_one_place_are_refused() -> None:
    with pytest.raises(WrongRequest, match="double name"):
        safe_targets(final("final/00000000/report.json", "final/00000000/adapter/report/report.json"))


def test_a_part_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "runs"))
    url, _ = published(store, FILES)
    secret = tmp_path / "secret.json"
    secret.write_bytes(FILES["report.json"])  # even with the right bytes
    target = tmp_path / "runs" / "run" / "final" / "00000000" / "report.json"
    target.unlink()
    target.symlink_to(secret)
    with pytest.raises(StorageError, match="symbolic link"):
        download(url, tmp_path / "adapter")
    assert list(tmp_path.glob("*dapter*")) == []


def test_the_training_filter_is_pulled_only_when_it_is_asked_for(store: Store, tmp_path: Path) -> None:
    url, entry = published(store, FILES, trained_on=b"filter")
    key = entry.parts[-1].key
    assert key == f"data/00000000/{hashlib.sha256(b'filter').hexdigest()[:12]}/training-filter.bloom"
    assert download(url, tmp_path / "without") == list(entry.parts[:-1])
    assert not list((tmp_path / "without").rglob("*filter*"))
    assert download(url, tmp_path / "with", True) == list(entry.parts)
    assert (tmp_path / "with" / "data" / "training-filter.bloom").read_bytes() == b"filter"

    store.write(f"run/{key}", b"Filter")
    download(url, tmp_path / "again")  # what is left out is not looked at
    with pytest.raises(StorageError, match="does not have the sha256"):
        download(url, tmp_path / "damaged", True)
    assert not (tmp_path / "damaged").exists()


def test_a_run_without_a_training_filter_is_pulled_without(store: Store, tmp_path: Path) -> None:
    url, _ = published(store, FILES)
    with pytest.raises(WrongRequest, match="earlier version published it; pull it without --with-training-"):
        download(url, tmp_path / "adapter", True)
    download(url, tmp_path / "adapter")


@pytest.mark.parametrize(
    "key",
    [
        "data/00000000/training-filter.bloom",
        "data/00000001/0123456789ab/training-filter.bloom",
        "data/00000000/0123456789ab/training-filterxbloom",
        "data/00000000/0123456789ab/more/training-filter.bloom",
    ],
)
def test_what_only_looks_like_a_training_filter_is_refused(key: str) -> None:
    with pytest.raises(WrongRequest, match="not below final/"):
        safe_targets(final("final/00000000/report.json", key))


def test_an_absurd_size_is_refused() -> None:
    with pytest.raises(WrongRequest, match="too large"):
        safe_targets(final("data/00000000/0123456789ab/training-filter.bloom", size=1 << 35))
    with pytest.raises(WrongRequest, match="too large"):
        safe_targets(final("final/00000000/report.json", size=1 << 50))


def final(*keys: str, size: int = 1) -> Entry:
    parts = tuple(Part(key=key, bytes=size, sha256="0" * 64) for key in keys)
    facts = {"nonce": "", "time_utc": "", "epoch": 0, "step": 0, "index_sha256": "", "config_sha256": ""}
    return Entry(seq=1, kind="final", incarnation=0, parts=parts, **facts)


def test_a_fenced_writer_cannot_touch_what_another_has_published(store: Store, tmp_path: Path) -> None:
    stale = Writer(store, "run", "a" * 64, "b" * 64)
    stale.claim(0, 0)
    url, _ = published(store, FILES)
    upload_part(store, "run", f"final/{stale.incarnation:08d}/report.json", b"other")
    with pytest.raises(Fenced):
        stale.append("final", 3, 30)
    download(url, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("to", "why"),
    [
        ("", "it is empty; type a path of this machine"),
        ("s3://bucket/adapter", "s3://bucket/adapter is a URL; type a path of this machine"),
        ("file:///adapter", "is a URL"),
        ("a\0b", "holds a character that cannot be printed"),
        ("n" * 300, "cannot be written (File name too long); give --to a folder"),
    ],
)
def test_a_place_that_is_no_folder_of_this_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str, why: str
) -> None:
    url, _ = published(open_store(str(tmp_path / "runs")), FILES)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        code = main(["pull", url, "--to", to])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    assert why in capsys.readouterr().err
    assert list((tmp_path / "here").iterdir()) == []


def test_a_home_is_known_in_the_folder_to_pull_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it to the program in `--to=~/adapter`."""
    url, _ = published(open_store(str(tmp_path / "runs")), FILES)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert main(["pull", url, "--to=~/adapter"]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"


def test_the_next_line_can_be_pasted_where_a_folder_has_a_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = published(open_store(str(tmp_path / "runs")), FILES)
    folder = tmp_path / "my adapter"
    assert main(["pull", url, "--to", str(folder)]) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(line) == ["emotion-train", "predict", "--adapter", str(folder), "what a lovely mess"]
