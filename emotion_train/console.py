"""The terminal for pages and messages, which a block of `silence` turns off.

Labels, posts and logs are other people's words: characters in them that a terminal would obey are
spelled out.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.segment import Segment

from emotion_train.errors import WrongRequest

# controls except the tab, marks of writing direction, ends of lines, half characters
_COMMANDS = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


_lock = threading.Lock()
_silences = 0  # blocks of `silence` that are open, in all threads


@contextmanager
def silence() -> Iterator[None]:
    """Prints nothing of `tell`, a `Terminal` or a progress line while the block runs, in any
    thread: threads in the background belong to the block that started them.
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
    """Print a line, on standard error unless another file is given. Pages other than verbs print
    only by this function.
    """
    if not silent():
        print(words, file=sys.stderr if file is None else file, flush=True)


def require_agreement(question: str, yes: bool, *, otherwise: str) -> None:
    """Print what is about to be done, and ask, unless `yes` agrees already. Raises `WrongRequest`
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
    """The count with its noun, in the plural with s.

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
    """Rich's console, which spells out characters that a terminal would obey, and shows `[name]`
    and `:name:` as they are: to Rich they are styles and pictures, to a label or a folder its name.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **settings})

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """Rich's output of the segments, with such characters spelled out."""
        if silent():
            return ""
        return super()._render_buffer(
            segment
            if segment.control
            else Segment("\n".join(map(shown, segment.text.split("\n"))), segment.style)
            for segment in buffer
        )
