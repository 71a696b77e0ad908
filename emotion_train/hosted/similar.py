"""Texts that are nearly the same: the share of groups of five characters that two texts have in
common (Jaccard), computed exactly for all pairs.

The price: a product of sparse matrices, some seconds for 1,000 new texts against 100,000.

Letters: N new texts, M others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emotion_train.data.cleaning import normalised

NEAR = 0.6
_CHARACTERS = 5
_AT_A_TIME = 256


class Shingles:
    """The distinct groups of characters in the normal forms of texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        vectorizer = HashingVectorizer(
            analyzer="char",
            ngram_range=(_CHARACTERS, _CHARACTERS),
            n_features=2**22,
            alternate_sign=False,
            norm=None,
            lowercase=False,
            binary=True,
            dtype=np.float32,
        )
        # marks around a text give even the shortest a group; the vectorizer merges spaces into one
        padded = [f"\x02\x02{normalised(text)}\x03\x03" for text in texts]
        self.matrix: Any = vectorizer.transform(padded) if padded else np.zeros((0, 0))
        self.sizes_N: NDArray[np.float32] = (
            np.asarray(self.matrix.sum(axis=1)).reshape(-1) if padded else np.zeros(0, np.float32)
        )


def nearest(new: Shingles, others: Shingles) -> NDArray[np.float32]:
    """`share_N`: the largest share that each new text has in common with any of the others."""
    share_N = np.zeros(len(new.sizes_N), np.float32)
    if not len(others.sizes_N):
        return share_N
    for start in range(0, len(share_N), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        share_N[part] = _shares(new.matrix[part], new.sizes_N[part], others).max(axis=1)
    return share_N


def _shares(matrix: Any, sizes_N: NDArray[np.float32], others: Shingles) -> NDArray[np.float32]:
    """`share_NM`: the share that each pair of texts has in common."""
    both_NM = (matrix @ others.matrix.T).toarray()
    either_NM = sizes_N[:, None] + others.sizes_N[None, :] - both_NM
    shares: NDArray[np.float32] = both_NM / np.maximum(either_NM, 1)
    return shares


def first_of_near(texts: Sequence[str], near: float = NEAR) -> list[int]:
    """Numbers of the texts to keep, in order: those not near to an earlier text that is kept."""
    shingles = Shingles(texts)
    kept: list[int] = []
    for start in range(0, len(texts), _AT_A_TIME):
        end = min(start + _AT_A_TIME, len(texts))
        shares_NM = _shares(shingles.matrix[start:end], shingles.sizes_N[start:end], shingles)
        for row in range(start, end):
            if not (shares_NM[row - start, kept] >= near).any():
                kept.append(row)
    return kept
