"""The lengths of posts, and how much `data.max_length` cuts: arithmetic, without files or a
tokenizer.

`prepare` knows no tokenizer. It stores percentiles of the posts' UTF-8 bytes in the index, and
tokens are estimated from these: the tokens per byte of byte-level tokenizers are much the same in
any script, while the tokens per character are not.

Letters: U different lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from emotion_train.config import LARGEST_MAX_LENGTH, SMALLEST_MAX_LENGTH
from emotion_train.storage.document import FrozenModel

# 3.95 to 4.02 over three sets of English posts and two tokenizers: benchmarks/token_lengths.py
BYTES_A_TOKEN = 4.0
MUCH = 0.05  # share of posts that may be cut without a warning
_FEW_PERCENT = 2  # of the posts may be cut by the max_length that is advised
# fine at the end, where a few posts are many times as long as all others
_PERCENTILES = (0, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.9, 99.99, 100)
_GRID = 10_000  # steps between the shortest and the longest post of an estimate


@dataclass(frozen=True, eq=False)
class Lengths:
    """The number of posts of each length. `lengths_U` is sorted and has each length once; `a + b`
    counts the posts of both.
    """

    lengths_U: npt.NDArray[np.int64]
    counts_U: npt.NDArray[np.int64]

    @classmethod
    def of(cls, lengths: Iterable[int] | npt.NDArray[np.integer]) -> Lengths:
        known = lengths if isinstance(lengths, np.ndarray) else list(lengths)
        lengths_U, counts_U = np.unique(np.asarray(known, np.int64), return_counts=True)
        return cls(lengths_U, counts_U.astype(np.int64))

    @classmethod
    def of_counts(cls, counts: Mapping[int, int]) -> Lengths:
        """`counts` maps a length to its number of posts."""
        lengths = sorted(counts)
        return cls(
            np.asarray(lengths, np.int64), np.asarray([counts[length] for length in lengths], np.int64)
        )

    def __add__(self, other: Lengths) -> Lengths:
        both = np.concatenate([self.lengths_U, other.lengths_U])
        lengths_U, places = np.unique(both, return_inverse=True)
        counts_U = np.zeros(len(lengths_U), np.int64)
        np.add.at(counts_U, places, np.concatenate([self.counts_U, other.counts_U]))
        return Lengths(lengths_U, counts_U)

    @property
    def posts(self) -> int:
        return int(self.counts_U.sum())

    @property
    def total(self) -> int:
        return int(self.lengths_U @ self.counts_U)

    def longer_than(self, limit: int) -> int:
        """Posts longer than `limit`."""
        return int(self.counts_U[self.lengths_U > limit].sum())

    def beyond(self, limit: int) -> int:
        """The length of all posts together beyond the first `limit` of each."""
        return int(np.maximum(self.lengths_U - limit, 0) @ self.counts_U)

    def limit_for(self, percent: float) -> int:
        """The smallest length that at most `percent` % (in steps of 0.01) of the posts exceed: the
        median for 50 (the lower one of two), the longest for 0. Without posts, 0.
        """
        if not len(self.lengths_U):
            return 0
        longer_U = self.posts - np.cumsum(self.counts_U)
        return int(self.lengths_U[np.argmax(longer_U <= self.posts * round(100 * percent) // 10_000)])


class Cut(FrozenModel):
    """How much `max_length` cuts of some posts; all lengths are in tokens, BOS included."""

    max_length: int
    posts: int = Field(description="Posts whose lengths are known: all of a split, or a sample of it.")
    cut_posts: int = Field(description="Those longer than max_length.")
    tokens: int = Field(description="All tokens of these posts before they are cut.")
    lost_tokens: int = Field(description="Those beyond max_length.")
    median_tokens: int
    longest_tokens: int
    max_length_for_2_percent: int = Field(
        description="The smallest data.max_length that cuts at most 2 % of the posts."
    )

    @classmethod
    def of(cls, lengths: Lengths, max_length: int) -> Cut:
        """`lengths` are those of whole posts."""
        return cls(
            max_length=max_length,
            posts=lengths.posts,
            cut_posts=lengths.longer_than(max_length),
            tokens=lengths.total,
            lost_tokens=lengths.beyond(max_length),
            median_tokens=lengths.limit_for(50),
            longest_tokens=lengths.limit_for(0),
            max_length_for_2_percent=max(SMALLEST_MAX_LENGTH, lengths.limit_for(_FEW_PERCENT)),
        )

    @property
    def share(self) -> float:
        """The share of posts that are cut."""
        return self.cut_posts / self.posts if self.posts else 0.0

    @property
    def lost_share(self) -> float:
        """The share of tokens that are lost."""
        return self.lost_tokens / self.tokens if self.tokens else 0.0

    @property
    def share_words(self) -> str:
        """The share of posts for a person: `3.1 %`."""
        return _percent(self.share)

    @property
    def lost_words(self) -> str:
        """The share of tokens for a person."""
        return _percent(self.lost_share)

    @property
    def mean_tokens(self) -> float:
        """The mean length of a post before it is cut, tokens."""
        return self.tokens / self.posts if self.posts else 0.0

    @property
    def is_much(self) -> bool:
        """Whether a person should be warned."""
        return self.share > MUCH

    def words(self, posts: str, *, estimated: bool = False) -> str:
        """A sentence on how much is cut and which max_length would cut 2 %, without a full stop."""
        cuts = "would cut" if estimated else "cuts"
        about = "about " if estimated else ""
        all_posts = posts if estimated else f"{self.posts:,} {posts}"
        share = roughly(self.share_words) if estimated else self.share_words
        what = (
            f"{share} of the {all_posts} and {self.lost_words} of their tokens"
            if self.cut_posts
            else f"none of the {all_posts}"
        )
        return (
            f"data.max_length={self.max_length} {cuts} {what} ({about}{self.median_tokens:,} tokens at the"
            f" median, {self.longest_tokens:,} at most); {self.advice(estimated=estimated)}"
        )

    def advice(self, *, estimated: bool = False) -> str:
        """A phrase with the max_length that would cut 2 %."""
        if self.max_length_for_2_percent > LARGEST_MAX_LENGTH:
            return f"even data.max_length={LARGEST_MAX_LENGTH}, the largest, would cut more than 2 %"
        share = "about 2 %" if estimated else "at most 2 %"
        return f"data.max_length={self.max_length_for_2_percent} would cut {share}"


def roughly(words: str) -> str:
    """An estimate's `about 3.1 %`; `less than 0.1 %` stays as it is."""
    return words if words.startswith("less than") else f"about {words}"


