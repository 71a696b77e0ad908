"""A base that is read before anything can take it is the base that is read when it is needed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from emotion_train.bases import pieces_ahead
from emotion_train.bases.ahead import BaseAhead
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.model import staged_weights
from emotion_train.model.load import load_base, read_config
from emotion_train.model.staged_copy import stage
from emotion_train.storage.folder import FolderStore
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import causal_checkpoint

ALL = 1 << 30
PIECE = 10_000  # bytes


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two objects and some twenty pieces."""
    folder = tmp_path_factory.mktemp("ahead")
    causal_checkpoint(folder / "base", "mistral")
    stage(str(folder / "base"), str(folder / "staged"), "bf16", "cpu", shard_bytes=60_000, piece_bytes=PIECE)
    return folder / "staged"


class Reads:
    """Every read of a piece: its object and first byte. `before` is called with each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Any = lambda key, start: None) -> None:
        self.of_pieces: list[tuple[str, int]] = []
        self.ahead = 0
        real = FolderStore.read_into

        def noting(store: FolderStore, key: str, buffer: memoryview, *, start: int = 0, **where: Any) -> int:
            self.of_pieces.append((key, start))
            self.ahead += threading.current_thread().name == "ahead"
            before(key, start)
            return real(store, key, buffer, start=start, **where)

        monkeypatch.setattr(FolderStore, "read_into", noting)


def load(ahead: BaseAhead) -> str:
    """The identity of its weights."""
    return load_base(read_config(ahead.files()), "bf16", 2, "cpu")[1].weights_sha256


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("pieces", [0, 3, None])
def test_each_piece_is_read_once_whatever_was_read_ahead(
    staged: Path, monkeypatch: pytest.MonkeyPatch, pieces: int | None
) -> None:
    whole = load_base(str(staged), "bf16", 2, "cpu")[1].weights_sha256
    reads = Reads(monkeypatch)
    with BaseAhead(str(staged), None, ALL if pieces is None else pieces * PIECE + 1) as ahead:
        index = ahead.files().staged.index  # type: ignore[union-attr]
        expected = [(index.shards[number].key, PIECE * place) for number, place in index.places(None)]
        wait_until(lambda: len(reads.of_pieces) == (len(expected) if pieces is None else pieces))
        assert reads.ahead == len(reads.of_pieces)
        assert load(ahead) == whole
    assert sorted(reads.of_pieces) == sorted(expected)


def test_no_piece_is_read_ahead_that_a_shallower_model_does_not_need(
    staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    with BaseAhead(str(staged), 1, ALL) as ahead:
        load(ahead)
        index = ahead.files().staged.index  # type: ignore[union-attr]
    needed = index.places(index.tensors_read(1))
    assert len(needed) < len(index.places(None))
    assert sorted(reads.of_pieces) == sorted((index.shards[one].key, PIECE * at) for one, at in needed)


def test_what_could_not_be_read_ahead_is_read_when_it_is_needed(
    staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_base(str(staged), "bf16", 2, "cpu")[1].weights_sha256
    failures = iter(range(2))

    def away(key: str, start: int) -> None:
        if threading.current_thread().name == "ahead" and next(failures, None) is not None:
            raise StorageError("The network is gone.", transient=True)

    reads = Reads(monkeypatch, away)
    with BaseAhead(str(staged), None, ALL) as ahead:
        wait_until(lambda: reads.ahead > 0)
        assert load(ahead) == whole


def test_a_changed_byte_is_refused_in_the_same_words(staged: Path, tmp_path: Path) -> None:
    for path in staged.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = next(iter(sorted(tmp_path.glob("model-*"))))
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(WrongRequest) as plain:
        load_base(str(tmp_path), "bf16", 2, "cpu")
    with pytest.raises(WrongRequest) as ahead_of_use, BaseAhead(str(tmp_path), None, ALL) as ahead:
        load(ahead)
    assert str(ahead_of_use.value) == str(plain.value)


def test_a_base_that_is_not_there_is_refused_by_who_asks_for_it(tmp_path: Path) -> None:
    with BaseAhead(str(tmp_path / "nothing"), None, ALL) as ahead, pytest.raises(WrongRequest) as refused:
        ahead.files()
    assert "does not exist" in str(refused.value)


def test_a_start_that_ends_early_leaves_no_thread_and_no_bytes(
    staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(pieces_ahead, "_THREADS", 3)
    reads = Reads(monkeypatch, lambda key, start: released.wait(PATIENCE_S) and None)
    before = set(threading.enumerate())
    with BaseAhead(str(staged), None, ALL):
        wait_until(lambda: len(reads.of_pieces) == 3)
        threading.Timer(0.1, released.set).start()
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert len(reads.of_pieces) == 3  # those on their way alone


def test_who_waits_for_a_piece_is_not_left_waiting_when_reading_ends(
    staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    reads = Reads(monkeypatch, lambda key, start: released.wait(PATIENCE_S) and None)
    monkeypatch.setattr(pieces_ahead, "_END_S", 0.0)
    with BaseAhead(str(staged), None, ALL) as ahead:
        files = ahead.files().staged
        assert files is not None
        first = files.index.places(None)[0]
        wait_until(lambda: reads.ahead > 0)
        threading.Timer(0.1, files.read_no_more).start()
        assert files.taken_ahead(first) is None
        released.set()


def test_a_load_that_is_left_reads_nothing_more(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads wait for pieces that are on their way, and then have nothing to do."""
    released, left = threading.Event(), threading.Event()
    reads = Reads(monkeypatch, lambda key, start: released.wait(PATIENCE_S) and None)
    monkeypatch.setattr(pieces_ahead, "_THREADS", 2)
    monkeypatch.setattr(pieces_ahead, "_END_S", 0.0)

    def leave(placed: int, total: int) -> None:
        left.set()
        raise InterruptedError

    with BaseAhead(str(staged), None, 2 * PIECE) as ahead:
        wait_until(lambda: reads.ahead == 2)
        with monkeypatch.context() as patch:
            patch.setattr(staged_weights, "PIECES_IN_FLIGHT", 2)
            with pytest.raises(InterruptedError):
                load_base(read_config(ahead.files()), "bf16", 2, "cpu", tell=leave)
        assert left.is_set()
        assert len(reads.of_pieces) == 2
    released.set()
