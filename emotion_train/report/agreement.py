"""Checks that the ranks' counts, the predictions and the index of a split agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from emotion_train.data.index import differ
from emotion_train.evaluation.metrics import confusion
from emotion_train.evaluation.predictions import Inconsistent, SetPredictions
from emotion_train.evaluation.thresholds import HALF

if TYPE_CHECKING:
    from emotion_train.report.figures import AnyResult


def require_agreement(
    name: str, result: AnyResult, classes: int, label_counts_C: Sequence[float] | None
) -> None:
    """Raises `Inconsistent` unless the ranks' counts equal those of the predictions, each post is
    there once, and the label counts equal the index's.
    """
    predictions = result.predictions
    several = isinstance(predictions, SetPredictions)
    expected = (3, classes) if several else (classes, classes)
    if result.counts.shape != expected or (len(predictions.ids) and predictions.prob_NC.shape[1] != classes):
        raise Inconsistent(
            f"split {name} has counts of shape {result.counts.shape} and probabilities of shape"
            f" {predictions.prob_NC.shape} for {classes} labels"
        )
    if len(set(predictions.ids)) < len(predictions.ids):
        raise Inconsistent(
            f"split {name} has {len(predictions.ids)} predictions of {len(set(predictions.ids))} posts"
        )
    _require_own_counts(name, result, classes)
    label_counts = result.label_counts
    sums = len(predictions.ids) if result.targets == "shares" else 0  # whose rounding differs
    if label_counts_C is not None and differ(label_counts, label_counts_C, sums):
        raise Inconsistent(
            f"split {name} has label counts {list(label_counts_C)} in the index and {label_counts} here"
        )


def _require_own_counts(name: str, result: AnyResult, classes: int) -> None:
    predictions = result.predictions
    if isinstance(predictions, SetPredictions):
        counted = predictions.answered(predictions.prob_NC >= HALF).counts()
    else:
        counted = confusion(predictions.truth_N, predictions.predicted_N, classes)
    if np.array_equal(counted, result.counts):
        return
    row, label = np.argwhere(counted != result.counts)[0].tolist()
    by_count, by_file = int(result.counts[row, label]), int(counted[row, label])
    if isinstance(predictions, SetPredictions):
        which = ("with label {} that get it at 0.5", "with label {}", "that get label {} at 0.5")[row]
        what = f"posts {which.format(label)} are"
    else:
        what = (
            f"the ranks counted {int(result.counts.sum())} posts and the predictions are"
            f" {len(predictions.ids)}; label {row} predicted as {label} is"
        )
    raise Inconsistent(f"split {name}: {what} {by_count} by count and {by_file} by file")
