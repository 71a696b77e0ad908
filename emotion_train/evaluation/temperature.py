"""Fits the temperature, a number that divides a model's logits so that a probability of 0.7 comes
true 7 times out of 10 (temperature scaling: Guo et al. 2017, arXiv:1706.04599). It is fitted for
log loss on posts with known labels: one number where a post is answered with one label, and one for
each label where a post may have several.

A temperature is kept only where it helps: each post's log loss is taken at the temperature that the
other folds' posts chose, and where the 95 % interval of the gain holds 0, the temperature is 1.
Answers do not change: the highest probability stays the highest, and thresholds of several labels
are chosen afterwards.

The fit counts one more post, with all labels in equal shares, because posts that are all answered
rightly would ask for boundless certainty. With several labels, the temperature of a label that n
posts have (or lack, where these are fewer) lies n / (n + `PULL`) of the way, in logarithms, from
the temperature that is best for all labels to its own.

Temperatures have three digits. Their standard error is one part in a hundred with 5,000 posts, and
other machines, whose sums differ in the last bit, come to the same number.

Letters: N posts, C labels, K temperatures (1 or C), F folds, G groups of posts, S
resamples.
"""

# ruff: noqa: N802 - arrays end in their shape

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emotion_train.data.targets import TargetKind
from emotion_train.evaluation.metrics import BoolArray, Difference, FloatArray, members, resamples
from emotion_train.evaluation.predictions import AnyPredictions, SetPredictions
from emotion_train.evaluation.thresholds import FOLDS, PULL, folds_of

COLDEST, HOTTEST = 0.05, 20.0
FEWEST = 30  # posts; with fewer, intervals are too narrow
_HALVINGS = 26
_SAMPLES = 2000
_GROUPS = 2_000  # more posts are resampled in groups
_LEAST, _MOST = float(np.finfo(np.float32).tiny), 1 - 2.0**-25  # beyond these float32 has 0 and 1
_EPS = float(np.finfo(np.float64).eps)


class Tempered(NamedTuple):
    """The fitted temperature: one for all or one for each label, None where nothing is gained; its
    gain in the log loss of posts that did not choose it, in nats a post (with several labels, a
    post and label); and the probabilities of those posts with it, `held_out_NC`.
    """

    temperature: tuple[float, ...] | None
    gain: Difference
    held_out_NC: NDArray[np.float32]


class BeforeAndAfter(NamedTuple):
    """Probabilities of the same posts without and with the temperature; for posts that chose it,
    with the temperature that the other folds' posts chose.
    """

    before_NC: NDArray[np.float32]
    after_NC: NDArray[np.float32]


def temper(predictions: AnyPredictions, folds: int = FOLDS) -> Tempered:
    """The temperature that these posts choose, kept only where it helps posts that did not choose
    it.
    """
    kind, truth_NC = predictions.targets, targets_of(predictions)
    logit_NC, fold_N = logits(predictions.prob_NC, kind), folds_of(predictions.ids, folds)
    other_NF = fold_N[:, None] != np.arange(folds)
    apart_FK = np.stack([fit_temperature(logit_NC[own_N], truth_NC[own_N], kind) for own_N in other_NF.T])
    held_out_NC = probabilities(logit_NC / apart_FK[fold_N], kind)
    gained_NK = losses(predictions.prob_NC, truth_NC, kind) - losses(held_out_NC, truth_NC, kind)
    means_SK = _resampled(gained_NK)
    kept_K = (np.percentile(means_SK, 2.5, axis=0) > 0) & (len(fold_N) >= FEWEST)
    if not kept_K.any():
        return Tempered(None, _gain(gained_NK, means_SK, ~kept_K), predictions.prob_NC)
    temperature_K = np.where(kept_K, fit_temperature(logit_NC, truth_NC, kind), 1.0)
    chosen_NC = np.where(kept_K, held_out_NC, predictions.prob_NC)
    return Tempered(tuple(temperature_K.tolist()), _gain(gained_NK, means_SK, kept_K), chosen_NC)


def fit_temperature(logit_NC: FloatArray, truth_NC: FloatArray, kind: TargetKind) -> FloatArray:
    """`temperature_K`, with three digits; 1 without posts. `truth_NC` holds the shares of the
    labels in each post or, with several labels, 1 for each label that it has and 0 for the others.
    """
    if not len(logit_NC):
        return np.ones(logit_NC.shape[1] if kind == "several" else 1)
    found_K = best_temperature(logit_NC, truth_NC, kind)
    if kind == "several":
        common = best_temperature(logit_NC.reshape(-1, 1), truth_NC.reshape(-1, 1), kind)
        has_K = truth_NC.sum(axis=0)
        rarer_K = np.minimum(has_K, len(truth_NC) - has_K)
        found_K = common * (found_K / common) ** (rarer_K / (rarer_K + PULL))
    return np.array([float(f"{one:.3g}") for one in found_K])


