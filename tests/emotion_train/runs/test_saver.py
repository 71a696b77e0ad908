"""What the background thread promises: nothing evaluated is lost, the newest wins, and a bucket
that fails costs no training.
"""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from emotion_train.data.index import read_index
from emotion_train.edges.bounded import tensors_in, tensors_to_buffers
from emotion_train.errors import Fenced, StorageError
from emotion_train.model.load import BaseInfo
from emotion_train.runs.checkpoint import (
    ADAPTER,
    MOMENTS,
    OPTIMIZER,
    STATE,
    Progress,
    Question,
    Snapshot,
    State,
    commit,
    host_copy,
    read_saved,
)
from emotion_train.runs.local_states import LocalStates
from emotion_train.runs.log import Entry, Writer, read_large_part, read_log
from emotion_train.runs.saver import Saver
from emotion_train.storage.buffers import Buffers
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import ObjectInfo
from tests.helpers.patience import PATIENCE_S, eventually
from tests.helpers.tiny_runs import tiny_config

RUN = "run"


class Gate(FolderStore):
    """A folder whose writes wait until `open` is set, and fail while `failing` says why."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.open = threading.Event()
        self.open.set()
        self.writing = threading.Event()
        self.failing: str | None = None

    def write(self, key: str, data: bytes | Path | Buffers) -> ObjectInfo:
        self.writing.set()
        assert self.open.wait(PATIENCE_S)
        if self.failing is not None:
            raise StorageError(self.failing)
        return super().write(key, data)


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Question:
    config = tiny_config(tmp_path_factory.mktemp("tiny"))
    return Question(
        config,
        read_index(open_store(config.data.url)),
        BaseInfo("base", "llama", "text", "0" * 64, "0" * 64, 1),
    )


@pytest.fixture
def store(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "runs")


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def saver(store: Gate, tmp_path: Path, told: list[str]) -> Iterator[Saver]:
    writer = Writer(store, RUN, "0" * 64, "0" * 64)
    writer.claim(0, 0)
    with Saver(writer, LocalStates(tmp_path / "local", RUN), told.append) as saver:
        yield saver
        store.open.set()


def snapshot(question: Question, step: int, macro_f1: float | None = None) -> Snapshot:
    tensors = {"weight": torch.full((3,), float(step))}
    metrics: dict[str, float | int | str | None] = {} if macro_f1 is None else {"macro_f1": macro_f1}
    moments = {f"{key}.weight": tensors["weight"].clone() for key in MOMENTS}
    return Snapshot(State(Progress(step=step), tensors, moments), 0, question, metrics)


def committed(store: Gate) -> list[tuple[int, object]]:
    return [
        (entry.step, entry.metrics.get("macro_f1"))
        for entry in read_log(store, RUN)
        if entry.kind == "checkpoint"
    ]


def hold_the_first(store: Gate, saver: Saver, question: Question) -> None:
    """Step 1 is in flight and does not come through."""
    store.open.clear()
    saver.offer(snapshot(question, 1))
    assert store.writing.wait(PATIENCE_S)


def test_the_newest_waiting_state_wins(store: Gate, saver: Saver, question: Question) -> None:
    hold_the_first(store, saver, question)
    for step in (2, 3, 4):
        saver.offer(snapshot(question, step))
    store.open.set()
    assert saver.drain(PATIENCE_S)
    assert committed(store) == [(1, None), (4, None)]


def test_room_is_made_for_a_newer_state_only_where_it_replaces_another(
    store: Gate, saver: Saver, question: Question, tmp_path: Path
) -> None:
    hold_the_first(store, saver, question)
    for step, score in ((2, 0.5), (3, None)):
        saver.offer(snapshot(question, step, score))
    saver.make_room()
    assert [one.step for one in saver._waiting] == [1, 2]
    saver.offer(snapshot(question, 4))
    store.failing = "The network is gone."
    store.open.set()
    wait_until_kept(LocalStates(tmp_path / "local", RUN), [1, 2, 4])
    saver.make_room()  # else the disk of this machine would lose the newest
    assert [one.step for one in saver._waiting][-1] == 4
    store.failing = None
    assert saver.drain(PATIENCE_S)
    assert committed(store)[-2:] == [(2, 0.5), (4, None)]


def test_an_attempt_that_failed_is_continued_at_the_part_that_failed(
    store: Gate, saver: Saver, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emotion_train.storage.patience.FIRST_PAUSE_S", 0.01)
    write, sent = store.write, list[str]()

    def fails_once(key: str, data: bytes | Path | Buffers) -> ObjectInfo:
        name = key.rpartition("/")[2]
        sent.append(name)
        if sent.count(OPTIMIZER) == 1 and name == OPTIMIZER:
            raise StorageError("The network is gone.")
        return write(key, data)

    monkeypatch.setattr(store, "write", fails_once)
    saver.offer(snapshot(question, 1))
    assert saver.drain(PATIENCE_S)
    assert sent == [ADAPTER, OPTIMIZER, OPTIMIZER, STATE]
    assert read_saved(store, RUN, saver._writer.log[-1]).state().progress.step == 1


def test_saving_and_reading_a_state_take_no_more_memory_than_it_has(
    tmp_path: Path, question: Question
) -> None:
    store, size = FolderStore(tmp_path), 16 << 20
    tensors = {name: torch.ones(size // 8) for name in ("a.weight", "b.weight")}
    moments = {f"{key}.{name}": one.clone() for key in MOMENTS for name, one in tensors.items()}
    writer = Writer(store, RUN, "0" * 64, "0" * 64)
    writer.claim(0, 0)
    tracemalloc.start()
    try:
        entry = commit(writer, Snapshot(State(Progress(step=1), tensors, moments), 0, question, {}))
        assert tracemalloc.get_traced_memory()[1] < size / 2
        tracemalloc.reset_peak()
        saved = read_saved(store, RUN, entry)
        state = saved.state()
        total = sum(part.bytes for part in entry.parts)
        assert total > 3 * size
        assert tracemalloc.get_traced_memory()[1] < total + size / 2
    finally:
        tracemalloc.stop()
    assert all(torch.equal(state.optimizer[name], one) for name, one in moments.items())


@pytest.mark.slow
def test_parts_above_two_gib_are_written_by_a_bucket_s_server_and_read_back(bucket_url: str) -> None:
    """No count of bytes on the way has 31 bits, nor 32."""
    store = open_store(bucket_url)
    writer = Writer(store, RUN, "0" * 64, "0" * 64)
    writer.claim(0, 0)
    state = {"a": torch.arange((2 << 30) // 4 + 5, dtype=torch.float32), "b": torch.ones(3)}
    part = writer.upload(f"step-00000001/{ADAPTER}", Buffers(tensors_to_buffers(state)))
    writer.append("checkpoint", 0, 1, (part,))
    assert part.bytes > 2**31
    back = tensors_in(read_large_part(store, RUN, part))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], one) for name, one in state.items())


def test_an_evaluated_state_is_never_replaced_by_a_newer_one(
    store: Gate, saver: Saver, question: Question
) -> None:
    hold_the_first(store, saver, question)
    for step, score in ((2, 0.5), (3, None), (4, 0.25), (5, None), (6, None)):
        saver.offer(snapshot(question, step, score))
    store.open.set()
    assert saver.drain(PATIENCE_S)
    assert committed(store) == [(1, None), (2, 0.5), (4, 0.25), (6, None)]


def test_of_many_evaluated_states_that_wait_the_best_and_the_newest_stay(
    store: Gate, saver: Saver, question: Question
) -> None:
    hold_the_first(store, saver, question)
    for step in range(2, 12):
        saver.offer(snapshot(question, step, 0.9 if step == 3 else step / 100))
    store.open.set()
    assert saver.drain(PATIENCE_S)
    steps = [step for step, _ in committed(store)]
    assert len(steps) == 5
    assert {3, 11} < set(steps)


def test_what_is_committed_is_what_was_offered(store: Gate, saver: Saver, question: Question) -> None:
    saver.offer(snapshot(question, 7))
    assert saver.drain(PATIENCE_S)
    state = read_saved(store, RUN, saver._writer.log[-1]).state()
    assert state.progress == Progress(step=7)
    assert torch.equal(state.adapter["weight"], torch.full((3,), 7.0))
    assert torch.equal(state.optimizer["exp_avg.weight"], torch.full((3,), 7.0))
    assert saver.upload_seconds > 0


def test_offering_does_not_wait_for_the_bucket(store: Gate, saver: Saver, question: Question) -> None:
    hold_the_first(store, saver, question)  # would hang if it waited
    saver.offer(snapshot(question, 2))
    assert not saver.drain(0.05)
    assert committed(store) == []


def test_the_same_step_with_and_without_a_score_has_parts_of_its_own(
    store: Gate, saver: Saver, question: Question
) -> None:
    saver.offer(snapshot(question, 5))
    assert saver.drain(PATIENCE_S)
    saver.offer(snapshot(question, 5, 0.5))
    assert saver.drain(PATIENCE_S)
    for entry in saver._writer.log[1:]:
        read_saved(store, RUN, entry)  # raises when the second overwrote the first
    assert committed(store) == [(5, None), (5, 0.5)]


def test_a_writer_that_was_fenced_ends_and_writes_no_entry(
    store: Gate, saver: Saver, question: Question
) -> None:
    Writer(store, RUN, "0" * 64, "0" * 64).claim(0, 0)
    saver.offer(snapshot(question, 1))
    with pytest.raises(Fenced):
        saver.drain(PATIENCE_S)
    assert isinstance(saver.failure, Fenced)
    assert committed(store) == []


def test_a_claim_by_another_is_noticed_while_nothing_is_saved(
    store: Gate, saver: Saver, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emotion_train.runs.saver._LOOK_EVERY_S", 0.05)
    fenced = threading.Event()
    saver.on_fenced = fenced.set
    saver.offer(snapshot(question, 1))
    assert saver.drain(PATIENCE_S)
    assert not fenced.wait(0.5)  # its own entries are no other writer's
    Writer(store, RUN, "0" * 64, "0" * 64).claim(0, 1)
    assert fenced.wait(PATIENCE_S)
    with pytest.raises(Fenced):
        saver.check()


def test_an_entry_whose_answer_was_lost_is_found_between_two_saves_and_fences_nobody(
    store: Gate, saver: Saver, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, create = saver._writer, store.create

    def loses_its_answer(key: str, data: bytes) -> None:
        create(key, data)
        raise StorageError("the answer was lost")

    monkeypatch.setattr(store, "create", loses_its_answer)
    with pytest.raises(StorageError):
        writer.append("note", 0, 3, (), {"note": "one"})
    monkeypatch.setattr(store, "create", create)
    writer.require_ownership()
    assert [entry.step for entry in writer.log] == [0, 3]
    writer.require_ownership()
    assert writer.append("note", 0, 3, (), {"note": "one"}).seq == 1  # not twice
    assert [entry.seq for entry in read_log(store, RUN)] == [0, 1]


def wait_until_kept(local: LocalStates, steps: list[int]) -> list[Entry]:
    """The states in the local folder, once they are these."""
    eventually(lambda: [entry.step for entry in local.entries()] == steps)
    return local.entries()


def test_what_a_failing_bucket_does_not_take_waits_on_this_machine_until_it_does(
    store: Gate, saver: Saver, question: Question, tmp_path: Path, told: list[str]
) -> None:
    local = LocalStates(tmp_path / "local", RUN)
    store.failing = "The network is gone."
    saver.offer(snapshot(question, 1, 0.5))
    saver.offer(snapshot(question, 2))
    wait_until_kept(local, [1, 2])
    saver.offer(snapshot(question, 3))
    newest = wait_until_kept(local, [1, 3])[-1]
    assert torch.equal(read_saved(local.store, RUN, newest).state().adapter["weight"], torch.full((3,), 3.0))
    assert [
        line
        for line in told
        if "NOT SAVED" in line and "The network is gone." in line and str(local.folder) in line
    ] == told[:1]
    store.failing = None
    assert saver.drain(PATIENCE_S)
    assert committed(store) == [(1, 0.5), (3, None)]
    assert saver.problem is None
    eventually(lambda: not local.in_use)
    assert "takes checkpoints again" in told[-1]


def test_a_failed_attempt_is_told_of_again_and_again_but_not_more_often_than_once_a_minute(
    store: Gate, saver: Saver, question: Question, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from emotion_train.storage import patience

    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(patience, "TELL_EVERY_S", 0.5)
    store.failing = "The disk is full."
    began = time.monotonic()
    saver.offer(snapshot(question, 1))
    eventually(lambda: len(told) >= 3)
    lines = len(told)
    assert time.monotonic() - began >= (lines - 1) * 0.5


def test_a_local_folder_that_cannot_be_written_is_said_and_ends_nothing(
    store: Gate, question: Question, tmp_path: Path, told: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    writer = Writer(store, RUN, "0" * 64, "0" * 64)
    writer.claim(0, 0)
    store.failing = "The bucket is gone."
    with Saver(writer, LocalStates(tmp_path / "file" / "local", RUN), told.append) as saver:
        saver.offer(snapshot(question, 1))
        eventually(lambda: bool(told))
        assert "cannot be kept on this machine either" in told[0]
        store.failing = None
        assert saver.drain(PATIENCE_S)
    assert committed(store) == [(1, None)]


def test_a_local_state_that_was_cut_off_is_not_taken_for_whole(question: Question, tmp_path: Path) -> None:
    local = LocalStates(tmp_path, RUN)
    local.keep([snapshot(question, 1)], 0)
    (local.folder / "step-00000001" / "optimizer.safetensors").unlink()
    (entry,) = local.entries()
    with pytest.raises(StorageError):
        read_saved(local.store, RUN, entry)
    (local.folder / "step-00000001.json").write_text("{")
    assert local.entries() == []


def test_a_local_state_that_another_process_removes_meanwhile_is_passed_over(
    question: Question, tmp_path: Path
) -> None:
    local = LocalStates(tmp_path, RUN)
    local.keep([snapshot(question, 1), snapshot(question, 2)], 0)
    listed = list(local.store.list(f"{RUN}/"))
    local.keep([snapshot(question, 2)], 0)
    local.store.list = lambda prefix="": iter(listed)  # type: ignore[method-assign]
    assert [entry.step for entry in local.entries()] == [2]


def test_clearing_up_that_fails_is_said_and_ends_nothing(
    store: Gate, question: Question, tmp_path: Path, told: list[str]
) -> None:
    def refuse() -> None:
        raise StorageError("No permission to delete.")

    writer = Writer(store, RUN, "0" * 64, "0" * 64)
    writer.claim(0, 0)
    with Saver(writer, LocalStates(tmp_path / "local", RUN), told.append, refuse) as saver:
        for step in (1, 2):
            saver.offer(snapshot(question, step))
            assert saver.drain(PATIENCE_S)
    assert committed(store) == [(1, None), (2, None)]
    assert "No permission to delete." in told[0]


@pytest.mark.gpu
def test_a_copy_from_a_gpu_is_whole_when_it_returns_and_stays_as_it_was() -> None:
    tensors = {str(number): torch.full((1 << 20,), float(number), device="cuda") for number in range(64)}
    copies = host_copy(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    torch.cuda.synchronize()
    for name, copied in copies.items():
        assert copied.is_pinned()
        assert torch.equal(copied, torch.full((1 << 20,), float(name)))
