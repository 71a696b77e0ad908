"""How far a long job is: a bar on a terminal, a line every ten seconds where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from emotion_train.console import silent, tell

_LINE_EVERY_S = 10.0


class ProgressLine:
    """A with statement around a job of `total` units; `shown=False` (ranks other than 0) prints
    nothing, nor does one that begins in a `silence`.
    """

    def __init__(self, title: str, total: int, unit: str, shown: bool = True) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._shown = shown = shown and not silent()
        self._words = ""
        self._last_line = time.monotonic()
        self._bar = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[words]}"),
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
        """`words` and `total` stay until other ones come."""
        self._total = total or self._total
        if self._bar is not None and not sys.stderr.isatty():  # the terminal hung up
            self._bar.stop()
            self._bar = None
        if self._bar is not None:
            self._words = words or self._words
            self._bar.update(self._task, completed=done, total=self._total, words=self._words)
        elif self._shown and (time.monotonic() - self._last_line >= _LINE_EVERY_S):
            self._last_line = time.monotonic()
            tell(f"{self._title}: {done:,} of {self._total:,} {self._unit} {words}".rstrip())

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._shown:
            tell(line)
