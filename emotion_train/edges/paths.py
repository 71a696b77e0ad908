"""A path as a person types it: `~` and `~name` at its beginning are home folders where there are
such, and letters where there are none, as a shell has it.

`pathlib` raises for a user who does not exist, and for a process without a home; Office calls the
lock of a document `~$posts.csv`, which is a file like any other.
"""

from __future__ import annotations

import os
from pathlib import Path


def typed_path(words: str | Path) -> Path:
    """The path, with a home folder in the place of `~` or `~name` where it is known."""
    return Path(os.path.expanduser(words))


def unknown_user(words: str | Path) -> str | None:
    """The name behind `~` where the path begins with one, nobody has it, and no such file or folder
    is there either.
    """
    if not str(words).startswith("~") or typed_path(words) != Path(words):
        return None
    first = Path(words).parts[0]
    return None if os.path.lexists(first) else first[1:]
