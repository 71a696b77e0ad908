"""Chooses one threshold for each label, where posts have several: the probability from which on a
post is answered with the label, for the best F1 on posts with known labels.

Thresholds look too good on the posts that chose them; `cross_fit` answers each post by thresholds
that other posts chose.

The best threshold of a label with ten posts is mostly chance. So the threshold of a label that n
posts have lies n / (n + `PULL`) of the way, in logits, from the threshold that is best for all
labels to its own. On 28 simulated labels, which 32 % to 0.15 % of the posts have, macro-F1 on fresh
posts was, by `PULL`:

    posts that chose     0.01      3     10     30    100   one for all    0.5
                 500    0.402  0.410  0.411  0.406  0.399         0.390  0.321
               1,500    0.411  0.415  0.416  0.414  0.407         0.392  0.321
               5,400    0.422  0.423  0.423  0.422  0.418         0.394  0.321

The price: thresholds come from a grid of 401, so that one pass over the posts counts everything, in
any order and for all folds at once: a second for 100,000 posts with 28 labels.

Letters: N posts, C labels, F folds, G thresholds of the grid.
"""

# ruff: noqa: N802 - arrays end in their shape

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emotion_train.evaluation.metrics import BoolArray, FloatArray, IntArray, ratio
from emotion_train.evaluation.predictions import SetPredictions
from emotion_train.evaluation.sets import SetCounts

HALF = 0.5
FOLDS = 5
PULL = 10.0  # posts

# even steps of the logit, from 0.00005 to 0.99995; rounded, so that every machine has the same ones
_GRID_G = np.round(1 / (1 + np.exp(-np.arange(-200, 201) / 20)), 7).astype(np.float32)
_CELLS_AT_A_TIME = 2**22


class _Tally(NamedTuple):
    """Numbers of posts by label: those that reach each threshold, those among them that have the
    label, and all that have the label.
    """

    reached_GC: IntArray
    both_GC: IntArray
    support_C: IntArray

    def without(self, other: _Tally) -> _Tally:
        return _Tally(*(all_of - some for all_of, some in zip(self, other, strict=True)))


def macro_f1_of_sets(counts_3C: IntArray) -> float:
    """Mean F1 of the labels, from `SetPredictions.counts`."""
    return SetCounts(counts_3C).macro_f1


def fit_thresholds(truth_NC: ArrayLike, prob_NC: ArrayLike) -> FloatArray:
    """`thresholds_C`: a post is answered with the labels whose probability, as float32, reaches
    theirs.

    A label without posts gets the threshold that is best for all labels together; without any posts
    with a label, each gets 0.5.
    """
    truth_NC, prob_NC = np.asarray(truth_NC).astype(bool), np.asarray(prob_NC, np.float32)
    return _best_C(_tallies(truth_NC, prob_NC, np.zeros(len(prob_NC), np.int64), 1)[0])


def cross_fit(predictions: SetPredictions, folds: int = FOLDS) -> SetPredictions:
    """The same posts, each answered by thresholds that the other folds' posts chose. A post's fold
    is a hash of its id.
    """
    fold_N = folds_of(predictions.ids, folds)
    tallies = _tallies(predictions.truth_NC, predictions.prob_NC, fold_N, folds)
    whole = _Tally(*(np.sum(counts, axis=0) for counts in zip(*tallies, strict=True)))
    thresholds_FC = np.stack([_best_C(whole.without(own)) for own in tallies]).astype(np.float32)
    return predictions.answered(predictions.prob_NC >= thresholds_FC[fold_N])


def folds_of(ids: tuple[str, ...], folds: int) -> NDArray[np.int64]:
    """`fold_N`, by a hash of each post's id."""
    hashes = (hashlib.blake2b(post_id.encode(), digest_size=8).digest() for post_id in ids)
    return np.fromiter((int.from_bytes(one, "big") % folds for one in hashes), np.int64, len(ids))


def _best_C(tally: _Tally) -> FloatArray:
    """The threshold with the best F1 of each label, pulled towards the best for all labels."""
    if not tally.support_C.any():
        return np.full(len(tally.support_C), HALF)
    f1_GC = ratio(2 * tally.both_GC, tally.reached_GC + tally.support_C)
    common, own_C = f1_GC.mean(axis=1).argmax(), f1_GC.argmax(axis=0)
    weight_C = tally.support_C / (tally.support_C + PULL)
    place_C = np.rint(common + weight_C * (own_C - common)).astype(np.int64)
    return np.asarray(_GRID_G[place_C], np.float64)


def _tallies(
    truth_NC: BoolArray, prob_NC: NDArray[np.float32], fold_N: NDArray[np.int64], folds: int
) -> list[_Tally]:
    """One tally a fold."""
    classes, places = prob_NC.shape[1], len(_GRID_G) + 1
    counts_2X = np.zeros((2, folds * places * classes), np.int64)
    posts = max(1, _CELLS_AT_A_TIME // classes)
    for start in range(0, len(prob_NC), posts):
        part = slice(start, start + posts)
        # how many thresholds each probability reaches
        reached_NC = np.searchsorted(_GRID_G, prob_NC[part], side="right")
        cell_NC = (fold_N[part, None] * places + reached_NC) * classes + np.arange(classes)
        for counts_X, cells in zip(counts_2X, (cell_NC.reshape(-1), cell_NC[truth_NC[part]]), strict=True):
            counts_X += np.bincount(cells, minlength=len(counts_X))
    of_place_2FGC = counts_2X.reshape(2, folds, places, classes)
    # the g-th threshold is reached by all that reach more than g of them
    reached_2FGC = of_place_2FGC[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]
    return [
        _Tally(reached_2FGC[0, fold, 1:], reached_2FGC[1, fold, 1:], reached_2FGC[1, fold, 0])
        for fold in range(folds)
    ]
