"""A path as a person types it: as in a shell, `~` and `~name` at its beginning are home folders if
these exist, and plain characters if not.

`pathlib` raises for a user who does not exist, and for a process without a home. Office names the
lock of a document `~$posts.csv`, which is an ordinary file.
"""

from __future__ import annotations

import os
from pathlib import Path


def typed_path(words: str | Path) -> Path:
    """The path, with `~` or `~name` replaced by its home folder where that is known."""
    return Path(os.path.expanduser(words))


def unknown_user(words: str | Path) -> str | None:
    """The name after `~` at the beginning of the path, if no user has it and no such file or folder
    exists; else None.
    """
    if not str(words).startswith("~") or typed_path(words) != Path(words):
        return None
    first = Path(words).parts[0]
    return None if os.path.lexists(first) else first[1:]
