"""Whether this process is the program's own, or someone else's, such as a notebook's kernel.

The program may end its own process by force where it is stuck or fenced. A call of the Python
interface raises instead, and leaves its caller's process alone. The price: a thread that waits for
a GPU or a store that is gone stays until the caller ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_blocks = 0  # open blocks of `borrowed`


@contextmanager
def borrowed() -> Iterator[None]:
    """Code in this block may not end the process."""
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
