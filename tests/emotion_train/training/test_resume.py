"""Where a run goes on: after its newest state that verifies, in the middle of an epoch, and after a
notice that the machine goes.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from emotion_train import cli
from emotion_train.config import Config
from emotion_train.errors import Fenced, ObjectChanged, Preempted, StorageError, WrongRequest
from emotion_train.model.load import read_config
from emotion_train.model.lora import adapter_state
from emotion_train.model.staged_copy import stage
from emotion_train.preparation.steps import prepare
from emotion_train.processes.interruption import Interruptions
from emotion_train.processes.notices import Notice
from emotion_train.processes.ranks import Ranks
from emotion_train.runs import checkpoint
from emotion_train.runs.checkpoint import Progress
from emotion_train.runs.local_states import LocalStates
from emotion_train.runs.log import Entry, Metrics, Writer, read_log, upload_part
from emotion_train.runs.saver import Committed
from emotion_train.storage import second_look
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.training import engines as distributed
from emotion_train.training import ledger, start
from emotion_train.training import trainer as trainer_page
from emotion_train.training.claim import claim, look_before_claiming
from emotion_train.training.job import Claimed, Job, local_folder
from emotion_train.training.start import require_fp8
from emotion_train.training.trainer import Trainer
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import job_of, start_trainer, tiny_config, tiny_words

Kind = Literal["rebalance", "terminate", "sigterm", "sigint"]
STEPS = 14  # of a whole tiny run
EACH_STEP = "checkpoint.every_seconds=0.000001"
WORDS = ["lora.dropout=0.1", "lora.targets=[q_proj,v_proj]", "evaluation.every_steps=5"]


class Machine:
    """Gives a notice once training has come to a step, and takes it back after a while if told
    to.
    """

    def __init__(self) -> None:
        self.now: Notice | None = None

    def __call__(self) -> Notice | None:
        return self.now

    def speaks_at(self, trainer: Trainer, step: int, kind: Kind, validating: bool = False) -> None:
        def tell(progress: checkpoint.Progress, words: str) -> None:
            if progress.step == step and words.startswith("validating") == validating and self.now is None:
                self.now = Notice(kind, "The machine goes", None, 1)

        trainer.tell = tell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_config(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Trainer:
    """A run that nothing stopped."""
    with ExitStack() as stack:
        trainer = start_trainer(tiny_config(folder, "run.id=whole", *WORDS), stack)
        trainer.fit()
        drain(trainer)
        return trainer


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def machine() -> Machine:
    return Machine()


def drain(trainer: Trainer) -> None:
    assert trainer.saver is not None
    assert trainer.saver.drain(PATIENCE_S)


def log(folder: Path, run_id: str) -> list[Entry]:
    return read_log(open_store(str(folder / "runs")), run_id)


def checkpoints(folder: Path, run_id: str) -> list[Entry]:
    return [entry for entry in log(folder, run_id) if entry.kind == "checkpoint"]


def same(one: Trainer, other: Trainer) -> None:
    """Both ended with the same adapter, bit for bit, and the same account of their way."""
    assert one.progress.step == other.progress.step == STEPS
    for name, tensor in adapter_state(other.bare_model).items():
        assert torch.equal(adapter_state(one.bare_model)[name], tensor), name
    assert one.progress.history == other.progress.history
    counted = ("examples", "tokens", "computed_tokens", "bad_rows")
    assert [getattr(one.progress, name) for name in counted] == [
        getattr(other.progress, name) for name in counted
    ]


def stop_when(trainer: Trainer, over: Callable[[], bool]) -> None:
    """Train until that is true, and stop as a kill would, after what was offered is committed."""

    class Killed(Exception):
        pass

    def tell(progress: object, words: str) -> None:
        if over():
            raise Killed

    trainer.tell = tell
    with pytest.raises(Killed):
        trainer.fit()
    drain(trainer)


def stopped_at(folder: Path, run_id: str, step: int, *words: str) -> None:
    """A run that was saved after each step and killed after that one."""
    with ExitStack() as stack:
        trainer = start_trainer(tiny_config(folder, f"run.id={run_id}", EACH_STEP, *WORDS, *words), stack)

        def over() -> bool:
            drain(trainer)  # else the newest would win, and not every step be in the log
            return trainer.progress.step > step

        stop_when(trainer, over)


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_not_been(
    folder: Path, whole: Trainer, stack: ExitStack
) -> None:
    for step in (3, 9, 12):
        stopped_at(folder, "middle", step)
        assert checkpoints(folder, "middle")[-1].step == step
    resumed = start_trainer(tiny_config(folder, "run.id=middle", *WORDS), stack)
    assert resumed.progress.step == 12
    resumed.fit()
    same(resumed, whole)


def test_each_save_costs_a_stall_that_is_part_of_the_training_time(folder: Path, stack: ExitStack) -> None:
    trainer = start_trainer(tiny_config(folder, "run.id=stall", EACH_STEP, "train.epochs=1"), stack)
    began = time.perf_counter()
    trainer.fit()
    elapsed = time.perf_counter() - began
    drain(trainer)
    assert trainer.progress.saves >= 7
    assert 0.5 * elapsed < trainer.progress.train_seconds + trainer.progress.evaluation_seconds < elapsed
    assert 0 < trainer.progress.stall_seconds < trainer.progress.train_seconds
    assert trainer.upload_seconds() > 0
    again = start_trainer(tiny_config(folder, "run.id=stall", EACH_STEP, "train.epochs=1"), stack)
    assert again.progress.saves == trainer.progress.saves - 1  # a state does not count its own copy
    assert 0 < again.upload_seconds() < trainer.upload_seconds()


def test_checkpoints_come_by_steps_too(folder: Path, stack: ExitStack) -> None:
    words = ["run.id=by-steps", *WORDS, "checkpoint.every_seconds=null", "checkpoint.every_steps=3"]
    trainer = start_trainer(tiny_config(folder, *words), stack)
    trainer.tell = lambda progress, words: drain(trainer)
    trainer.fit()
    drain(trainer)
    found = [(entry.step, "macro_f1" in entry.metrics) for entry in checkpoints(folder, "by-steps")]
    assert found == [
        (3, False),
        (5, True),
        (6, False),
        (7, True),
        (9, False),
        (10, True),
        (12, False),
        (14, True),
    ]


def damage(folder: Path, run_id: str, entry: Entry, name: str) -> None:
    path = folder / "runs" / run_id / next(part.key for part in entry.parts if part.key.endswith(name))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_a_checkpoint_that_does_not_verify_is_passed_over_and_that_is_recorded(
    folder: Path, whole: Trainer, stack: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_at(folder, "damaged", 8)
    saved = checkpoints(folder, "damaged")
    damage(folder, "damaged", saved[-1], "optimizer.safetensors")
    missing = next(part.key for part in saved[-2].parts if part.key.endswith("adapter.safetensors"))
    (folder / "runs" / "damaged" / missing).unlink()
    resumed = start_trainer(tiny_config(folder, "run.id=damaged", *WORDS), stack)
    assert resumed.progress.step == saved[-3].step == 7
    notes = [entry for entry in log(folder, "damaged") if entry.kind == "note"]
    assert [
        f"{entry.seq:08d}" in str(note.metrics["words"])
        for entry, note in zip(saved[:-3:-1], notes, strict=True)
    ] == [True, True]
    assert "sha256" in str(notes[0].metrics["words"])
    assert "passed over" in capsys.readouterr().err
    resumed.fit()
    same(resumed, whole)


@pytest.mark.parametrize(
    "failure",
    [
        StorageError("The network is gone.", transient=True),
        StorageError("No permission for GetObject."),
        ObjectChanged("It has changed."),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_store_that_does_not_answer_is_no_reason_to_fall_back(folder: Path, failure: StorageError) -> None:
    stopped_at(folder, "silent", 2)

    def read(entry: Entry) -> Entry:
        raise failure

    told: list[str] = []
    with pytest.raises(StorageError, match=str(failure)):
        checkpoint.newest(log(folder, "silent"), read, told.append)
    assert not told


def test_a_state_is_a_copy_that_later_steps_do_not_change(folder: Path, stack: ExitStack) -> None:
    trainer = start_trainer(tiny_config(folder, "run.id=copy", *WORDS), stack)
    stop_when(trainer, lambda: trainer.progress.step == 6)
    state = trainer.state()
    before = pickle.dumps(
        (
            state.progress,
            {name: tensor.numpy() for name, tensor in {**state.adapter, **state.optimizer}.items()},
        )
    )
    trainer.tell = lambda progress, words: None
    trainer.fit()
    after = pickle.dumps(
        (
            state.progress,
            {name: tensor.numpy() for name, tensor in {**state.adapter, **state.optimizer}.items()},
        )
    )
    assert after == before


@pytest.mark.parametrize("every", [*(pytest.param(one, marks=pytest.mark.slow) for one in (1, 2)), 3])
def test_the_trackers_get_the_mean_loss_of_each_stretch_at_its_last_step(
    folder: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Evaluations at 5, 7, 10 and 14 cut stretches off; what is on its way then arrives first."""
    monkeypatch.setattr(trainer_page, "_LOG_EVERY_STEPS", every)
    trainer = start_trainer(tiny_config(folder, f"run.id=tracked-{every}", *WORDS), stack)
    losses: list[float] = []
    logged: list[tuple[int, float, float]] = []
    arrive = trainer.ledger._arrive

    def log(values: dict[str, float], step: int) -> None:
        if "train/loss" in values:
            logged.append((step, values["train/loss"], values["train/learning_rate"]))

    def listen(stretch: ledger._Stretch) -> list[float]:
        losses.extend(stretch.losses.tolist())
        return arrive(stretch)

    monkeypatch.setattr(trainer.trackers, "log", log)
    monkeypatch.setattr(trainer.ledger, "_arrive", listen)
    trainer.fit()
    assert [step for step, *_ in logged] == list(range(every, STEPS + 1, every))
    ends = sorted({0, 5, 7, 10, *range(0, STEPS + 1, every)})
    for step, loss, rate in logged:
        first = max(end for end in ends if end < step)
        assert loss == pytest.approx(sum(losses[first:step]) / (step - first))
        assert rate == trainer._rate_after(step)


