"""Reads posts from text files with one post per line, alone or with the labels in the same lines of
another file, as in TweetEval.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from emotion_train.errors import WrongRequest
from emotion_train.sources.posts import UTF8, Batch, Columns, PostFile, by_bytes
from emotion_train.sources.unpacked import as_seen, bytes_of, head_of, lines_of, newline_of


def read_lines(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    """All lines of a file that holds only posts."""
    with lines_of(file, newline_of(head_of(file))) as lines:
        numbered = ((pair, len(pair[1])) for pair in enumerate(_contents(lines), 1))
        for piece in by_bytes(numbered):
            posts = [(row, text) for row, text in piece if text.strip()]
            rows = np.array([row for row, _ in posts], np.int64)
            blank = tuple(row for row, text in piece if not text.strip())
            yield Batch(number, rows, bytes_of([text for _, text in posts], file.encoding), blank=blank)


def read_line_pairs(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    """All lines of both files; raises `WrongRequest` when one file has more lines."""
    assert file.labels is not None
    if columns.weight or columns.annotator or columns.label_columns:
        raise WrongRequest(
            f"{file.path} holds one post per line and has no columns; --weight-column, --annotations-by and"
            " --label-columns need a table."
        )
    paired = replace(file, path=file.labels)
    with (
        lines_of(file, newline_of(head_of(file))) as texts,
        lines_of(paired, newline_of(head_of(paired))) as labels,
    ):
        pairs = enumerate(zip_longest(_contents(texts), _contents(labels)), 1)
        for piece in by_bytes((pair, sum(len(line or "") for line in pair[1])) for pair in pairs):
            rows = [row for row, (text, label) in piece if text or label]
            for row, (text, label) in piece:
                if text is None or label is None:
                    shorter, longer = (file.path, file.labels) if text is None else (file.labels, file.path)
                    raise WrongRequest(
                        f"{shorter} ends after line {row - 1}, and {longer} has more lines; a text file and"
                        " its label file need the same number of lines."
                    )
            posts = [(text, _named(label, file)) for _, (text, label) in piece if text or label]
            text, label = (bytes_of([post[side] for post in posts], file.encoding) for side in (0, 1))
            blank = tuple(row for row, (text, label) in piece if not text and not label)
            yield Batch(number, np.array(rows, np.int64), text, label if columns.label else None, blank=blank)


def _contents(lines: Iterator[str]) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in lines)


def _named(label: str, file: PostFile) -> str:
    names, digits = file.label_names or (), label.strip()
    if re.fullmatch("[0-9]{1,6}", digits) and int(digits) < len(names):
        return as_seen(names[int(digits)], file.encoding)
    return label


def mapped_names(path: Path) -> tuple[str, ...] | None:
    """The names in TweetEval's mapping.txt, with an id, a tab and a name in each line and ids from
    0 up; None where the file is not so.
    """
    try:
        lines = path.read_text(encoding=UTF8).splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    pairs = [line.split("\t") for line in lines if line.strip()]
    ids = [pair[0].strip() for pair in pairs]
    if not pairs or any(len(pair) != 2 for pair in pairs) or ids != [str(i) for i in range(len(pairs))]:
        return None
    return tuple(pair[1].strip() for pair in pairs)
