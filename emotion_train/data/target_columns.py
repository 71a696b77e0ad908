"""The targets of many posts as arrays: labels and shares of all posts, one post after the other.

One label, several labels and shares use the same three arrays, so counting, comparing and joining
need not tell them apart.

Letters: N posts, P pairs of a post and one of its labels, G groups of posts, C labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from emotion_train.data.targets import Target, TargetKind

# a group's joint target: the mean, the labels that at least half have, or that any has
Joint = Literal["mean", "half", "union"]
_PAIR = np.dtype([("label", "<i4"), ("share", "<f8")])
LABELS = pa.list_(pa.int32())
SHARES = pa.list_(pa.float64())
FIELDS: dict[TargetKind, tuple[tuple[str, Any], ...]] = {
    "one": (("label", pa.int32()),),
    "several": (("labels", LABELS), ("shares", SHARES)),
    "shares": (("labels", LABELS), ("shares", SHARES)),
}  # of rows on their way through preparation


class PostTargets(NamedTuple):
    """Post n has the labels `label_P[offset_N1[n]:offset_N1[n + 1]]`, in ascending order, and their
    shares.
    """

    offset_N1: Any
    label_P: Any
    share_P: Any

    @classmethod
    def of_pairs(cls, post_P: Any, label_P: Any, share_P: Any, posts: int) -> PostTargets:
        """Targets from pairs in any order."""
        order = np.lexsort((label_P, post_P))
        offset_N1 = np.zeros(posts + 1, np.int64)
        np.cumsum(np.bincount(post_P, minlength=posts), out=offset_N1[1:])
        return cls(offset_N1, np.asarray(label_P, np.int32)[order], np.asarray(share_P, np.float64)[order])

    @classmethod
    def of_one(cls, label_N: Any) -> PostTargets:
        """Targets of posts with one label each."""
        return cls(np.arange(len(label_N) + 1), label_N, np.ones(len(label_N)))

    @classmethod
    def of_rows(cls, rows: Any, code_C: Any) -> PostTargets:
        """Targets from a table or record batch with the columns of `FIELDS`; `code_C` maps its
        label ids to those wanted.
        """
        if "label" in rows.schema.names:
            return cls.of_one(code_C[rows.column("label").to_numpy()])
        labels, shares = (_whole(rows.column(name)) for name in ("labels", "shares"))
        count_N = labels.value_lengths().to_numpy(zero_copy_only=False)
        post_P = np.repeat(np.arange(len(count_N)), count_N)
        return cls.of_pairs(
            post_P, code_C[labels.flatten().to_numpy()], shares.flatten().to_numpy(), len(count_N)
        )

    @property
    def posts(self) -> int:
        return len(self.offset_N1) - 1

    @property
    def counts(self) -> Any:
        """The number of labels of each post."""
        return np.diff(self.offset_N1)

    @property
    def posts_of_pairs(self) -> Any:
        return np.repeat(np.arange(self.posts), self.counts)

    def take(self, posts: Any) -> PostTargets:
        """The targets of the posts with these numbers, in that order."""
        count = self.counts[posts]
        offset_N1 = np.concatenate([[0], np.cumsum(count)])
        pairs = np.repeat(self.offset_N1[posts] - offset_N1[:-1], count) + np.arange(offset_N1[-1])
        return PostTargets(offset_N1, self.label_P[pairs], self.share_P[pairs])

    def followed_by(self, others: PostTargets) -> PostTargets:
        """These posts and then the others."""
        return PostTargets(
            np.concatenate([self.offset_N1, others.offset_N1[1:] + self.offset_N1[-1]]),
            np.concatenate([self.label_P, others.label_P]),
            np.concatenate([self.share_P, others.share_P]),
        )

    def label_counts(self, labels: int) -> Any:
        """The number of posts with each label, or the sums of its shares, as floats."""
        return np.bincount(self.label_P, self.share_P, labels)

    def target(self, post: int) -> Target:
        """The target of one post."""
        begin, end = self.offset_N1[post : post + 2]
        return tuple(zip(self.label_P[begin:end].tolist(), self.share_P[begin:end].tolist(), strict=True))

    def largest(self) -> Any:
        """Each post's label with the largest share, the first of several; every post needs one."""
        if self.posts == len(self.label_P):
            return self.label_P
        order = np.lexsort((self.label_P, -self.share_P, self.posts_of_pairs))
        return self.label_P[order[self.offset_N1[:-1]]]

    def numbered(self, least: int) -> Any:
        """A number for each post, equal for equal targets: its only label, or for other targets a
        number from `least` upwards, in the order of first appearance.
        """
        number_N = np.full(self.posts, -1, np.int64)
        single = (self.counts == 1) & (np.add.reduceat(np.append(self.share_P, 0), self.offset_N1[:-1]) == 1)
        number_N[single] = self.label_P[self.offset_N1[:-1][single]]
        numbers: dict[bytes, int] = {}
        others = np.flatnonzero(~single)
        for post, key in zip(others, map(self._key(), others.tolist()), strict=True):
            number_N[post] = numbers.setdefault(key, least + len(numbers))
        return number_N

    def _key(self) -> Callable[[int], bytes]:
        pair_P = np.empty(len(self.label_P), _PAIR)
        pair_P["label"], pair_P["share"] = self.label_P, self.share_P
        raw, at = pair_P.tobytes(), (self.offset_N1 * _PAIR.itemsize).tolist()
        return lambda post: raw[at[post] : at[post + 1]]

    def joined(self, group_N: Any, groups: int, how: Joint) -> PostTargets:
        """One target for each group; `group_N` is the group of each post. "mean" averages shares;
        with "half" and "union", labels have a share of 1.
        """
        post_P = self.posts_of_pairs
        order = np.lexsort((post_P, self.label_P, group_N[post_P]))  # sums in the order of posts
        label_P, group_P = self.label_P[order], group_N[post_P][order]
        first = np.ones(len(order), bool)
        first[1:] = (np.diff(label_P) != 0) | (np.diff(group_P) != 0)
        begins = np.flatnonzero(first)
        label, group = label_P[begins], group_P[begins]
        members_G = np.bincount(group_N, minlength=groups)
        if how == "mean":
            share = np.add.reduceat(self.share_P[order], begins) if len(begins) else np.zeros(0)
            return PostTargets.of_pairs(group, label, share / members_G[group], groups)
        votes = np.diff(np.append(begins, len(order)))
        kept = (2 * votes >= members_G[group]) | (how == "union")
        return PostTargets.of_pairs(group[kept], label[kept], np.ones(kept.sum()), groups)

    def columns(self, kind: TargetKind) -> dict[str, Any]:
        """Arrow columns as `FIELDS` has them."""
        if kind == "one":
            return {"label": pa.array(self.label_P, pa.int32())}
        offsets = pa.array(self.offset_N1, pa.int32())
        return {
            "labels": pa.ListArray.from_arrays(offsets, pa.array(self.label_P, pa.int32())),
            "shares": pa.ListArray.from_arrays(offsets, pa.array(self.share_P, pa.float64())),
        }


def _whole(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
