"""The distance of probabilities from the posts' shares of labels, and the distance of a floor that
gives every post the training posts' shares.

Letters: N posts, C labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from emotion_train.evaluation.metrics import FloatArray


class ShareScores(NamedTuple):
    """Means over the posts; 0 is no distance. Divergences (KL) and the log loss are in nats, total
    variation is half the sum of the differences. `…_of_prior` are the floor's.
    """

    mean_kl: float
    mean_kl_of_prior: float
    total_variation: float
    total_variation_of_prior: float
    log_loss: float


def share_scores(shares_NC: ArrayLike, prob_NC: ArrayLike, train_sums_C: ArrayLike) -> ShareScores:
    """The distances. `train_sums_C` are the sums of each label's shares in the training posts. The
    floor counts one more post, of equal shares, since a label that no training post has would be
    infinitely far.

    Raises `ValueError` without posts and for other shapes.
    """
    shares_NC, prob_NC = np.asarray(shares_NC, np.float64), np.asarray(prob_NC, np.float64)
    sums_C = np.asarray(train_sums_C, np.float64)
    if not shares_NC.size or shares_NC.shape != prob_NC.shape or sums_C.shape != shares_NC.shape[1:]:
        raise ValueError(
            f"shares of shape {shares_NC.shape}, probabilities of {prob_NC.shape} and sums of {sums_C.shape};"
            " distances need all labels of all posts and at least one post"
        )
    prior_C = (sums_C + 1 / len(sums_C)) / (sums_C.sum() + 1)
    loss = _cross_entropy(shares_NC, prob_NC)
    own = _cross_entropy(shares_NC, shares_NC)  # the loss of a perfect model
    return ShareScores(
        mean_kl=loss - own,
        mean_kl_of_prior=_cross_entropy(shares_NC, prior_C) - own,
        total_variation=_total_variation(shares_NC, prob_NC),
        total_variation_of_prior=_total_variation(shares_NC, prior_C),
        log_loss=loss,
    )


def _cross_entropy(shares_NC: FloatArray, prob_NC: FloatArray) -> float:
    """Mean of -ln(probability) weighted by the shares, the probability kept at least 2.2e-16 as
    `log_loss` does.
    """
    eps = float(np.finfo(np.float64).eps)
    return float(-(shares_NC * np.log(np.clip(prob_NC, eps, 1))).sum(axis=1).mean())


def _total_variation(shares_NC: FloatArray, prob_NC: FloatArray) -> float:
    return float(np.abs(shares_NC - prob_NC).sum(axis=1).mean() / 2)
