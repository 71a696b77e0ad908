"""How a training goes at the moment: loss, posts a second and the last score, in words for who
waits, and as metrics of a checkpoint for who looks at the log.

Nothing here waits for the GPU: posts are counted when their step is given to it, which over the
window is the same.
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
        """Note that so many posts were trained on by now."""
        now = self._clock()
        self._seen.append((now, posts))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()

    def pause(self) -> None:
        """What comes until the next step is no training."""
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
        """For a checkpoint's metrics: `loss` and `posts_per_second`, where they are known."""
        rate = self.posts_per_second
        found = {"loss": self.loss, "posts_per_second": None if rate is None else round(rate, 1)}
        return {name: value for name, value in found.items() if value is not None}
