"""Predictions in another order of labels, or among more labels, say the same of every post."""

from __future__ import annotations

import numpy as np
import pytest

from emotion_train.evaluation.predictions import (
    AnyPredictions,
    Inconsistent,
    Predictions,
    SetPredictions,
    any_predictions_from_parquet,
    predictions_to_parquet,
)

LABELS = ("calm", "fear", "joy")
MORE = ("joy", "awe", "calm", "rage", "fear")
PLACES = [MORE.index(label) for label in LABELS]
PROB_NC = np.array([[0.2, 0.1, 0.7], [0.5, 0.25, 0.25], [0.3, 0.6, 0.1]], np.float32)
SHARES_NC = np.array([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], np.float32)
TRUTH_NC = np.array([[True, False, True], [False, False, False], [False, True, False]])


def three(kind: str) -> AnyPredictions:
    ids = ["a", "b", "c"]
    if kind == "several":
        return SetPredictions.of(ids, TRUTH_NC, PROB_NC, [0.3, 0.2, 0.6])
    shares_NC = SHARES_NC if kind == "shares" else None
    return Predictions.of(ids, [2, 0, 0], PROB_NC, shares_NC=shares_NC)


@pytest.mark.parametrize("kind", ["one", "several", "shares"])
def test_labels_move_with_all_that_is_said_of_them(kind: str) -> None:
    own = three(kind)
    moved = own.relabelled(PLACES, len(MORE))
    assert (moved.ids, moved.targets, moved.prob_NC.dtype) == (own.ids, kind, own.prob_NC.dtype)
    assert moved.prob_NC[:, PLACES].tolist() == own.prob_NC.tolist()
    assert moved.prob_NC.sum() == own.prob_NC.sum()  # nothing elsewhere
    for name in ("truth", "predicted"):
        before, after = getattr(own, name), getattr(moved, name)
        for row in range(3):
            if kind == "several":
                names = [
                    {labels[label] for label in np.flatnonzero(x[row])}
                    for labels, x in ((LABELS, before), (MORE, after))
                ]
                assert names[0] == names[1]
            else:
                assert LABELS[before[row]] == MORE[after[row]]
    if isinstance(moved, Predictions) and kind == "shares":
        assert moved.shares_NC is not None
        assert moved.shares_NC[:, PLACES].tolist() == SHARES_NC.tolist()


@pytest.mark.parametrize("label", [-1, 3])
def test_a_file_with_a_label_that_there_is_not_is_refused(label: int) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(predictions_to_parquet(three("several"), LABELS)))
    lists = [[label], [], [1]]
    table = table.set_column(1, "labels", pa.array(lists, pa.list_(pa.int32())))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    with pytest.raises(Inconsistent, match="labels outside 0 … 2"):
        any_predictions_from_parquet(sink.getvalue())
