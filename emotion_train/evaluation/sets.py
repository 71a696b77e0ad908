"""The quality of answers with several labels a post: F1 by label and by post, ranking, calibration,
and the labels that are mistaken for one another.

Figures by label count 0 for 0 / 0, like those of one label (scikit-learn's `zero_division=0`).
Figures by post count 1 for a post without labels that is answered with none, since that is right
(`zero_division=1`).

Letters: N posts, C labels.
"""

# ruff: noqa: N802 - arrays end in their shape

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emotion_train.evaluation.metrics import (
    BoolArray,
    Calibration,
    Difference,
    FloatArray,
    IntArray,
    Interval,
    alike_N,
    bootstrap_macro_f1,
    calibration,
    paired_bootstrap_macro_f1,
    ratio,
)
from emotion_train.evaluation.predictions import SetPredictions

_CELLS_AT_A_TIME = 2**22  # of float32, which count exactly up to 2^24


@dataclass(frozen=True, eq=False)
class SetCounts:
    """Scores by label of `SetPredictions.counts`, which add over ranks without error.

    A quotient with denominator 0 is 0, and macro-F1 is the mean over all C labels, as in
    `ClassCounts`.
    """

    counts_3C: IntArray

    @property
    def both_C(self) -> IntArray:
        return np.asarray(self.counts_3C[0])

    @property
    def support_C(self) -> IntArray:
        return np.asarray(self.counts_3C[1])

    @property
    def predicted_C(self) -> IntArray:
        return np.asarray(self.counts_3C[2])

    @property
    def precision_C(self) -> FloatArray:
        return ratio(self.both_C, self.predicted_C)

    @property
    def recall_C(self) -> FloatArray:
        return ratio(self.both_C, self.support_C)

    @property
    def f1_C(self) -> FloatArray:
        return ratio(2 * self.both_C, self.support_C + self.predicted_C)

    @property
    def macro_f1(self) -> float:
        return float(self.f1_C.mean())

    @property
    def micro_f1(self) -> float:
        return float(ratio(2 * self.both_C.sum(), self.support_C.sum() + self.predicted_C.sum()))

    @property
    def labels_without_support(self) -> int:
        return int((self.support_C == 0).sum())


class SetScores(NamedTuple):
    """Means over posts, and the average precision of each label; its mean is over all C labels."""

    samples_f1: float
    jaccard: float
    exact_match: float
    mean_average_precision: float
    average_precision_C: FloatArray


class LabelCalibration(NamedTuple):
    """`error_C` is the calibration error of each label's own probability, `overall` the calibration
    of all probabilities of all posts.
    """

    error_C: FloatArray
    overall: Calibration


def set_scores(predictions: SetPredictions) -> SetScores:
    """The scores by post and by ranking; raises `ValueError` without posts."""
    truth_NC, predicted_NC = predictions.truth_NC, predictions.predicted_NC
    if not len(truth_NC):
        raise ValueError("scores need at least one post")
    both_N = (truth_NC & predicted_NC).sum(axis=1)
    either_N = (truth_NC | predicted_NC).sum(axis=1)
    nothing_N = either_N == 0  # and nothing is the right answer
    precision_C = average_precision_C(truth_NC, predictions.prob_NC)
    return SetScores(
        samples_f1=float((ratio(2 * both_N, both_N + either_N) + nothing_N).mean()),
        jaccard=float((ratio(both_N, either_N) + nothing_N).mean()),
        exact_match=float(alike_N(truth_NC, predicted_NC).mean()),
        mean_average_precision=float(precision_C.mean()),
        average_precision_C=precision_C,
    )


def average_precision_C(truth_NC: BoolArray, prob_NC: NDArray[np.float32]) -> FloatArray:
    """Sum over the distinct probabilities, from the highest, of precision times gained recall; 0
    for a label without posts.
    """
    found_C = np.zeros(truth_NC.shape[1])
    for label in range(truth_NC.shape[1]):
        order_N = np.argsort(-prob_NC[:, label])
        ranked_N = prob_NC[order_N, label]
        last_N = np.append(ranked_N[1:] != ranked_N[:-1], True)  # posts of equal probability come in at once
        both = np.cumsum(truth_NC[order_N, label])[last_N]
        taken = np.flatnonzero(last_N) + 1
        found_C[label] = ratio((np.diff(both, prepend=0) * both / taken).sum(), both[-1])
    return found_C


def bootstrap_macro_f1_of_sets(
    truth_NC: BoolArray, predicted_NC: BoolArray, samples: int = 2000, seed: int = 0
) -> Interval:
    """The interval of `bootstrap_macro_f1`, for sets."""
    return bootstrap_macro_f1(truth_NC, predicted_NC, truth_NC.shape[1], samples, seed)


def paired_bootstrap_of_sets(
    truth_NC: BoolArray, a_NC: BoolArray, b_NC: BoolArray, samples: int = 2000, seed: int = 0
) -> Difference:
    """The difference of `paired_bootstrap_macro_f1`, for sets."""
    return paired_bootstrap_macro_f1(truth_NC, a_NC, b_NC, truth_NC.shape[1], samples, seed)


def calibration_of_labels(
    prob_NC: NDArray[np.float32], truth_NC: BoolArray, bins: int = 15
) -> LabelCalibration:
    """The gap between each label's probability and how often posts have it, over bins of equal
    width. Raises `ValueError` without posts.
    """
    if not prob_NC.size:
        raise ValueError("calibration needs at least one post")
    prob_CN = prob_NC.T.astype(np.float64)
    errors = [
        calibration(prob_N, is_in_N, bins).error for prob_N, is_in_N in zip(prob_CN, truth_NC.T, strict=True)
    ]
    return LabelCalibration(np.array(errors), calibration(prob_CN.reshape(-1), truth_NC.T.reshape(-1), bins))


def together(first_NC: BoolArray, second_NC: BoolArray) -> IntArray:
    """counts_CC[a, b] = posts with label a in the first table and label b in the second; with the
    same table twice, how often labels occur together.
    """
    classes = first_NC.shape[1]
    counts_CC = np.zeros((classes, classes), np.int64)
    posts = max(1, _CELLS_AT_A_TIME // classes)
    for start in range(0, len(first_NC), posts):
        part_NC, other_NC = (x_NC[start : start + posts].astype(np.float32) for x_NC in (first_NC, second_NC))
        counts_CC += (part_NC.T @ other_NC).astype(np.int64)
    return counts_CC


def mistaken(truth_NC: BoolArray, predicted_NC: BoolArray) -> IntArray:
    """counts_CC[t, p] = posts whose label t was missed and that were answered with p, which they
    do not have.
    """
    return together(truth_NC & ~predicted_NC, predicted_NC & ~truth_NC)
