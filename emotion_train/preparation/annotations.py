"""Rows of several annotators become posts, labelled with the shares of the answers or with the
labels that at least half of the annotators gave.

The rows of a post have one id, or one text where there is no column of ids. Each annotator has one
vote, by the first row; for shares, an annotator's several labels divide the vote evenly. Costs two
sorts of the rows of a partition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from emotion_train.data.target_columns import PostTargets
from emotion_train.data.targets import WEIGHT, TargetKind, is_kept


class Joined(NamedTuple):
    """The posts of some rows, the rows that count as answers, and the rows left out, by reason."""

    posts: Any  # a record batch of `cleaning.schema_of` with the first row of each post
    answers: Any
    answered_again: Any
    other_text: Any
    no_half: Any


def joined(rows: Any, code_C: Any, kind: TargetKind, *, by_id: bool, allow_none: bool) -> Joined:
    """The posts of a table of clean rows, which must hold all rows of each of its posts. `code_C`
    are the final codes of labels.
    """
    numbers = [
        name
        for name in rows.schema.names
        if name not in ("id", "text", "labels", "shares") and not is_kept(name)
    ]
    column = {name: rows.column(name).to_numpy() for name in numbers}
    keys = ("draw", "order") if by_id else ("key0", "key1")
    begins_in = [column["place"], column["split"], *(column[key] for key in reversed(keys))]
    order = np.lexsort(begins_in)
    first = _changes(order, *(column[key] for key in (*keys, "split")))
    post_N = np.empty(len(order), np.int64)
    post_N[order] = np.cumsum(first) - 1
    head = order[first]  # the first row of each post
    answers = np.lexsort((column["place"], column["annotator"], post_N))
    counts_N = np.zeros(len(order), bool)
    counts_N[answers[_changes(answers, post_N, column["annotator"])]] = True
    differ_N = (column["key0"] != column["key0"][head][post_N]) | (
        column["key1"] != column["key1"][head][post_N]
    )
    differ = np.bincount(post_N, differ_N, len(head)) > 0
    votes = np.flatnonzero(counts_N)
    targets = (
        PostTargets.of_rows(rows, code_C)
        .take(votes)
        .joined(post_N[votes], len(head), "mean" if kind == "shares" else "half")
    )
    none = ~differ & (targets.counts == 0) & (not allow_none)
    kept = np.flatnonzero(~differ & ~none)
    kept = kept[np.argsort(head[kept], kind="stable")]
    posts = {name: rows.column(name).take(pa.array(head[kept])) for name in rows.schema.names}
    posts |= targets.take(kept).columns(kind)
    if WEIGHT in column:  # the mean of its votes
        total = np.bincount(post_N[votes], column[WEIGHT][votes], len(head))
        posts[WEIGHT] = pa.array((total / np.bincount(post_N[votes], minlength=len(head)))[kept])
    del posts["annotator"]
    return Joined(
        pa.table(posts).combine_chunks(),
        votes[~differ[post_N[votes]]],
        np.flatnonzero(~counts_N & ~differ[post_N]),
        np.flatnonzero(differ[post_N]),
        head[none],
    )


def _changes(order: Any, *columns: Any) -> Any:
    """Whether each row, in this order, differs from the row before it in any of the columns."""
    changes = np.ones(len(order), bool)
    changes[1:] = np.any([np.diff(column[order]) != 0 for column in columns], axis=0)
    return changes
