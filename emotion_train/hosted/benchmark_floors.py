"""The floors of a training's report, on the posts of a benchmark."""

from __future__ import annotations

import numpy as np

from emotion_train.console import tell
from emotion_train.data.index import Index
from emotion_train.evaluation.floors import (
    MAJORITY,
    PRIOR,
    TFIDF,
    VALIDATION,
    majority_floor,
    prior_floor,
    tfidf_predictions,
)
from emotion_train.evaluation.predictions import Predictions
from emotion_train.hosted.figures import SystemFigures, system
from emotion_train.hosted.rows import Rows
from emotion_train.storage.store import Store

_FLOOR_MAX_ROWS = 100_000


def floors_of(store: Store, index: Index, rows: Rows, seed: int) -> list[SystemFigures]:
    """The floors of a training's report on these posts: the commonest label or, with several
    labels, the labels by their share in training; and TF-IDF.
    """
    if "train" not in index.splits or not index.splits["train"].rows:
        return []
    counts, classes = index.split("train").label_counts, np.arange(len(rows.labels))
    if index.targets == "several":
        floor_figures = [system(PRIOR, rows, prior_floor(counts, len(rows.ids)))]
    else:
        majority_N = majority_floor(counts, len(rows.ids))
        floor_figures = [system(MAJORITY, rows, majority_N[:, None] == classes)]
    if index.targets == "several" and VALIDATION not in index.splits:
        tell("there are no validation posts to choose the thresholds of the TF-IDF floor by; it is left out")
        return floor_figures
    tell("fitting the TF-IDF floor")
    predictions = tfidf_predictions(store, index, [rows.split], _FLOOR_MAX_ROWS, seed)
    if rows.split in predictions:
        floor = predictions[rows.split]
        row_of = {post_id: row for row, post_id in enumerate(floor.ids)}
        taken = floor.take([row_of[post_id] for post_id in rows.ids])
        tfidf_NC = (
            taken.predicted_N[:, None] == classes if isinstance(taken, Predictions) else taken.predicted_NC
        )
        floor_figures.append(system(TFIDF, rows, tfidf_NC))
    return floor_figures
