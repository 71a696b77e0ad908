"""The pace of a training is that of its newest steps, without its pauses."""

from __future__ import annotations

import pytest

from emotion_train.runs.checkpoint import Progress
from emotion_train.training.pace import Pace


def test_posts_a_second_are_those_of_the_last_30_s_and_not_of_a_pause() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    progress = Progress()
    assert pace.words(progress) == ""
    assert pace.facts() == {}
    posts = 0
    for _ in range(100):  # 64 posts a second
        pace.take(posts)
        now[0] += 1
        posts += 64
    assert pace.posts_per_second == pytest.approx(64)
    for _ in range(32):  # then 8
        pace.take(posts)
        now[0] += 1
        posts += 8
    assert pace.posts_per_second == pytest.approx(8)
    pace.loss = 1.25
    progress.history.append({"macro_f1": 0.5})
    assert pace.words(progress) == "loss 1.250, 8.0 posts/s, last macro-F1 0.500"
    assert pace.facts() == {"loss": 1.25, "posts_per_second": 8.0}
    pace.pause()
    now[0] += 600
    assert pace.words(progress, "validating 512") == "loss 1.250, last macro-F1 0.500, validating 512"
    pace.take(posts)
    assert pace.posts_per_second is None
    now[0] += 1
    pace.take(posts + 30)
    assert pace.posts_per_second == pytest.approx(30)
