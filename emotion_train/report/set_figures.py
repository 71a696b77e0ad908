"""The figures of posts that have several labels, from their predictions.

Letters: N posts, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from emotion_train.evaluation.floors import PRIOR, TFIDF, prior_floor
from emotion_train.evaluation.metrics import wilson_f1
from emotion_train.evaluation.predictions import SetPredictions
from emotion_train.evaluation.sets import (
    LabelCalibration,
    SetCounts,
    SetScores,
    bootstrap_macro_f1_of_sets,
    calibration_of_labels,
    mistaken,
    paired_bootstrap_of_sets,
    set_scores,
    together,
)
from emotion_train.evaluation.thresholds import HALF, macro_f1_of_sets
from emotion_train.report.schema import (
    LabelFigures,
    Mistaken,
    ReliabilityBin,
    SetFigures,
    SetFloor,
    SetLabelFigures,
    Together,
)

_MOST_PAIRS = 1000

F = TypeVar("F", LabelFigures, SetLabelFigures)


def set_figures(
    predictions: SetPredictions,
    labels: Sequence[str],
    *,
    train_counts: Sequence[float],
    thresholds: Sequence[float] | None,
    folds: int | None,
    tfidf: SetPredictions | None,
    samples: int,
    seed: int,
) -> SetFigures:
    """All figures of a split whose posts have several labels. `tfidf` holds the TF-IDF floor's
    answers to the same posts in the same order; `figures.SetResult` explains `thresholds` and
    `folds`.
    """
    truth_NC, answers_NC = predictions.truth_NC, predictions.predicted_NC
    at_half_NC = predictions.prob_NC >= HALF
    counts, scores = SetCounts(predictions.counts()), set_scores(predictions)
    low, high = bootstrap_macro_f1_of_sets(truth_NC, answers_NC, samples, seed)
    gain = paired_bootstrap_of_sets(truth_NC, answers_NC, at_half_NC, samples, seed)
    calibration = calibration_of_labels(predictions.prob_NC, truth_NC)
    floors = {PRIOR: prior_floor(train_counts, len(truth_NC))}
    if tfidf is not None:
        floors[TFIDF] = tfidf.predicted_NC
    return SetFigures(
        rows=len(truth_NC),
        folds=folds,
        macro_f1=counts.macro_f1,
        macro_f1_low=low,
        macro_f1_high=high,
        macro_f1_at_half=macro_f1_of_sets(predictions.answered(at_half_NC).counts()),
        gain_low=gain.low,
        gain_high=gain.high,
        micro_f1=counts.micro_f1,
        samples_f1=scores.samples_f1,
        jaccard=scores.jaccard,
        exact_match=scores.exact_match,
        mean_average_precision=scores.mean_average_precision,
        labels_without_support=counts.labels_without_support,
        without_label=int((~truth_NC.any(axis=1)).sum()),
        without_answer=int((~answers_NC.any(axis=1)).sum()),
        calibration_error=calibration.overall.error,
        reliability=tuple(ReliabilityBin(**one._asdict()) for one in calibration.overall.bins),
        per_label=_per_label(labels, counts, scores, calibration, thresholds),
        mistaken=_mistaken(labels, truth_NC, answers_NC),
        together=_together(labels, truth_NC, answers_NC),
        floors=tuple(
            _floor(name, predictions, predictions.answered(floor_NC), samples, seed)
            for name, floor_NC in floors.items()
        ),
    )


def _per_label(
    labels: Sequence[str],
    counts: SetCounts,
    scores: SetScores,
    calibration: LabelCalibration,
    thresholds: Sequence[float] | None,
) -> tuple[SetLabelFigures, ...]:
    low_C, high_C = wilson_f1(counts.both_C, counts.support_C, counts.predicted_C)
    columns = {
        "support": counts.support_C,
        "predicted": counts.predicted_C,
        "precision": counts.precision_C,
        "recall": counts.recall_C,
        "f1": counts.f1_C,
        "f1_low": low_C,
        "f1_high": high_C,
        "average_precision": scores.average_precision_C,
        "threshold": np.full(len(labels), HALF) if thresholds is None else np.asarray(thresholds, float),
        "calibration_error": calibration.error_C,
    }
    return figures_by_label(SetLabelFigures, labels, columns)


def figures_by_label(kind: type[F], labels: Sequence[str], columns: Mapping[str, Any]) -> tuple[F, ...]:
    """One `kind` for each label, from `columns` with one figure for each label in the same
    order.
    """
    rows = zip(*(column_C.tolist() for column_C in columns.values()), strict=True)
    return tuple(
        kind(label=label, **dict(zip(columns, row, strict=True)))
        for label, row in zip(labels, rows, strict=True)
    )


def _floor(name: str, model: SetPredictions, floor: SetPredictions, samples: int, seed: int) -> SetFloor:
    counts, scores = SetCounts(floor.counts()), set_scores(floor)
    paired = paired_bootstrap_of_sets(model.truth_NC, model.predicted_NC, floor.predicted_NC, samples, seed)
    return SetFloor(
        name=name,
        macro_f1=counts.macro_f1,
        micro_f1=counts.micro_f1,
        samples_f1=scores.samples_f1,
        jaccard=scores.jaccard,
        exact_match=scores.exact_match,
        difference=paired.difference,
        difference_low=paired.low,
        difference_high=paired.high,
    )


def _mistaken(
    labels: Sequence[str], truth_NC: NDArray[np.bool_], answers_NC: NDArray[np.bool_]
) -> tuple[Mistaken, ...]:
    counts_CC = mistaken(truth_NC, answers_NC)
    return tuple(
        Mistaken(missed=labels[missed], added=labels[added], posts=posts)
        for missed, added, posts in _most(counts_CC)
    )


def _together(
    labels: Sequence[str], truth_NC: NDArray[np.bool_], answers_NC: NDArray[np.bool_]
) -> tuple[Together, ...]:
    """Each pair of labels once, also pairs that no post has but some are answered with."""
    have_CC, get_CC = (np.triu(together(some_NC, some_NC), 1) for some_NC in (truth_NC, answers_NC))
    weighed_CC = have_CC * (len(truth_NC) + 1) + get_CC  # by posts that have both, then by answers
    return tuple(
        Together(
            first=labels[first],
            second=labels[second],
            posts=int(have_CC[first, second]),
            answered=int(get_CC[first, second]),
        )
        for first, second, _ in _most(weighed_CC)
    )


def _most(counts_CC: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Row, column and count of the highest counts above 0; ties in the order of rows and
    columns.
    """
    order = np.argsort(-counts_CC, axis=None, kind="stable")[:_MOST_PAIRS]
    rows, columns = np.unravel_index(order, counts_CC.shape)
    found = zip(rows.tolist(), columns.tolist(), counts_CC[rows, columns].tolist(), strict=True)
    return [(row, column, count) for row, column, count in found if count]
