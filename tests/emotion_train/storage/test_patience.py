"""Pauses double up to half a minute; a word is due at once and then once a minute."""

from __future__ import annotations

import time

import pytest

from emotion_train.storage.patience import Patience


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