def test_the_training_loss_of_an_evaluation_is_the_mean_of_the_steps_since_the_last_one(
    folder: Path, stack: ExitStack
) -> None:
    trainer = start_trainer(tiny_config(folder, "run.id=losses", *WORDS), stack)
    losses: list[float] = []
    add_up = trainer.ledger.add_up

    def listen(all_but: int = 0) -> list[float]:
        arrived = add_up(all_but)
        losses.extend(arrived)
        return arrived

    trainer.ledger.add_up = listen  # type: ignore[method-assign]
    trainer.fit()
    assert len(losses) == STEPS
    first = 0
    for one in trainer.progress.history:
        last = int(one["step"] or 0)
        assert one["train_loss"] == pytest.approx(sum(losses[first:last]) / (last - first))
        first = last


def test_dropout_is_another_one_for_each_seed_and_step_and_the_same_on_each_rank(folder: Path) -> None:
    keys = []
    for seed in (0, 1):
        with ExitStack() as stack:
            trainer = start_trainer(tiny_config(folder, f"run.id=dropout-{seed}", f"run.seed={seed}"), stack)
            for trainer.progress.step, trainer.ranks.rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
                keys.append(trainer._dropout_key)
    assert keys[0::2] == keys[1::2]
    assert len(set(keys)) == 4


