"""The present pace of a training: loss, posts a second and the last score, in words for a person
who waits, and as metrics of a checkpoint for readers of the log.

Nothing here waits for the GPU: posts are counted when their step is given to it, which gives the
same pace over the window.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from emotion_train.report.units import training_words
from emotion_train.runs.checkpoint import Progress

_WINDOW_S = 30.0


class Pace:
    """`loss` is the mean of the newest steps that are known."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.loss: float | None = None
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()  # time, and posts so far

    def take(self, posts: int) -> None:
        """Note that `posts` posts have been trained on so far."""
        now = self._clock()
        self._seen.append((now, posts))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()

    def pause(self) -> None:
        """The time until the next step does not count as training."""
        self._seen.clear()

    @property
    def posts_per_second(self) -> float | None:
        """Over the last 30 s, or since the last pause; None before there are two steps."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - began)

    def words(self, progress: Progress, note: str = "") -> str:
        score = progress.history[-1]["macro_f1"] if progress.history else None
        return training_words(self.loss, self.posts_per_second, score, note)

    def facts(self) -> dict[str, float | int | str | None]:
        """`loss` and `posts_per_second` for a checkpoint's metrics, where they are known."""
        rate = self.posts_per_second
        found = {"loss": self.loss, "posts_per_second": None if rate is None else round(rate, 1)}
        return {name: value for name, value in found.items() if value is not None}
