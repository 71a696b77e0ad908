"""A path as a person types it: as in a shell, `~` and `~name` at its beginning are home folders if
these exist, and plain characters if not.

`pathlib` raises for a user who does not exist, and for a process without a home. Office names the
lock of a document `~$posts.csv`, which is an ordinary file.
"""

from __future__ import annotations

import argparse
import os
import re
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


def path_here(words: str) -> Path:
    """The path on this machine that an option names, as argparse's `type`. A URL would become a
    folder such as `s3:`, and nothing the current folder, so both are refused.
    """
    if not words.strip():
        raise argparse.ArgumentTypeError("it is empty; type a path of this machine")
    if not words.isprintable():
        raise argparse.ArgumentTypeError(f"{words!a} holds a character that cannot be printed; type it anew")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", words):
        raise argparse.ArgumentTypeError(f"{words} is a URL; type a path of this machine")
    return typed_path(words)
