"""The log of a run over a bucket that delays, repeats and loses requests: it never forks, loses or
tears anything.

Hypothesis drives up to three writers and the bucket's weather. The same machine over a bucket that
ignores conditions must find a fork, else it would prove nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from emotion_train.errors import Fenced, StorageError
from emotion_train.runs import log as log_page
from emotion_train.runs.log import Entry, Published, Writer, entry_key
from emotion_train.runs.retention import collect
from emotion_train.storage import s3 as s3_page
from tests.helpers.unreliable_bucket import FAULTS, UnreliableBucket

RUN = "run"
NUMBERS = st.integers(0, 2)
WEATHER = st.lists(st.sampled_from(("none", *FAULTS)), max_size=6)


class RunUnderFaults(RuleBasedStateMachine):
    """Writers come, claim, save, clear away, publish and vanish; what each of them was told is held
    against what the bucket has.
    """

    honours_conditions: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        numbers = itertools.count()
        # Hypothesis repeats a run exactly: neither clock nor chance nor threads may decide
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(log_page, "ThreadPoolExecutor", lambda _: nullcontext(SimpleNamespace(map=map)))
        self.patch.setattr(s3_page, "CREATE_PAUSES_S", (0, 0, 0))
        self.patch.setattr(
            log_page, "secrets", SimpleNamespace(token_hex=lambda size: f"{next(numbers):0{2 * size}x}")
        )
        self.patch.setattr(
            log_page, "datetime", SimpleNamespace(now=lambda _: datetime.fromtimestamp(next(numbers), UTC))
        )

    def teardown(self) -> None:
        self.patch.undo()

    @initialize()
    def a_run_at_work(self) -> None:
        self.bucket = UnreliableBucket(honours_conditions=self.honours_conditions)
        self.waiting: list[Writer] = []  # constructed, and perhaps claimed in vain
        self.writers: list[Writer] = []  # claimed
        self.acknowledged: list[Entry] = []
        self.unanswered: list[tuple[Writer, Any, int, float | None]] = []
        self.saves = 0
        self.start()
        self.claim(0)

    # the bucket

    @rule(faults=WEATHER)
    def weather(self, faults: list[str]) -> None:
        self.bucket.faults.extend(faults)

    @rule()
    def calm(self) -> None:
        self.bucket.faults.clear()

    @rule(count=st.none() | st.integers(1, 3))
    def late_requests_arrive(self, count: int | None) -> None:
        self.bucket.deliver(count)

    # the writers

    @precondition(lambda self: len(self.waiting) < 2)
    @rule()
    def start(self) -> None:
        try:
            self.waiting.append(Writer(self.bucket.store(), RUN, "a" * 64, "b" * 64))
        except StorageError as error:
            expected(error)

    @precondition(lambda self: bool(self.waiting) and len(self.writers) < 3)
    @rule(number=NUMBERS)
    def claim(self, number: int) -> None:
        writer = self.waiting[number % len(self.waiting)]
        try:
            entry = writer.claim(0, self.saves)
        except Published as published:
            self.is_in_log(published.entry)
            self.waiting.remove(writer)
        except StorageError as error:
            expected(error)
        else:
            self.acknowledged.append(entry)
            assert list(writer.entries) == self.log()[: entry.seq]
            assert not [one for one in writer.entries if one.kind == "final"]
            self.waiting.remove(writer)
            self.writers.append(writer)

    @precondition(lambda self: bool(self.writers))
    @rule(
        number=NUMBERS,
        scores=st.lists(st.sampled_from([None, 0.1, 0.2, 0.3]), min_size=1, max_size=5),
        faults=WEATHER,
    )
    def save(self, number: int, scores: list[float | None], faults: list[str]) -> None:
        writer = self.writers[number % len(self.writers)]
        for macro_f1 in scores:
            self.saves += 1
            if writer in self.writers:
                self.commit(writer, "checkpoint", self.saves, macro_f1, faults)

    @precondition(lambda self: bool(self.writers) and self.saves > 5)
    @rule(number=NUMBERS, kind=st.sampled_from(["note", "note", "final"]))
    def say(self, number: int, kind: str) -> None:
        self.saves += 1
        self.commit(self.writers[number % len(self.writers)], kind, self.saves, None)

    @precondition(lambda self: bool(self.unanswered))
    @rule(number=NUMBERS)
    def save_again_what_was_not_answered(self, number: int) -> None:
        writer, kind, step, macro_f1 = self.unanswered.pop(number % len(self.unanswered))
        if writer in self.writers:
            self.commit(writer, kind, step, macro_f1)

    def commit(
        self, writer: Writer, kind: Any, step: int, macro_f1: float | None, faults: Iterable[str] = ()
    ) -> None:
        before = self.log()
        try:
            names = ("adapter", "state") if kind != "note" else ()
            parts = tuple(writer.upload(f"step/{name}", f"{name} {step}".encode()) for name in names)
            self.bucket.faults.extend(faults)
            entry = writer.append(kind, 0, step, parts, {"macro_f1": macro_f1})
        except Fenced:
            assert self.newest_claim().nonce != writer.nonce, "fenced, and nobody else had claimed"
            self.writers.remove(writer)
        except StorageError as error:
            expected(error)
            self.unanswered.append((writer, kind, step, macro_f1))
        else:
            self.acknowledged.append(entry)
            assert (entry.kind, entry.step) == (kind, step) or entry.kind == "final"
            assert entry in before or self.newest_claim().nonce == writer.nonce, "a fenced writer was let in"
            if entry.kind == "final":
                self.writers.remove(writer)

    @precondition(lambda self: bool(self.writers))
    @rule(number=NUMBERS, keep_every=st.none() | st.integers(2, 4))
    def clear_away(self, number: int, keep_every: int | None) -> None:
        try:
            collect(self.writers[number % len(self.writers)], keep_every)
        except StorageError as error:
            expected(error)

    @precondition(lambda self: bool(self.writers))
    @rule(number=NUMBERS)
    def kill(self, number: int) -> None:
        self.writers.pop(number % len(self.writers))

    # what must hold at every moment

    @invariant()
    def the_log_is_one_chain(self) -> None:
        claim = None
        for seq, entry in enumerate(self.log()):
            claim = entry if entry.kind == "claim" else claim
            assert claim is not None
            assert entry.seq == seq
            assert (entry.incarnation, entry.nonce) == (
                claim.seq,
                claim.nonce,
            ), f"entry {seq} is of a fenced writer: a fork"

    @invariant()
    def what_was_acknowledged_is_there_once(self) -> None:
        log = self.log()
        for entry in self.acknowledged:
            assert entry.seq < len(log), "an acknowledged entry is lost"
            assert log[entry.seq] == entry, "an acknowledged entry was overwritten"
        saved = [entry.step for entry in log if entry.kind != "claim"]
        assert len(saved) == len(set(saved)), "an entry was repeated"

    @invariant()
    def the_checkpoints_one_needs_are_whole(self) -> None:
        log = self.log()
        checkpoints = [entry for entry in log if entry.kind == "checkpoint"]
        scores = [float(entry.metrics["macro_f1"] or 0) for entry in checkpoints]
        best = checkpoints[scores.index(max(scores))] if any(scores) else None
        final = [entry for entry in log if entry.kind == "final"]
        for entry in [*checkpoints[-3:], *([best] if best else []), *final]:
            for part in entry.parts:
                data = self.bucket.objects.get(f"{RUN}/{part.key}")
                assert data is not None, f"entry {entry.seq} has lost {part.key}"
                assert (len(data), hashlib.sha256(data).hexdigest()) == (
                    part.bytes,
                    part.sha256,
                ), f"entry {entry.seq} is torn"

    # reading past the faults, and past the code that is tried

    def log(self) -> list[Entry]:
        keys = sorted(key for key in self.bucket.objects if re.fullmatch(rf"{RUN}/log/\d{{8}}\.json", key))
        assert keys == [entry_key(RUN, seq) for seq in range(len(keys))]
        return [Entry.model_validate(json.loads(self.bucket.objects[key])) for key in keys]

    def newest_claim(self) -> Entry:
        return [entry for entry in self.log() if entry.kind == "claim"][-1]

    def is_in_log(self, entry: Entry | None) -> None:
        assert entry in self.log()


def expected(error: StorageError) -> None:
    assert error.transient, str(error)


class RunWithoutConditions(RunUnderFaults):
    honours_conditions = False


RUNS = settings(
    max_examples=60,
    stateful_step_count=50,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_no_fault_forks_loses_or_tears_a_run() -> None:
    run_state_machine_as_test(RunUnderFaults, settings=RUNS)


@pytest.mark.slow
def test_no_fault_forks_loses_or_tears_a_run_in_many_tries() -> None:
    run_state_machine_as_test(
        RunUnderFaults, settings=settings(RUNS, max_examples=1500, stateful_step_count=80, derandomize=False)
    )


def test_the_same_machine_finds_the_fork_when_conditions_are_ignored() -> None:
    with pytest.raises(AssertionError, match=r"fork|fenced writer was let in|overwritten|lost"):
        # a fork is enough, it need not be the shortest
        run_state_machine_as_test(RunWithoutConditions, settings=settings(RUNS, phases=[Phase.generate]))
