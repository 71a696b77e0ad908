"""Finds held-out posts that look mislabelled: the model, which did not learn from them, is surer of
another label than it usually is where that label is right.

This is confident learning (Northcutt et al. 2021, arXiv:1911.00068), with the rules of cleanlab,
its reference implementation. Nothing is changed here: a person decides about each post.

Letters: N posts, C labels.
"""

# ruff: noqa: N802 - arrays end in their shape

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from emotion_train.evaluation.metrics import BoolArray, FloatArray, IntArray
from emotion_train.evaluation.predictions import Predictions, SetPredictions

_ALPHA = 0.8  # weight of the most doubtful of a post's labels, as in cleanlab
_SLACK = 1e-6  # tolerance where a probability is compared with a label's usual one


class Doubts(NamedTuple):
    """Posts that look mislabelled, the most doubtful first: their rows in the predictions, the
    labels that fit better, `suggested_DC`, and `score_D`, the probability of the post's own label
    (cleanlab's `self_confidence`), which is low where the label is doubtful.
    """

    rows_D: IntArray
    suggested_DC: BoolArray
    score_D: FloatArray


def doubts(predictions: Predictions | SetPredictions) -> Doubts:
    """Posts whose labels are doubted, with one label a post or several. Shares are never doubted,
    since they hold the annotators' disagreement: there the result is empty.
    """
    if isinstance(predictions, SetPredictions):
        return _of_sets(predictions.truth_NC, predictions.prob_NC.astype(np.float64))
    prob_NC = predictions.prob_NC.astype(np.float64)
    if predictions.shares_NC is not None:
        return _ranked(np.zeros(len(prob_NC), bool), np.zeros(prob_NC.shape, bool), np.ones(len(prob_NC)))
    return _of_one(predictions.truth_N.astype(np.int64), prob_NC)


def _of_one(truth_N: IntArray, prob_NC: FloatArray) -> Doubts:
    answer_N = prob_NC.argmax(axis=1)
    doubtful_N = _confident_N(truth_N, prob_NC) & (answer_N != truth_N)
    suggested_NC = np.arange(prob_NC.shape[1]) == answer_N[:, None]
    return _ranked(doubtful_N, suggested_NC, prob_NC[np.arange(len(truth_N)), truth_N])


def _of_sets(truth_NC: BoolArray, prob_NC: FloatArray) -> Doubts:
    """The doubts with several labels: each label is a question of its own with two answers."""
    doubtful_NC, score_NC = np.zeros(truth_NC.shape, bool), np.ones(truth_NC.shape)
    for label in range(truth_NC.shape[1]):
        truth_N = truth_NC[:, label].astype(np.int64)
        prob_N2 = np.stack([1 - prob_NC[:, label], prob_NC[:, label]], axis=1)
        doubtful_NC[:, label] = _confident_N(truth_N, prob_N2) & (prob_N2.argmax(axis=1) != truth_N)
        score_NC[:, label] = prob_N2[np.arange(len(truth_N)), truth_N]
    return _ranked(np.asarray(doubtful_NC.any(axis=1)), truth_NC ^ doubtful_NC, _pooled_N(score_NC))


def _confident_N(truth_N: IntArray, prob_NC: FloatArray) -> BoolArray:
    """Whether the most confident label of each post is not its own. A label is confident where its
    probability reaches its mean over the posts that have it.
    """
    counts_C = np.bincount(truth_N, minlength=prob_NC.shape[1])
    own_N = prob_NC[np.arange(len(truth_N)), truth_N]
    sums_C = np.bincount(truth_N, own_N, minlength=prob_NC.shape[1])
    usual_C = np.where(counts_C > 0, sums_C / np.maximum(counts_C, 1), np.inf)
    reached_NC = prob_NC >= usual_C - _SLACK
    several_N = reached_NC.sum(axis=1) > 1
    guess_N = np.where(several_N, prob_NC.argmax(axis=1), reached_NC.argmax(axis=1))
    return np.asarray(reached_NC.any(axis=1) & (guess_N != truth_N))


def _pooled_N(score_NC: FloatArray) -> FloatArray:
    """One score for each post: an exponential moving average from its best label to its worst, so
    that the worst counts most.
    """
    ordered_NC = -np.sort(-score_NC, axis=1)
    pooled_N: FloatArray = ordered_NC[:, 0]
    for label in range(1, score_NC.shape[1]):
        pooled_N = _ALPHA * ordered_NC[:, label] + (1 - _ALPHA) * pooled_N
    return pooled_N


def _ranked(doubtful_N: BoolArray, suggested_NC: BoolArray, score_N: FloatArray) -> Doubts:
    rows_D = np.flatnonzero(doubtful_N)
    rows_D = rows_D[np.argsort(score_N[rows_D], kind="stable")]
    return Doubts(rows_D, suggested_NC[rows_D], score_N[rows_D])
