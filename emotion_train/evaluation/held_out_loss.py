"""The loss of scored posts, weighted by class like the training loss, so that one plot can show
both.

Letters: N posts, C labels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emotion_train.data.targets import loss_weights
from emotion_train.evaluation.predictions import AnyPredictions, SetPredictions

_UNITS = 2.0**24  # whole numbers of these units add up to the same sum, whatever the ranks' posts


def loss_and_weight(
    predictions: AnyPredictions, weights_C: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Sum of weight times loss and sum of weights, in units that add over ranks without rounding;
    the first divided by the second is the mean loss.
    """
    prob_NC = np.clip(predictions.prob_NC.astype(np.float64), np.finfo(np.float32).tiny, 1.0)
    if isinstance(predictions, SetPredictions):
        targets_NC = predictions.truth_NC.astype(np.float64)
        absent_NC = np.clip(1 - predictions.prob_NC.astype(np.float64), np.finfo(np.float32).eps / 2, 1.0)
        losses_NC = -np.log(np.where(predictions.truth_NC, prob_NC, absent_NC))
    else:
        one_hot_NC = np.arange(len(weights_C)) == predictions.truth_N[:, None]
        targets_NC = (one_hot_NC if predictions.shares_NC is None else predictions.shares_NC).astype(float)
        losses_NC = -np.log(prob_NC)
    weights_NC = loss_weights(targets_NC, predictions.targets, weights_C, np.ones(len(prob_NC)))
    parts_2N = np.stack([(weights_NC * losses_NC).sum(axis=1), weights_NC.sum(axis=1)])
    return np.asarray(np.rint(parts_2N * _UNITS).sum(axis=1))