def best_temperature(
    logit_NC: FloatArray, truth_NC: FloatArray, kind: TargetKind, more: float = 1.0
) -> FloatArray:
    """`temperature_K` of the lowest log loss of these posts and of `more` posts of equal shares.

    The loss is convex in the inverse temperature; its interval is halved until the slope is 0.
    """
    share = 0.5 if kind == "several" else 1 / logit_NC.shape[1]
    weight = more / len(logit_NC)
    wanted_C = (truth_NC * logit_NC).sum(axis=0) + weight * share * logit_NC.sum(axis=0)

    def slope_K(inverse_K: FloatArray) -> FloatArray:
        expected_C = (probabilities(logit_NC * inverse_K, kind, np.float64) * logit_NC).sum(axis=0)
        surplus_C = (1 + weight) * expected_C - wanted_C
        return np.asarray(surplus_C if kind == "several" else surplus_C.sum(keepdims=True))

    places = logit_NC.shape[1] if kind == "several" else 1
    low_K, high_K = np.full(places, -np.log(HOTTEST)), np.full(places, -np.log(COLDEST))
    for _ in range(_HALVINGS):
        middle_K = (low_K + high_K) / 2
        too_sure_K = slope_K(np.exp(middle_K)) > 0
        low_K, high_K = np.where(too_sure_K, low_K, middle_K), np.where(too_sure_K, middle_K, high_K)
    return np.asarray(np.exp(-(low_K + high_K) / 2))


def divided(prob_NC: NDArray[np.float32], temperature: ArrayLike, kind: TargetKind) -> NDArray[np.float32]:
    """The probabilities with the logits divided by the temperature."""
    return probabilities(logits(prob_NC, kind) / np.asarray(temperature, np.float64), kind)


def logits(prob_NC: NDArray[np.float32], kind: TargetKind) -> FloatArray:
    """Logits of the probabilities: their softmax or, with several labels, their sigmoid gives
    these.
    """
    found_NC = np.clip(prob_NC.astype(np.float64), _LEAST, _MOST)
    return np.log(found_NC) - np.log1p(-found_NC) if kind == "several" else np.log(found_NC)


def probabilities(logit_NC: FloatArray, kind: TargetKind, dtype: type = np.float32) -> NDArray[Any]:
    from scipy.special import expit, softmax

    found_NC = expit(logit_NC) if kind == "several" else softmax(logit_NC, axis=1)
    return np.asarray(found_NC, dtype)


def targets_of(predictions: AnyPredictions) -> FloatArray:
    """`truth_NC` for `fit_temperature`."""
    if isinstance(predictions, SetPredictions):
        return predictions.truth_NC.astype(np.float64)
    if predictions.shares_NC is not None:
        return predictions.shares_NC.astype(np.float64)
    return members(predictions.truth_N, predictions.prob_NC.shape[1]).astype(np.float64)


def losses(prob_NC: NDArray[np.float32], truth_NC: FloatArray, kind: TargetKind) -> FloatArray:
    """`loss_NK`, the log loss of each post or, with several labels, of each post and label, in
    nats. A probability is kept at least 2.2e-16, as in `log_loss`.
    """
    sure_NC = np.clip(prob_NC.astype(np.float64), _EPS, 1)
    if kind != "several":
        return np.asarray(-(truth_NC * np.log(sure_NC)).sum(axis=1, keepdims=True))
    against_NC = np.clip(1 - prob_NC.astype(np.float64), _EPS, 1)
    return np.asarray(-truth_NC * np.log(sure_NC) - (1 - truth_NC) * np.log(against_NC))


def _gain(gained_NK: FloatArray, means_SK: FloatArray, of_K: BoolArray) -> Difference:
    """The gain where only the temperatures of `of_K` differ from 1."""
    low, high = np.percentile((means_SK * of_K).mean(axis=1), [2.5, 97.5])
    return Difference(float((gained_NK * of_K).mean()), float(low), float(high))


def _resampled(gained_NK: FloatArray) -> FloatArray:
    """`means_SK`: the mean of each column, over resampled posts."""
    groups = min(len(gained_NK), _GROUPS)
    group_N = np.arange(len(gained_NK)) % groups
    posts_G1 = np.bincount(group_N, minlength=groups)[:, None].astype(np.float64)
    sum_GK = np.stack([np.bincount(group_N, one_N, minlength=groups) for one_N in gained_NK.T], axis=1)
    draws = (
        draws_SG.astype(np.float64) for draws_SG in resamples(np.ones(groups, np.int64), _SAMPLES, seed=0)
    )
    return np.concatenate([(draws_SG @ sum_GK) / (draws_SG @ posts_G1) for draws_SG in draws])
