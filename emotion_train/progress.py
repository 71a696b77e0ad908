"""How far a long job is: a bar on a terminal, a line every 30 s where there is none (Slurm's and
SkyPilot's logs).
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from emotion_train.console import silent, tell

LINE_EVERY_S = 30.0


def rough(seconds: float) -> str:
    """`3 d`, `5 h`, `12 min` or `40 s`."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def plain_line(
    title: str, done: int, total: int, unit: str, seconds_left: float | None, words: str = ""
) -> str:
    """The line for a log; unknown parts are left out:

    >>> plain_line("training", 120, 3000, "steps", 700, "loss 1.234")
    'training: 120 of 3,000 steps (4 %), 12 min left, loss 1.234'
    """
    share = f" ({100 * done // total} %)" if total else ""
    left = "" if seconds_left is None else f"{rough(seconds_left)} left"
    return ", ".join(part for part in (f"{title}: {done:,} of {total:,} {unit}{share}", left, words) if part)


class ProgressLine:
    """A context manager around a job of `total` units. It prints nothing with `shown=False` (ranks
    other than 0), nor where it begins in a `silence`.
    """

    def __init__(self, title: str, total: int, unit: str, shown: bool = True) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._shown = shown = shown and not silent()
        self._words = ""
        self._last_line = time.monotonic()
        # the first update; the time before it includes the start, or another process's steps
        self._began: tuple[float, int] | None = None
        self._bar = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[words]}", markup=False),
            ]
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(title, total=total, words="")

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, words: str = "", total: int | None = None) -> None:
        """Show that `done` units are done; `words` and `total` stay until new ones are given."""
        self._total = total or self._total
        self._words = words or self._words
        now = time.monotonic()
        if self._began is None:
            self._began = (now, done)
        if self._bar is not None and not sys.stderr.isatty():  # the terminal hung up
            self._bar.stop()
            self._bar = None
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, words=self._words)
        elif self._shown and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            left = self._seconds_left(now, done)
            line = plain_line(self._title, done, self._total, self._unit, left, self._words)
            tell(line)

    def _seconds_left(self, now: float, done: int) -> float | None:
        """The seconds left by the mean pace since the first update; None before there is one."""
        assert self._began is not None
        began, first = self._began
        return (self._total - done) * (now - began) / (done - first) if done > first else None

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._shown:
            tell(line)
