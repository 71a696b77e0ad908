"""Finds the gate, the lowest probability from which on answers can be acted upon: at least a wanted
share of them, the precision, is right with 95 % certainty. A person checks the other answers.

An answer is right when it is the post's label (with shares: the label of the largest share). An
answer of several labels is right when it holds a label and the post has every label in it; the post
may have more. Its confidence is the probability of the least likely label in it. The gate of one
label covers the posts that are answered with it, by the probability of that label; the answers to
posts that have it are right.

The posts are walked from the most confident down. At each stop the one-sided 95 % lower bound of
Clopper and Pearson (1934) on the share of right answers so far has to reach the precision. The
first stop that fails ends the walk, and the stop before it is the threshold. The order of the tests
does not depend on which answers are right, and each test has the full level until the first one
fails; so at most 5 of 100 data sets give a wrong threshold (fixed sequence testing: Angelopoulos,
Bates, Candès, Jordan, Lei, "Learn then test", arXiv:2110.01052, section 3.2). Given the
confidences, the right answers at a stop are a sum of independent trials of unequal chances. Its
upper tail is at most the binomial one of their mean (Hoeffding 1956), so the bound holds for it.

The stops depend on the confidences alone. The first is at a tenth of the answers, and at least at
so many that three wrong ones are forgiven: otherwise a single doubtful label among the most
confident posts would end the walk. Each further stop has a tenth more answers, so that the walk has
few chances to fail by bad luck. The price: no gate accepts less than a tenth of the answers, the
threshold may exclude up to a tenth more answers than needed, and labels with fewer than 59 answers
have no gate at a precision of 0.95.

Letters: N posts, C labels, J stops.
"""

# ruff: noqa: N802 - arrays end in their shape

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from emotion_train.evaluation.metrics import BoolArray, FloatArray, IntArray, members
from emotion_train.evaluation.predictions import AnyPredictions
from emotion_train.storage.document import FrozenModel

CERTAINTY = 0.95
_FIRST_STOP = 0.1  # of the answers
_GROWTH = 1.1
_FORGIVEN = 3  # wrong answers at the first stop

_Share = Annotated[float, Field(ge=0, le=1)]


class Gate(FrozenModel):
    """The lowest probability from which on validation answers are right at least `precision` of the
    time, with 95 % certainty; None where no probability is enough.

    `label` None: over all labels, and `share` is the share of posts with an accepted answer. For a
    label, `share` is the accepted share of the posts that are answered with it.
    """

    label: str | None
    precision: float = Field(gt=0, lt=1)
    threshold: _Share | None
    share: _Share | None

    @model_validator(mode="after")
    def _is_open_or_not(self) -> Gate:
        if (self.threshold is None) != (self.share is None):
            raise ValueError("a gate has a threshold and a share, or neither")
        return self


class Answers(NamedTuple):
    """Answers with at least one label: the confidence of each, and whether it is right."""

    confidence_N: NDArray[np.float32]
    right_N: BoolArray

    def above(self, threshold: float) -> tuple[int, int]:
        """How many answers are accepted, and how many of them are right."""
        accepted_N = self.confidence_N >= np.float32(threshold)
        return int(accepted_N.sum()), int((accepted_N & self.right_N).sum())


def confidence_N(prob_NC: NDArray[np.float32], answers_NC: BoolArray) -> NDArray[np.float32]:
    """The probability of the least likely label in each answer; 0 for one without a label."""
    least_N = np.where(answers_NC, prob_NC, np.float32(np.inf)).min(axis=1)
    return np.asarray(np.where(answers_NC.any(axis=1), least_N, 0), np.float32)


