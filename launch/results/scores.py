"""The scores that a comparison shows beside macro-F1, and how far probabilities can be trusted, for
posts that are answered with one label or with several.

Letters: N posts, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emotion_train.evaluation.metrics import ClassCounts, expected_calibration_error, log_loss
from emotion_train.evaluation.predictions import AnyPredictions, Predictions, SetPredictions
from emotion_train.evaluation.sets import SetCounts, calibration_of_labels, set_scores
from emotion_train.evaluation.shares import share_scores


class Scores(NamedTuple):
    """`also` are scores, better when large, and `losses`, better when small, by the names that
    people read.

    `confidence` is the mean probability of the predicted label and `came_true` how often it was
    right; with several labels, the mean probability of a label and the share of posts that have it.
    """

    macro_f1: float
    also: dict[str, float]
    losses: dict[str, float]
    confidence: float
    came_true: float


def scores_of(predictions: AnyPredictions) -> Scores:
    if isinstance(predictions, SetPredictions):
        return _of_several(predictions)
    return _of_one(predictions)


def _of_one(predictions: Predictions) -> Scores:
    counts = ClassCounts(predictions.counts())
    losses = {
        "log loss": log_loss(predictions.prob_NC, predictions.truth_N),
        "calibration error": expected_calibration_error(predictions.prob_NC, predictions.truth_N).error,
    }
    if predictions.shares_NC is not None:
        shares_NC = predictions.shares_NC  # the floor, which takes training posts, is not shown
        far = share_scores(shares_NC, predictions.prob_NC, shares_NC.sum(axis=0))
        losses |= {"KL divergence": far.mean_kl, "total variation": far.total_variation}
    return Scores(
        counts.macro_f1,
        {"weighted F1": counts.weighted_f1, "accuracy": counts.accuracy},
        losses,
        float(predictions.prob_NC.max(axis=1).mean()),
        counts.accuracy,
    )


def _of_several(predictions: SetPredictions) -> Scores:
    counts, by_post = SetCounts(predictions.counts()), set_scores(predictions)
    calibration = calibration_of_labels(predictions.prob_NC, predictions.truth_NC)
    return Scores(
        counts.macro_f1,
        {
            "micro-F1": counts.micro_f1,
            "samples-F1": by_post.samples_f1,
            "Jaccard": by_post.jaccard,
            "exact match": by_post.exact_match,
            "mean AP": by_post.mean_average_precision,
        },
        {"calibration error": calibration.overall.error},
        float(predictions.prob_NC.mean(dtype=np.float64)),
        float(predictions.truth_NC.mean()),
    )


def mean_of(scores: Sequence[Scores]) -> Scores:
    """The mean of each score over several runs."""

    def named(dicts: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: _mean([one[name] for one in dicts]) for name in dicts[0]}

    return Scores(
        _mean([one.macro_f1 for one in scores]),
        named([one.also for one in scores]),
        named([one.losses for one in scores]),
        _mean([one.confidence for one in scores]),
        _mean([one.came_true for one in scores]),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
