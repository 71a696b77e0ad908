"""Posts without labels, read and mended like training posts, so that the tokenizer sees the same
text as in training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from emotion_train.console import tell
from emotion_train.data.cleaning import REFUSED, Cleaner, Findings, Rules, rows_of
from emotion_train.data.labels import LabelNames
from emotion_train.errors import WrongRequest
from emotion_train.sources.open import Source, not_read
from emotion_train.sources.posts import Batch, readable, utf8


class Post(NamedTuple):
    """A post's text for the tokenizer, its number in the input, and its kept columns."""

    row: int
    text: str
    kept: tuple[str, ...] = ()


def posts_of(source: Source, rules: Rules, findings: Findings) -> Iterator[Post]:
    """The usable posts of the source in order; the problems of the other posts are added to
    `findings`.
    """
    cleaner = Cleaner(rules, LabelNames(None, None), findings)
    for batch in source.batches():
        good = cleaner.clean(batch, None)
        rows_N = rows_of(good.column("place").to_numpy())
        taken = np.searchsorted(batch.rows_N, rows_N)
        kept = [
            [readable(value or b"") for value in column.take(taken).to_pylist()]
            for column in batch.kept.values()
        ]
        for i, (row, text) in enumerate(zip(rows_N.tolist(), good.column("text").to_pylist(), strict=True)):
            yield Post(row, text, tuple(column[i] for column in kept))


def mended(numbered: Iterable[tuple[int, str]], *, unescape_html: bool) -> Iterator[Post]:
    """Typed or piped posts, mended like posts of a file, one at a time."""
    findings = Findings(["standard input"])
    cleaner = Cleaner(Rules(sys.maxsize, 0, unescape_html), LabelNames(None, None), findings)
    for row, text in numbered:
        good = cleaner.clean(Batch(0, np.array([row]), utf8([text])), None)
        if len(good):
            yield Post(row, good.column("text")[0].as_py())
        else:
            tell(f"left out: post {row}, which has no text")


def look_through(source: Source, rules: Rules, *, drop: bool) -> list[str]:
    """Remarks on a source: rows left out, lines passed over, files not read.

    Raises `WrongRequest` that names all posts which cannot be labelled, unless `drop`.
    """
    findings = Findings(file.name for file in source.files)
    for _ in posts_of(source, rules, findings):
        pass
    lines = findings.lines(REFUSED)
    if lines and not drop:
        raise WrongRequest(
            f"{source.name} has posts that cannot be labelled:\n  "
            + "\n  ".join(lines)
            + "\nMend them; or type --on-bad drop to leave them out."
        )
    return [
        *(f"left out: {line}" for line in lines),
        *findings.remarks,
        *not_read(source.passed_over),
    ]