def answers_of(predictions: AnyPredictions, label: int | None = None) -> Answers:
    """The answers with any label, or with this `label`."""
    classes = predictions.prob_NC.shape[1]
    truth_NC, answers_NC = (members(x, classes) for x in (predictions.truth, predictions.predicted))
    if label is not None:
        given_N = answers_NC[:, label]
        return Answers(predictions.prob_NC[given_N, label], truth_NC[given_N, label])
    given_N = np.asarray(answers_NC.any(axis=1))
    right_N = np.asarray(~(answers_NC & ~truth_NC).any(axis=1))
    return Answers(confidence_N(predictions.prob_NC, answers_NC)[given_N], right_N[given_N])


def fit_gates(
    predictions: AnyPredictions, labels: Sequence[str], precisions: Sequence[float]
) -> tuple[Gate, ...]:
    """The gates over all labels and for each label, at each precision, from posts with known
    labels.
    """
    gates: list[Gate] = []
    for label in (None, *range(len(labels))):
        answers = answers_of(predictions, label)
        of = len(predictions.ids) if label is None else len(answers.right_N)
        name = None if label is None else labels[label]
        for precision in precisions:
            threshold = lowest_threshold(answers, precision)
            share = None if threshold is None else answers.above(threshold)[0] / of
            gates.append(Gate(label=name, precision=precision, threshold=threshold, share=share))
    return tuple(gates)


def lowest_threshold(answers: Answers, precision: float) -> float | None:
    """The threshold of the last stop before the first that fails; None where the first stop fails.

    It is the shortest decimal that accepts the same answers, so that it reads well and no rounding
    on another machine moves a post across it.
    """
    order_N = np.argsort(-answers.confidence_N, kind="stable")
    ranked_N = answers.confidence_N[order_N]
    accepted_J = _stops(ranked_N, precision)
    right_J = np.cumsum(answers.right_N[order_N])[accepted_J - 1]
    failed_J = lower_bound(right_J, accepted_J) < precision
    passed = int(failed_J.argmax()) if failed_J.any() else len(failed_J)
    if not passed:
        return None
    last = int(accepted_J[passed - 1])
    return _shortest(ranked_N[last] if last < len(ranked_N) else np.float32(0), ranked_N[last - 1])


def lower_bound(right: ArrayLike, of: ArrayLike) -> FloatArray:
    """The one-sided 95 % lower bound of Clopper and Pearson on a share."""
    from scipy.special import betaincinv

    right, of = np.asarray(right, np.float64), np.asarray(of, np.float64)
    bound = betaincinv(np.maximum(right, 0.5), of - right + 1, 1 - CERTAINTY)
    return np.asarray(np.where(right > 0, bound, 0.0))


@cache
def fewest(precision: float, wrong: int) -> int:
    """The number of answers from which on the bound reaches the precision although `wrong` of them
    are wrong.
    """
    low, high = wrong, max(2, wrong + 1)
    while lower_bound(high - wrong, high) < precision:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if lower_bound(middle - wrong, middle) >= precision else (middle, high)
    return high


def _stops(ranked_N: NDArray[np.float32], precision: float) -> IntArray:
    """How many answers each stop accepts, from the fewest; answers of equal confidence come
    together. Where there are too few answers for the first stop, one stop accepts all.
    """
    rows = len(ranked_N)
    first = max(fewest(precision, _FORGIVEN), math.ceil(_FIRST_STOP * rows))
    ranks_J = np.array([*_ranks(min(first, rows), rows)], np.int64)
    whole_J = np.searchsorted(-ranked_N, -ranked_N[ranks_J - 1], side="right")
    return np.unique(whole_J)


def _ranks(first: int, rows: int) -> Iterator[int]:
    rank = first
    while 0 < rank < rows:
        yield rank
        rank = max(rank + 1, int(rank * _GROWTH))
    if rows:
        yield rows


def _shortest(below: np.float32, lowest: np.float32) -> float:
    """The decimal of the fewest digits above `below` and not above `lowest`."""
    for digits in range(1, 8):
        found: float = math.floor(float(lowest) * 10**digits) / float(10**digits)
        if np.float32(found) > below and np.float32(found) <= lowest:
            return found
    return float(str(lowest))