def test_a_run_of_which_no_checkpoint_verifies_is_not_begun_anew(folder: Path, stack: ExitStack) -> None:
    stopped_at(folder, "lost", 2)
    for entry in checkpoints(folder, "lost"):
        damage(folder, "lost", entry, "state.json")
    before = log(folder, "lost")
    with pytest.raises(WrongRequest, match="None of the 2 checkpoints"):
        start_trainer(tiny_config(folder, "run.id=lost", *WORDS), stack)
    assert log(folder, "lost") == before


def test_the_best_checkpoint_gives_way_to_the_next_best_when_it_does_not_verify(
    folder: Path, stack: ExitStack
) -> None:
    trainer = start_trainer(tiny_config(folder, "run.id=best", *WORDS, "checkpoint.keep_every=1"), stack)
    trainer.fit()
    drain(trainer)
    store, entries, told = open_store(str(folder / "runs")), log(folder, "best"), list[str]()
    scores = {
        entry.seq: float(entry.metrics["macro_f1"] or 0) for entry in entries if "macro_f1" in entry.metrics
    }
    ranked = sorted(scores, key=lambda seq: (-scores[seq], seq))
    first = checkpoint.best_adapter(store, "best", entries, told.append)
    assert first is not None
    assert first[0].seq == ranked[0]
    assert not told
    damage(folder, "best", first[0], "adapter.safetensors")
    second = checkpoint.best_adapter(store, "best", entries, told.append)
    assert second is not None
    assert second[0].seq == ranked[1]
    assert len(told) == 1


