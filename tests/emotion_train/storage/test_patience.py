"""Pauses double up to half a minute; a word is due at once and then once a minute. Only a failure
that may pass is waited for, and no longer than was said.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from emotion_train.errors import NotStarted, StorageError, WrongRequest
from emotion_train.storage.patience import Patience, StoreRequest, until_it_answers


def test_pauses_double_up_to_half_a_minute_and_begin_again_after_a_success() -> None:
    waiting = Patience()
    assert [waiting.next_pause_s() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    waiting.reset()
    assert waiting.next_pause_s() == 1


def test_a_word_is_due_at_once_and_then_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    waiting, told = Patience(100.0), []
    for second in range(0, 180, 7):
        now = float(second)
        if waiting.may_tell():
            told.append(second)
    assert told == [0, 63, 126]
    assert waiting.left_s == 100 - now
    waiting.reset()
    assert waiting.may_tell()


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False


def away_until(clock: Clock, end: float, cost_s: float = 0.5) -> Callable[[], float]:
    """A store that answers from `end` on; each attempt takes `cost_s`."""

    def ask() -> float:
        clock.now += cost_s
        if clock.now < end:
            raise StorageError(f"away at {clock.now:g}", transient=True)
        return clock.now

    return ask


@pytest.mark.parametrize(("away_s", "lasts_s"), [(0.0, 0.0), (7.0, 8.0), (59.0, 60.0), (3000.0, 3600.0)])
def test_an_outage_within_the_time_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, away_s: float, lasts_s: float
) -> None:
    clock, told = Clock(monkeypatch), list[str]()
    found = until_it_answers(
        away_until(clock, 1000 + away_s), Patience(lasts_s), clock.wait, lambda error: told.append(str(error))
    )
    assert 1000 + away_s <= found <= 1000 + away_s + 31
    assert bool(told) == (away_s > 0)


@pytest.mark.parametrize("lasts_s", [0.0, 2.0, 45.0])
def test_a_longer_one_is_raised_when_the_time_is_over_after_a_last_attempt(
    monkeypatch: pytest.MonkeyPatch, lasts_s: float
) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(StorageError) as caught:
        until_it_answers(away_until(clock, 5000), Patience(lasts_s), clock.wait, lambda error: None)
    ended = float(str(caught.value).split()[-1])
    assert 1000 + lasts_s <= ended <= 1000 + lasts_s + 0.5  # one attempt's length
    assert ended == clock.now


@pytest.mark.parametrize(
    "error", [StorageError("No permission."), WrongRequest("no such key"), ValueError("a defect")]
)
def test_what_waiting_does_not_mend_is_raised_at_once(error: Exception) -> None:
    tried = []

    def ask() -> None:
        tried.append(1)
        raise error

    with pytest.raises(type(error)):
        until_it_answers(ask, Patience(3600), lambda _: pytest.fail("waited"), lambda _: pytest.fail("told"))
    assert tried == [1]
    request = StoreRequest("the index", "s3://posts", ask, 3600)
    assert request.look(10)
    with pytest.raises(type(error)):
        request.result()


def test_a_request_answers_while_nobody_waits_and_says_what_it_waits_for() -> None:
    answers = iter(list[StorageError | int]([StorageError("The network is gone.", transient=True), 7]))

    def ask() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    request = StoreRequest("the index", "s3://posts", ask, 60)
    assert not request.look(10)
    words = request.news() or ""
    assert words.startswith("WAITING for the index at s3://posts, for ")
    assert words.endswith(" s more at most: The network is gone.")
    waits = [request.is_waiting]
    assert request.news() is None  # once a minute
    assert request.wait(10)
    assert [*waits, request.is_waiting] == [True, False]
    assert request.result() == 7


def test_a_request_whose_time_is_over_names_store_time_and_cause() -> None:
    def ask() -> None:
        raise StorageError("s3://posts cannot be reached.", transient=True)

    request = StoreRequest("the index", "s3://posts", ask, 0)
    assert request.wait(10)
    with pytest.raises(NotStarted) as caught:
        request.result()
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "The run did not start: the index at s3://posts was waited for 0 s (run.start_timeout_s)."
        " s3://posts cannot be reached. The same command starts it when the store answers."
    )