def _percent(share: float) -> str:
    """A percentage with one digit. Less than all is never 100.0 %, and more than nothing never
    0.0 %.
    """
    if 0 < share < 0.001:
        return "less than 0.1 %"
    return f"{min(100 * share, 99.9) if share < 1 else 100:.1f} %"


def cut_remark(lengths: Lengths, max_length: int) -> str | None:
    """A line on posts that an adapter's `max_length` cut in scoring; None where all fitted."""
    if not (cut := lengths.longer_than(max_length)):
        return None
    were = "was" if cut == 1 else "were"
    lost = _percent(lengths.beyond(max_length) / lengths.total)
    return (
        f"{cut:,} of {lengths.posts:,} posts {were} cut at the {max_length} tokens that the adapter was"
        f" trained with: {lost} of all tokens were not read (the longest post has {lengths.limit_for(0):,})"
    )


# --- lengths in the index ---


def recorded(characters: Lengths, utf8_bytes: Lengths) -> dict[str, int]:
    """Entries of an index's `source` for the lengths of its training posts."""
    return {
        "characters_median": characters.limit_for(50),
        "characters_longest": characters.limit_for(0),
        **{_key(percentile): utf8_bytes.limit_for(100 - percentile) for percentile in _PERCENTILES},
    }


def estimated(source: Mapping[str, str | int | float | None]) -> Lengths | None:
    """Estimated tokens of some 10,000 posts that represent the training posts, by the percentiles
    in an index's `source`; None where an earlier version wrote none.
    """
    values = [source.get(_key(percentile)) for percentile in _PERCENTILES]
    if not all(isinstance(value, int) for value in values):
        return None
    grid = np.arange(_GRID + 1) * 100 / _GRID
    utf8_bytes = np.interp(grid, _PERCENTILES, np.asarray(values, np.float64))
    return Lengths.of(1 + np.rint(utf8_bytes / BYTES_A_TOKEN).astype(np.int64))  # 1 is BOS


def tokens_in(text: str) -> int:
    """The estimated tokens of a text, BOS included, by its UTF-8 bytes."""
    return 1 + round(len(text.encode("utf-8", "replace")) / BYTES_A_TOKEN)


def _key(percentile: float) -> str:
    return f"bytes_p{percentile:g}"


RECORDED = ("characters_median", "characters_longest", *map(_key, _PERCENTILES))