def test_what_an_older_writer_commits_before_the_claim_is_gone_on_from(
    folder: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = start_trainer(tiny_config(folder, "run.id=late", *WORDS, "checkpoint.every_seconds=null"), stack)
    stop_when(old, lambda: old.progress.step == 2)
    assert not checkpoints(folder, "late")
    claim = Writer.claim

    def late(writer: Writer, epoch: int, step: int, facts: Metrics) -> Entry:
        old._save({})
        drain(old)
        return claim(writer, epoch, step, facts)

    monkeypatch.setattr(Writer, "claim", late)
    assert start_trainer(tiny_config(folder, "run.id=late", *WORDS), stack).progress.step == 2


def test_a_run_that_another_writer_published_before_the_claim_is_left_as_it_is(folder: Path) -> None:
    config = tiny_config(folder, "run.id=overtaken")
    job = job_of(config)
    other = Writer(job.output_store, "overtaken", "0" * 64, "0" * 64)
    other.claim(0, 0)
    final = other.append("final", 0, 0)
    before = log(folder, "overtaken")
    assert claim(job) == final
    assert log(folder, "overtaken") == before


def test_a_run_that_was_published_of_another_data_set_is_not_taken_for_this_one(folder: Path) -> None:
    config = tiny_config(folder, "run.id=done")
    job = job_of(config)
    for index_sha256 in (job.index.sha256(), "0" * 64):
        writer = Writer(job.output_store, f"done-{index_sha256[:4]}", index_sha256, config.sha256())
        writer.claim(0, 0)
        final = writer.append("final", 0, 0)
        own = tiny_config(folder, f"run.id=done-{index_sha256[:4]}")
        if index_sha256 == job.index.sha256():
            assert look_before_claiming(own, job.index, job.output_store, False).final == final
        else:
            with pytest.raises(WrongRequest, match=r"is published and was trained on another data set"):
                look_before_claiming(own, job.index, job.output_store, False)


def test_a_run_that_has_saved_nothing_yet_is_not_taken_over_with_another_data_set(folder: Path) -> None:
    config = tiny_config(folder, "run.id=young")
    job = job_of(config)
    Writer(job.output_store, "young", job.index.sha256(), config.sha256()).claim(0, 0)
    assert look_before_claiming(config, job.index, job.output_store, False) == (None, True, False)
    Writer(job.output_store, "young", "0" * 64, config.sha256()).claim(0, 0)
    before = log(folder, "young")
    with pytest.raises(WrongRequest, match=r"may be at work: its index differs.*another run\.id"):
        look_before_claiming(config, job.index, job.output_store, False)
    assert log(folder, "young") == before


def publish_as(config: Config) -> tuple[Job, Entry]:
    """The job, and a final entry whose report says that this config trained it."""
    job = job_of(config)
    writer = Writer(job.output_store, job.run_id, job.index.sha256(), config.sha256())
    writer.claim(0, 2)
    report = json.dumps({"identity": {"config": config.model_dump(mode="json")}}).encode()
    key = f"final/{writer.incarnation:08d}/report.json"
    return job, writer.append("final", 0, 2, (upload_part(job.output_store, job.run_id, key, report),))


@pytest.mark.parametrize(
    "change",
    ["train.epochs=3", "train.learning_rate=0.02", "lora.r=2", "run.seed=7", "train.warmup_ratio=0.5"],
)
def test_a_published_run_is_not_taken_for_the_result_of_another_request(folder: Path, change: str) -> None:
    name = f"done-{change.partition('=')[0]}"
    config = tiny_config(folder, f"run.id={name}", *WORDS)
    job, final = publish_as(config)
    other = tiny_config(folder, f"run.id={name}", *WORDS, change)
    with pytest.raises(
        WrongRequest, match=rf"{change.partition('=')[0]} \(was .*another run\.id to start a new run"
    ):
        look_before_claiming(other, job.index, job.output_store, False)
    job.output_store.delete(f"{name}/{final.parts[0].key}")  # then nothing says how it was made
    assert look_before_claiming(other, job.index, job.output_store, False).final == final


def test_a_published_run_is_found_again_from_another_machine(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(folder, "run.id=moved", *WORDS)
    job, final = publish_as(config)
    elsewhere = ("train.tokens_per_microbatch=256", "checkpoint.every_steps=3", f"model.base={folder}/other")
    other = tiny_config(folder, "run.id=moved", *WORDS, *elsewhere)
    capsys.readouterr()
    assert look_before_claiming(other, job.index, job.output_store, False).final == final
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "published with another model.base (was" in told[0]


def test_what_may_differ_between_two_starts_is_noted_and_what_may_not_is_refused_before_the_claim(
    folder: Path, stack: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_at(folder, "noted", 2)
    other = tiny_config(folder, "run.id=noted", *WORDS)
    job = job_of(other)
    Writer(job.output_store, "noted", job.index.sha256(), other.sha256()).claim(0, 2, facts={"processes": 3})
    capsys.readouterr()
    start_trainer(tiny_config(folder, "run.id=noted", *WORDS, "train.tokens_per_microbatch=256"), stack)
    words = capsys.readouterr().err
    assert "continued with another train.tokens_per_microbatch (was 512, is 256)" in words
    assert "continued on another number of processes (was 3, is 1)" in words
    before = log(folder, "noted")
    for change in (
        "data.max_length=64",
        "lora.r=2",
        "lora.targets=all-linear",
        "loss.class_weights=none",
        "run.seed=1",
        "train.epochs=3",
        "train.global_batch_size=8",
    ):
        name = change.partition("=")[0]
        with pytest.raises(WrongRequest, match=f"different now: {name} ") as caught:
            start_trainer(tiny_config(folder, "run.id=noted", *WORDS, change), stack)
        assert caught.value.exit_code == 2
    assert log(folder, "noted") == before


MISSHAPEN = [
    b"[" * 100_000,
    b"[]",
    b"{}",
    b'{"progress": 1, "config": {}, "labels": []}',
    b'{"progress": {"step": "many"}, "config": {}, "labels": []}',
    b'{"progress": {"step": -1}, "config": {}, "labels": []}',
    b'{"progress": {}, "config": [], "labels": []}',
    b'{"progress": {}, "config": {"run": 1}, "labels": []}',
    b'{"progress": {}, "config": {}, "labels": 1}',
]


@pytest.mark.parametrize("content", MISSHAPEN, ids=range(len(MISSHAPEN)))
def test_a_state_that_is_not_one_is_refused_although_its_sha256_is_right(
    folder: Path, content: bytes
) -> None:
    store = open_store(str(folder / "runs"))
    writer = Writer(store, "misshapen", "0" * 64, "0" * 64)
    writer.claim(0, 0)
    entry = writer.append("checkpoint", 0, 1, (writer.upload("step-1/state.json", content),))
    with pytest.raises(StorageError, match=r"state\.json"):
        checkpoint.read_document(store, "misshapen", entry)


def test_another_writer_ends_the_run_at_the_next_step(folder: Path, stack: ExitStack) -> None:
    config = tiny_config(folder, "run.id=fenced", EACH_STEP, "train.epochs=50")
    trainer = start_trainer(config, stack)
    store = open_store(str(folder / "runs"))

    def tell(progress: checkpoint.Progress, words: str) -> None:
        if progress.step == 3 and not words:
            Writer(store, "fenced", trainer.index.sha256(), config.sha256()).claim(0, 0)
        if progress.step > 3:
            time.sleep(0.05)

    trainer.tell = tell
    with pytest.raises(Fenced):
        trainer.fit()
    assert trainer.progress.step < 100
    entries = log(folder, "fenced")
    claim = max(entry.seq for entry in entries if entry.kind == "claim")
    assert claim == len(entries) - 1


@pytest.mark.parametrize("kind", ["sigterm", pytest.param("sigint", marks=pytest.mark.slow), "terminate"])
def test_a_run_that_must_go_saves_the_step_it_is_at_and_leaves_with_33(
    folder: Path, whole: Trainer, stack: ExitStack, machine: Machine, kind: Kind
) -> None:
    words = [f"run.id={kind}", *WORDS]
    trainer = start_trainer(tiny_config(folder, *words, "checkpoint.every_seconds=null"), stack, machine)
    machine.speaks_at(trainer, 8, kind)
    assert trainer.saver is not None
    commit = trainer.saver._commit

    def slowly(snapshot: checkpoint.Snapshot) -> None:
        time.sleep(0.5)
        commit(snapshot)

    trainer.saver._commit = slowly  # type: ignore[method-assign]
    with pytest.raises(Preempted, match="Step 8 of 14 is saved") as ended:
        trainer.fit()
    assert ended.value.exit_code == 33
    assert [entry.step for entry in checkpoints(folder, kind)] == [5, 7, 8]
    resumed = start_trainer(tiny_config(folder, *words), stack)
    resumed.fit()
    same(resumed, whole)


def test_a_run_that_must_go_while_it_evaluates_repeats_the_evaluation(
    folder: Path, whole: Trainer, stack: ExitStack, machine: Machine
) -> None:
    words = ["run.id=evaluating", *WORDS]
    trainer = start_trainer(tiny_config(folder, *words, "checkpoint.every_seconds=null"), stack, machine)
    machine.speaks_at(trainer, 10, "sigterm", validating=True)
    with pytest.raises(Preempted, match="Step 10 of 14"):
        trainer.fit()
    assert [(entry.step, "macro_f1" in entry.metrics) for entry in checkpoints(folder, "evaluating")] == [
        (5, True),
        (7, True),
        (10, False),
    ]
    resumed = start_trainer(tiny_config(folder, *words), stack)
    resumed.fit()
    same(resumed, whole)
    drain(resumed)
    assert [(entry.step, "macro_f1" in entry.metrics) for entry in checkpoints(folder, "evaluating")][3:] == [
        (10, True),
        (14, True),
    ]


def test_a_rebalance_notice_saves_and_trains_on(
    folder: Path, whole: Trainer, stack: ExitStack, machine: Machine
) -> None:
    trainer = start_trainer(
        tiny_config(folder, "run.id=rebalance", *WORDS, "checkpoint.every_seconds=null"), stack, machine
    )
    machine.speaks_at(trainer, 3, "rebalance")
    trainer.fit()
    drain(trainer)
    assert [entry.step for entry in checkpoints(folder, "rebalance")] == [3, 5, 7, 10, 14]
    same(trainer, whole)


@pytest.mark.parametrize("validating", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_termination_that_is_withdrawn_is_waited_for_and_training_goes_on(
    folder: Path, whole: Trainer, stack: ExitStack, machine: Machine, validating: bool
) -> None:
    run_id = f"withdrawn-{validating}"
    config = tiny_config(
        folder, f"run.id={run_id}", *WORDS, "checkpoint.every_seconds=null", "preemption.hold_s=120"
    )
    trainer = start_trainer(config, stack, machine)
    machine.speaks_at(trainer, 5 if validating else 3, "terminate", validating)
    saved: list[int] = []

    def listen() -> Notice | None:
        found = checkpoints(folder, run_id)
        if machine.now is not None and found and found[-1].step in (3, 5):  # it has heard, and saved
            saved.append(found[-1].step)
            if len(saved) > 2:
                machine.now = None
                trainer.tell = lambda progress, words: None
        return machine.now

    trainer.interruptions._notice = listen
    trainer.fit()
    assert saved
    same(trainer, whole)


def test_sigint_ends_a_hold_at_once(folder: Path, stack: ExitStack, machine: Machine) -> None:
    config = tiny_config(folder, "run.id=impatient", *WORDS, "preemption.hold_s=120")
    trainer = start_trainer(config, stack, machine)
    machine.speaks_at(trainer, 2, "sigterm")
    began = time.monotonic()

    def listen() -> Notice | None:
        if machine.now is not None and any(entry.step == 2 for entry in checkpoints(folder, "impatient")):
            return Notice("sigint", "Ctrl-C", None, 2)
        return machine.now

    trainer.interruptions._notice = listen
    with pytest.raises(Preempted):
        trainer.fit()
    assert time.monotonic() - began < 100


def test_a_pause_ends_when_the_machine_goes_and_not_for_a_rebalance(machine: Machine) -> None:
    waiting = Interruptions(Ranks(), machine, 0.0, print)
    machine.now = Notice("rebalance", "It may go", None, 1)
    began = time.monotonic()
    waiting.wait(1)
    assert time.monotonic() - began >= 1
    machine.now = Notice("terminate", "It goes", None, 2)
    waiting.wait(120)
    assert time.monotonic() - began < 100


def test_the_hold_lasts_as_long_as_asked(folder: Path, stack: ExitStack, machine: Machine) -> None:
    trainer = start_trainer(
        tiny_config(folder, "run.id=patient", *WORDS, "preemption.hold_s=2"), stack, machine
    )
    machine.speaks_at(trainer, 2, "sigterm")
    heard: list[float] = []

    def listen() -> Notice | None:
        if machine.now is not None:
            heard.append(time.monotonic())
        return machine.now

    trainer.interruptions._notice = listen
    with pytest.raises(Preempted):
        trainer.fit()
    assert 2 <= heard[-1] - heard[0] < 30


def unplug(trainer: Trainer) -> None:
    """From now on the run's store takes nothing."""
    assert trainer.saver is not None
    store = trainer.saver._writer.store
    root = Path(store.url)
    root.rename(root.with_name("runs-gone"))
    root.write_text("")  # a file where the folder was


def plug_in(folder: Path) -> None:
    (folder / "runs").unlink()
    (folder / "runs-gone").rename(folder / "runs")


def test_a_state_that_only_this_machine_has_is_gone_on_from(
    tmp_path: Path, whole: Trainer, stack: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, *WORDS, EACH_STEP, f"checkpoint.local_folder={tmp_path / 'local'}")
    with ExitStack() as first:
        trainer = start_trainer(config, first)
        local = LocalStates(local_folder(config), "tiny")

        class Killed(Exception):
            pass

        def tell(progress: checkpoint.Progress, words: str) -> None:
            if progress.step == 4 and not words:
                drain(trainer)
                unplug(trainer)
            if progress.step == 9 and not words:
                for _ in range(600):
                    if [entry.step for entry in local.entries()][-1:] >= [7]:
                        raise Killed
                    time.sleep(0.05)

        trainer.tell = tell
        with pytest.raises(Killed):
            trainer.fit()
    assert "NOT SAVED, training continues" in capsys.readouterr().err
    plug_in(tmp_path)
    assert checkpoints(tmp_path, "tiny")[-1].step == 3
    kept = [(entry.step, "macro_f1" in entry.metrics) for entry in local.entries()]
    assert (5, True) in kept  # evaluated and not in the log: it may be the best
    resumed = start_trainer(
        tiny_config(tmp_path, *WORDS, f"checkpoint.local_folder={tmp_path / 'local'}"), stack
    )
    assert resumed.progress.step == kept[-1][0] >= 7
    resumed.fit()
    drain(resumed)
    same(resumed, whole)
    assert {(5, True), (7, True), (10, True), (14, True)} <= {
        (entry.step, "macro_f1" in entry.metrics) for entry in checkpoints(tmp_path, "tiny")
    }
    assert not local.in_use


def test_a_local_state_older_than_the_log_or_of_another_question_is_not_gone_on_from(
    folder: Path, tmp_path: Path, stack: ExitStack
) -> None:
    words = ["run.id=elsewhere", *WORDS, f"checkpoint.local_folder={tmp_path / 'local'}"]
    config = tiny_config(folder, *words)
    first = start_trainer(config, stack)
    stop_when(first, lambda: first.progress.step == 6)
    trainer = start_trainer(config, stack)
    assert trainer.progress.step == 5
    local = LocalStates(local_folder(config), "elsewhere")
    older = checkpoint.Snapshot(trainer.state(), 0, trainer.question, {})
    older.state.progress.step = 3
    local.keep([older], 0)
    assert start_trainer(config, stack).progress.step == 5
    other = checkpoint.Question(
        tiny_config(folder, *words, "run.seed=1"), trainer.index, trainer.question.base
    )
    newer = checkpoint.Snapshot(trainer.state(), 0, other, {})
    newer.state.progress.step = 6
    local.keep([newer], 0)
    assert start_trainer(config, stack).progress.step == 5


def test_of_the_states_on_this_machine_only_those_newer_than_the_log_are_put_into_it(
    folder: Path, tmp_path: Path, stack: ExitStack
) -> None:
    """A kill after an older one was put behind a newer one would send the run back to it."""
    words = ["run.id=order", *WORDS, f"checkpoint.local_folder={tmp_path / 'local'}"]
    config = tiny_config(folder, *words)
    stopped_at(folder, "order", 8)
    trainer = start_trainer(config, stack)
    assert trainer.progress.step == 8
    older, newer = (
        checkpoint.Snapshot(trainer.state(), 0, trainer.question, metrics)
        for metrics in ({"macro_f1": 1.0}, {})
    )
    older.state.progress.step, newer.state.progress.step = 6, 10
    LocalStates(local_folder(config), "order").keep([older, newer], 0)
    resumed = start_trainer(config, stack)
    assert resumed.progress.step == 10
    drain(resumed)
    steps = [entry.step for entry in checkpoints(folder, "order")]
    assert steps == sorted(steps)
    assert steps[-1] == 10


def test_a_request_that_is_refused_for_its_folder_fences_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "local"
    local.mkdir()
    config = tiny_config(tmp_path, *WORDS, f"checkpoint.local_folder={local}")
    stranger = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    with pytest.raises(WrongRequest, match="belongs to another user"):
        job_of(config)
    assert read_log(open_store(config.run.output_url), "tiny") == []


def test_a_folder_that_could_keep_no_state_is_refused_before_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    config = tiny_config(tmp_path, *WORDS, f"checkpoint.local_folder={tmp_path / 'file' / 'states'}")
    with pytest.raises(
        WrongRequest, match=r"local_folder is .*states and .*file is no folder; name a folder"
    ):
        job_of(config)
    config = tiny_config(tmp_path, *WORDS, f"checkpoint.local_folder={tmp_path / 'new' / 'states'}")
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(WrongRequest, match="may not be written to"):
            job_of(config)
    assert read_log(open_store(config.run.output_url), "tiny") == []
    job_of(config)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("one process", "needs a GPU with float8 units"),
        ("FSDP2", "needs a GPU with float8 units"),
        ("DeepSpeed ZeRO-3", "know no fp8"),
    ],
)
def test_fp8_that_cannot_be_computed_is_refused(tmp_path: Path, engine: distributed.Kind, words: str) -> None:
    config = tiny_config(tmp_path, *WORDS, "model.precision=fp8")
    with pytest.raises(WrongRequest, match=words):
        require_fp8(config, read_config(config.model.base), engine, torch.device("cpu"))
    plain = tiny_config(tmp_path, *WORDS)
    require_fp8(plain, read_config(plain.model.base), engine, torch.device("cpu"))


def test_fp8_on_a_cpu_is_refused_before_the_run_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, *WORDS)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert cli.main(["train", *tiny_words(tmp_path, *WORDS, "model.precision=fp8")]) == 2
    assert "needs a GPU with float8 units" in capsys.readouterr().err
    assert read_log(open_store(config.run.output_url), "tiny") == []


@pytest.mark.slow  # quicker: storage/test_second_look.py
def test_a_network_that_flips_bits_costs_neither_a_checkpoint_nor_a_word_in_the_log(
    folder: Path, s3: LocalS3, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer to GET in three has a bit flipped: of listings, entries, index, base, posts and
    parts alike.
    """
    monkeypatch.setattr(second_look, "PAUSES_S", (0,) * 6)
    stage(str(folder / "base"), f"{bucket_url}/base")
    prepare(str(folder / "source"), f"{bucket_url}/data")
    words = (
        f"model.base={bucket_url}/base",
        "model.precision=bf16",
        f"data.url={bucket_url}/data",
        f"run.output_url={bucket_url}/runs",
        *WORDS,
        EACH_STEP,
    )
    with ExitStack() as stack:
        calm = start_trainer(tiny_config(folder, "run.id=calm", *words), stack)
        calm.fit()
        drain(calm)
    stopped_at(folder, "noisy", 8, *words)
    with FaultProxy(s3.endpoint) as proxy, ExitStack() as stack:
        proxy.flips_one_in = 3
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        resumed = start_trainer(tiny_config(folder, "run.id=noisy", *words), stack)
        assert resumed.progress.step == 8
        resumed.fit()
        drain(resumed)
    assert proxy.flipped > 10
    same(resumed, calm)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    entries = read_log(open_store(f"{bucket_url}/runs"), "noisy")
    assert {entry.kind for entry in entries} == {"claim", "checkpoint"}
    assert [entry.step for entry in entries if entry.kind == "claim"] == [0, 8]


def test_the_states_that_were_read_are_let_go_once_the_trainer_has_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.epochs=1")
    with ExitStack() as stack:
        start_trainer(config, stack).fit()
    with ExitStack() as stack:
        job = job_of(config)
        claimed = claim(job)
        assert isinstance(claimed, Claimed)
        assert claimed.newest is not None
        trainer = start.start_trainer(job, claimed, stack)
        assert trainer.progress.step == trainer.steps
        assert claimed.newest is None


@pytest.mark.parametrize(
    ("newest", "words"),
    [
        (
            Committed(5, 3 << 30, 41.2),
            "Step 7 is still being uploaded; the 3.0 GiB of step 5 took 41 s. If this machine goes"
            " before, another resumes from step 5.",
        ),
        (
            None,
            "Step 7 is still being uploaded. If this machine goes before, another resumes where this"
            " start did.",
        ),
    ],
)
def test_an_upload_that_may_outlast_the_notice_is_announced(newest: Committed | None, words: str) -> None:
    answers = iter([False, True])
    trainer: Any = object.__new__(Trainer)
    told: list[str] = []
    trainer.saver = SimpleNamespace(
        newest=newest, drain=lambda timeout_s: next(answers), keep_what_waits=lambda: "kept"
    )
    trainer.ledger, trainer.steps = SimpleNamespace(progress=Progress(step=7)), 20
    trainer.tell_milestone = told.append
    assert trainer._wait_until_saved() == "Step 7 of 20 is saved."
    assert told == [words]
