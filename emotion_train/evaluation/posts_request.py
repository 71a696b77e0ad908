"""The posts that `predict` labels: words, the lines of a file or its column, or standard input."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from emotion_train.console import tell
from emotion_train.data.cleaning import Findings, Rules
from emotion_train.edges.paths import typed_path
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.unlabelled import Post, look_through, mended, posts_of
from emotion_train.sources.open import Choices, open_source
from emotion_train.sources.posts import Columns


@dataclass(frozen=True)
class PostsRequest:
    """Posts as words, or those of `file` with its `columns` to keep; with neither, the lines of
    standard input.
    """

    posts: tuple[str, ...]
    file: str | None
    text_column: str
    columns: tuple[str, ...]
    encoding: str
    quoting: Literal["auto", "csv", "none"]
    max_chars: int
    unescape_html: bool
    on_bad: Literal["refuse", "drop"]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> PostsRequest:
        names = [name for name in cls.__dataclass_fields__ if name not in ("posts", "columns")]
        given = (arguments.columns or "").split(",")
        return cls(
            posts=tuple(arguments.posts),
            columns=tuple(dict.fromkeys(name.strip() for name in given if name.strip())),
            **{name: getattr(arguments, name) for name in names},
        )


def posts_of_request(asked: PostsRequest, stack: ExitStack) -> Iterator[Post]:
    """The requested posts, mended as training posts are. A file is checked as a whole before its
    first post comes.
    """
    if asked.posts:
        typed = enumerate(map(_utf8, asked.posts), 1)
        return mended(typed, unescape_html=asked.unescape_html)
    if asked.file is None:
        if sys.stdin.isatty():
            tell("one post a line, end with Ctrl-D")
        return mended(_lines_of_stdin(), unescape_html=asked.unescape_html)
    if "://" not in asked.file and not typed_path(asked.file).exists():
        raise WrongRequest(f"The file {asked.file} cannot be read ({os.strerror(errno.ENOENT)}).")
    columns = Columns(asked.text_column, None, None, None, asked.columns)
    choices = Choices(encoding=asked.encoding, quoting=asked.quoting, lines=True)
    source = stack.enter_context(open_source(asked.file, columns, choices))
    rules = Rules(asked.max_chars, 0, asked.unescape_html)
    for remark in look_through(source, rules, drop=asked.on_bad == "drop"):
        tell(remark)
    return posts_of(source, rules, Findings(file.name for file in source.files))


def _utf8(word: str) -> str:
    try:
        word.encode()
    except UnicodeEncodeError:  # Python keeps foreign bytes of a command line as half characters
        raise WrongRequest(
            f"The post {word!r} is not UTF-8; use a terminal and a locale of UTF-8, or give --file."
        ) from None
    return word


def _lines_of_stdin() -> Iterator[tuple[int, str]]:
    # by default the locale decides, and bytes that are not text may pass
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        for number, line in enumerate(sys.stdin, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise WrongRequest(
            "The text on standard input is not UTF-8; convert it, for example by `iconv -f LATIN1 -t UTF-8`."
        ) from None
