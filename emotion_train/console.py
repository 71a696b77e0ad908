"""The terminal that pages and messages are printed on, unless nobody asked for them (`silence`).

Labels, posts and logs are other people's words. What a terminal would take for a command in them is
shown and not sent.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.segment import Segment

from emotion_train.errors import WrongRequest

# controls but for the tab, what turns the direction of writing, ends of lines, half characters
_COMMANDS = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


_lock = threading.Lock()
_silences = 0  # blocks of `silence` that are open, in all threads


@contextmanager
def silence() -> Iterator[None]:
    """Nothing that `tell`, a `Terminal` or a progress line prints is seen while the block runs, of
    any thread: what works in the background belongs to the block that started it.
    """
    global _silences
    with _lock:
        _silences += 1
    try:
        yield
    finally:
        with _lock:
            _silences -= 1


def silent() -> bool:
    """Whether a block of `silence` is open."""
    return _silences > 0


def tell(words: str, file: TextIO | None = None) -> None:
    """Print a line, on standard error unless another file is given. The one place where pages that
    are no verbs print.
    """
    if not silent():
        print(words, file=sys.stderr if file is None else file, flush=True)


def require_agreement(question: str, yes: bool, *, otherwise: str) -> None:
    """Say what is about to be done, and ask unless `yes` has agreed before. Raises `WrongRequest`
    where nobody agrees; `otherwise` says what was not done.
    """
    if yes:
        tell(question)
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise WrongRequest(f"{question}: nobody can answer here; type --yes to agree. {otherwise}")
    tell(f"{question}? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise WrongRequest(otherwise)


def counted(count: int, noun: str) -> str:
    """So many of what is called `noun`, whose plural ends in s.

    >>> counted(1, "part"), counted(1200, "part")
    ('1 part', '1,200 parts')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shown(words: str) -> str:
    """The words on one line, with every character that a terminal would obey spelled out.

    >>> shown("red \x1b[31m alarm")
    'red \\x1b[31m alarm'
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), words)


class Terminal(Console):
    """Rich's console, which would send what it is given."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """What rich makes, of segments whose text holds no command."""
        if silent():
            return ""
        return super()._render_buffer(
            segment
            if segment.control
            else Segment("\n".join(map(shown, segment.text.split("\n"))), segment.style)
            for segment in buffer
        )
