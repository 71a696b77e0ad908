"""How far a job is can be read where there is no terminal: one line every 30 s, with what is
known.
"""

from __future__ import annotations

import pytest

from emotion_train import progress
from emotion_train.progress import ProgressLine, plain_line, rough


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_every_30_s_with_share_time_left_and_the_last_words(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine("training", 4000, "steps") as line:
        clock.now += 100  # loading and the first step, which are no measure of the others
        for step in range(1001, 1101):  # a run that was resumed at 1000
            line.update(step, "loss 1.5" if step == 1030 else "")
            clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 1,001 of 4,000 steps (25 %)",
        "training: 1,031 of 4,000 steps (25 %), 49 min left, loss 1.5",
        "training: 1,061 of 4,000 steps (26 %), 49 min left, loss 1.5",
        "training: 1,091 of 4,000 steps (27 %), 48 min left, loss 1.5",
    ]


def test_a_short_job_and_another_rank_print_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("reading", 10, "MiB") as line:
        line.update(5)
        clock.now += 29
        line.update(10)
    with ProgressLine("training", 10, "steps", shown=False) as line:
        clock.now += 99
        line.update(5)
    assert capsys.readouterr().err == ""


def test_a_total_that_is_not_known_has_no_share() -> None:
    assert plain_line("loading", 0, 0, "tensors", None) == "loading: 0 of 0 tensors"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (86_400 * 3, "3 d")],
)
def test_time_is_told_roughly(seconds: float, words: str) -> None:
    assert rough(seconds) == words
