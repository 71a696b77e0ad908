"""The answers of the folds' published runs for posts that they did not see, averaged over seeds.

Each run's test split is its fold. This is checked: the fold of every post is computed again from
its text, and a run that scored a post of another fold is refused.

Letters: N posts, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from emotion_train.config import Config
from emotion_train.data.index import Index
from emotion_train.data.reader import Rows
from emotion_train.edges.bounded import object_in
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.evaluation.predictions import any_predictions_from_parquet, predictions_key
from emotion_train.preparation.folds import folds_of_texts
from emotion_train.runs.log import Entry, final_entry, read_log, read_part
from emotion_train.runs.question import same_question_as_published
from emotion_train.storage.store import Store

_TEST = "test"
_MOST_BYTES = 16 << 20


def is_published(store: Store, run_id: str, index: Index, config: Config) -> bool:
    """Whether the run's log has a final entry. Raises `WrongRequest` for a run of this name that
    was published from another data set than `index`, or with another request than `config`.
    """
    log = read_log(store, run_id)
    entry = next((entry for entry in reversed(log) if entry.kind == "final"), None)
    if entry is not None and entry.index_sha256 != index.sha256():
        raise WrongRequest(
            f"The run {run_id} at {store.url} is published and was trained on another data set; give another"
            " run.id."
        )
    if entry is not None:
        same_question_as_published(store, run_id, entry, config)
    return entry is not None


def out_of_fold(
    store: Store, runs_of_fold: Mapping[int, Sequence[str]], rows: Rows
) -> dict[str, NDArray[np.float64]]:
    """`prob_C` of each post by id: the mean over the runs of its fold, before any calibration.
    `rows` is the training split that was folded.

    Raises `WrongRequest` for runs that are not published, scored posts of other folds, or left
    posts out.
    """
    folds = len(runs_of_fold)
    fold_N = folds_of_texts([text or "" for text in rows.texts], folds)
    fold_of = dict(zip(rows.ids, fold_N.tolist(), strict=True))
    sums: dict[str, NDArray[np.float64]] = {}
    for fold, run_ids in runs_of_fold.items():
        for run_id in run_ids:
            ids, prob_NC = _of_run(store, run_id)
            if (stray := next((own for own in ids if fold_of.get(own) != fold), None)) is not None:
                raise WrongRequest(
                    f"Run {run_id} scored the post {stray[:60]!r}, which is not of fold {fold}, so it may"
                    " have been trained on it; give another run.id."
                )
            if len(ids) != int((fold_N == fold).sum()):
                raise WrongRequest(
                    f"Run {run_id} scored {len(ids):,} posts, and fold {fold} has {(fold_N == fold).sum():,};"
                    " give another run.id."
                )
            for post_id, prob_C in zip(ids, prob_NC, strict=True):
                sums[post_id] = sums.get(post_id, 0.0) + prob_C / len(run_ids)
    return sums


def _of_run(store: Store, run_id: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    entry = final_entry(store, run_id)
    predictions = any_predictions_from_parquet(_part(store, run_id, entry, predictions_key(_TEST)))
    decision = Decision.model_validate(
        object_in(_part(store, run_id, entry, f"adapter/{DECISION}"), _MOST_BYTES)
    )
    return predictions.ids, decision.raw(predictions.prob_NC).astype(np.float64)


def _part(store: Store, run_id: str, entry: Entry, name: str) -> bytes:
    key = f"final/{entry.incarnation:08d}/{name}"
    part = next((part for part in entry.parts if part.key == key), None)
    if part is None:
        raise WrongRequest(f"Run {run_id} at {store.url} published no {name}; give another run.id.")
    return read_part(store, run_id, part)
