"""Whether this process is the program's own, or one that others work in too, such as a notebook's
kernel.

A program may end its process by force where it is stuck or fenced; a call of the Python interface
raises, and leaves its caller's process alone. The price: a thread that waits for a GPU or a store
that is gone stays until the caller ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_blocks = 0  # of `borrowed` that are open


@contextmanager
def borrowed() -> Iterator[None]:
    """What runs in this block has no right to end the process."""
    global _blocks
    with _lock:
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1


def is_borrowed() -> bool:
    return _blocks > 0
