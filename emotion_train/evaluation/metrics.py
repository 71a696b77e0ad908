"""The quality of a classifier: F1 from a confusion matrix, its interval, and how far its
probabilities can be trusted.

Everything starts from counts, which add over ranks without error. The interval needs no pass over
the posts: drawing N rows with replacement is drawing a multinomial over the distinct (truth,
prediction) pairs, so 2000 resamples cost the same for a million posts.

Intervals and comparisons take answers of either form: one label a post, `x_N`, or the labels of
each post, `x_NC` of bool; the names of such arguments have no letters. Where posts have several
labels, most answers are distinct: 2000 resamples of 5,000 posts with 28 labels take a second.

Letters: N posts, C labels, S resamples, K distinct tuples of answers.
"""

# ruff: noqa: N802 - arrays end in their shape

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# With fewer posts answered differently, even a classifier that is right each time cannot be told
# from chance: five tosses of a coin fall alike with p = 0.06.
FEWEST_DIFFERENT = 6
_DRAWS_AT_A_TIME = 2**22  # 32 MiB of int64


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Scores of a confusion matrix: rows are the truth, columns the predictions.

    A quotient with denominator 0 is 0, and macro-F1 is the mean over all C labels, also labels
    without any post: scikit-learn's `f1_score(labels=range(C), average="macro", zero_division=0)`.
    `labels_without_support` is the number of labels without posts.
    """

    counts_CC: IntArray

    @classmethod
    def of(cls, truth_N: ArrayLike, predicted_N: ArrayLike, classes: int) -> ClassCounts:
        return cls(confusion(truth_N, predicted_N, classes))

    @property
    def rows(self) -> int:
        return int(self.counts_CC.sum())

    @property
    def support_C(self) -> IntArray:
        return np.asarray(self.counts_CC.sum(axis=1))

    @property
    def predicted_C(self) -> IntArray:
        return np.asarray(self.counts_CC.sum(axis=0))

    @property
    def correct_C(self) -> IntArray:
        return self.counts_CC.diagonal()

    @property
    def precision_C(self) -> FloatArray:
        return ratio(self.correct_C, self.predicted_C)

    @property
    def recall_C(self) -> FloatArray:
        return ratio(self.correct_C, self.support_C)

    @property
    def f1_C(self) -> FloatArray:
        return ratio(2 * self.correct_C, self.support_C + self.predicted_C)

    @property
    def macro_f1(self) -> float:
        return float(self.f1_C.mean())

    @property
    def weighted_f1(self) -> float:
        return float(ratio(self.f1_C @ self.support_C, self.rows))

    @property
    def accuracy(self) -> float:
        return float(ratio(self.correct_C.sum(), self.rows))

    @property
    def labels_without_support(self) -> int:
        return int((self.support_C == 0).sum())


class Interval(NamedTuple):
    """The 2.5th and the 97.5th percentile."""

    low: float
    high: float


class Difference(NamedTuple):
    """A difference with its 95 % interval."""

    difference: float
    low: float
    high: float


class CalibrationBin(NamedTuple):
    """The posts whose highest probability lies in (low, high]; both means are None for a bin
    without posts.
    """

    low: float
    high: float
    rows: int
    confidence: float | None
    accuracy: float | None


class Calibration(NamedTuple):
    error: float
    bins: tuple[CalibrationBin, ...]


def confusion(truth_N: ArrayLike, predicted_N: ArrayLike, classes: int) -> IntArray:
    """counts_CC[t, p] = posts with label t that were predicted as p. Raises `ValueError` for a
    label outside 0 … classes-1.
    """
    truth_N, predicted_N = _labels(truth_N, classes), _labels(predicted_N, classes)
    if truth_N.shape != predicted_N.shape:
        raise ValueError(
            f"{truth_N.size} labels and {predicted_N.size} predictions; there must be one prediction a post"
        )
    return (
        np.bincount(truth_N * classes + predicted_N, minlength=classes**2)
        .reshape(classes, classes)
        .astype(np.int64)
    )


def bootstrap_macro_f1(
    truth: ArrayLike,
    predicted: ArrayLike,
    classes: int,
    samples: int = 2000,
    seed: int = 0,
    counted_C: BoolArray | None = None,
) -> Interval:
    """The percentile bootstrap's 95 % interval of macro-F1 over resampled posts (Efron 1979).

    A label without posts in a resample counts 0 there, as in a split without it; with labels of a
    few posts the interval therefore leans downwards. `counted_C` are the labels of the mean, None
    for all.
    """
    (truth_KC, predicted_KC), rows_K = distinct_members(classes, truth, predicted)
    of_all_C = slice(None) if counted_C is None else counted_C
    chunks = [
        f1_of_resample_SC(draws_SK, truth_KC, predicted_KC)[:, of_all_C].mean(axis=1)
        for draws_SK in resamples(rows_K, samples, seed)
    ]
    return _interval(np.concatenate(chunks))


def wilson_f1(
    both_C: ArrayLike, support_C: ArrayLike, predicted_C: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Lower and upper ends, `low_C` and `high_C`, of a 95 % interval of each label's F1, from the
    numbers of posts that have the label and were answered with it, that have it, and that were
    answered with it.

    J is the share of posts with both among the posts with either; F1 is 2J / (1 + J). J has
    Wilson's interval (1927), which stays honest where a bootstrap has no width: a label of four
    posts of which none was found has F1 0.00 to 0.66. Without any such post it is 0 to 1.
    """
    both_C, support_C, predicted_C = (np.asarray(x, np.float64) for x in (both_C, support_C, predicted_C))
    either_C = np.maximum(support_C + predicted_C - both_C, 1.0)
    share_C, z = both_C / either_C, 1.959963984540054
    middle_C = share_C + z**2 / (2 * either_C)
    half_C = z * np.sqrt(share_C * (1 - share_C) / either_C + (z / (2 * either_C)) ** 2)
    ends = ((middle_C + side * half_C) / (1 + z**2 / either_C) for side in (-1, 1))
    low_C, high_C = (np.clip(2 * end_C / (1 + end_C), 0, 1) for end_C in ends)
    none_C = support_C + predicted_C == 0
    return np.where(none_C, 0.0, low_C), np.where(none_C, 1.0, high_C)


def paired_bootstrap_macro_f1(
    truth: ArrayLike, a: ArrayLike, b: ArrayLike, classes: int, samples: int = 2000, seed: int = 0
) -> Difference:
    """Macro-F1 of predictions `a` minus macro-F1 of `b`, with the interval of this difference over
    posts resampled for both at once.

    Posts that are hard for both cancel out, so the interval is narrower than the two single ones
    suggest. Where fewer than `FEWEST_DIFFERENT` posts are answered differently, it holds 0.
    """
    (truth_KC, a_KC, b_KC), rows_K = distinct_members(classes, truth, a, b)

    def difference_S(draws_SK: IntArray) -> FloatArray:
        a_SC, b_SC = (f1_of_resample_SC(draws_SK, truth_KC, x_KC) for x_KC in (a_KC, b_KC))
        return np.asarray(a_SC.mean(axis=1) - b_SC.mean(axis=1))

    low, high = _interval(np.concatenate([*map(difference_S, resamples(rows_K, samples, seed))]))
    if rows_K[~alike_N(a_KC, b_KC)].sum() < FEWEST_DIFFERENT:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(float(difference_S(rows_K[None])[0]), low, high)


def expected_calibration_error(prob_NC: ArrayLike, truth_N: ArrayLike, bins: int = 15) -> Calibration:
    """Mean gap between the highest probability and the accuracy, over bins of equal width (Guo et
    al. 2017, arXiv:1706.04599).
    """
    prob_NC, truth_N = _probabilities(prob_NC, truth_N)
    return calibration(prob_NC.max(axis=1), prob_NC.argmax(axis=1) == truth_N, bins)


def calibration(confidence_N: FloatArray, correct_N: BoolArray, bins: int = 15) -> Calibration:
    """Mean gap between a probability and how often it comes true, over bins of equal width."""
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    rows_B = np.bincount(bin_N, minlength=bins)
    confidence_B = ratio(np.bincount(bin_N, confidence_N, minlength=bins), rows_B)
    accuracy_B = ratio(np.bincount(bin_N, correct_N, minlength=bins), rows_B)
    table = tuple(
        CalibrationBin(
            low=i / bins,
            high=(i + 1) / bins,
            rows=int(rows_B[i]),
            confidence=float(confidence_B[i]) if rows_B[i] else None,
            accuracy=float(accuracy_B[i]) if rows_B[i] else None,
        )
        for i in range(bins)
    )
    return Calibration(float(np.abs(confidence_B - accuracy_B) @ rows_B / len(confidence_N)), table)


def log_loss(prob_NC: ArrayLike, truth_N: ArrayLike) -> float:
    """Mean of -ln(probability of the true label), the probability kept at least 2.2e-16 as
    scikit-learn does.
    """
    prob_NC, truth_N = _probabilities(prob_NC, truth_N)
    eps = float(np.finfo(np.float64).eps)
    return float(-np.log(np.clip(prob_NC[np.arange(len(truth_N)), truth_N], eps, 1 - eps)).mean())


def _labels(labels_N: ArrayLike, classes: int) -> IntArray:
    array_N = np.asarray(labels_N)
    if array_N.ndim != 1 or (array_N.size and not np.issubdtype(array_N.dtype, np.integer)):
        raise ValueError(f"labels must be one row of integers, got shape {array_N.shape} of {array_N.dtype}")
    if array_N.size and (array_N.min() < 0 or array_N.max() >= classes):
        raise ValueError(f"labels run from {array_N.min()} to {array_N.max()}; allowed are 0 … {classes - 1}")
    return array_N.astype(np.int64)


def _probabilities(prob_NC: ArrayLike, truth_N: ArrayLike) -> tuple[FloatArray, IntArray]:
    prob_NC = np.asarray(prob_NC, dtype=np.float64)
    if prob_NC.ndim != 2 or prob_NC.size == 0:
        raise ValueError(f"probabilities must be posts x labels and not empty, got shape {prob_NC.shape}")
    truth_N = _labels(truth_N, prob_NC.shape[1])
    if len(truth_N) != len(prob_NC):
        raise ValueError(f"{len(truth_N)} labels and {len(prob_NC)} rows of probabilities")
    return prob_NC, truth_N


def ratio(above: Any, below: Any) -> FloatArray:
    """above / below, and 0 where below is 0."""
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.asarray(np.divide(above, below, out=np.zeros_like(below), where=below != 0))


# --- answers of either form ---


def members(answers: ArrayLike, classes: int) -> BoolArray:
    """`is_in_NC`: whether each post has each label. Raises `ValueError` for a label outside 0 …
    classes-1, and for a table of another width.
    """
    found = np.asarray(answers)
    if found.ndim != 2:
        return np.asarray(_labels(found, classes)[:, None] == np.arange(classes))
    if found.dtype != np.bool_ or found.shape[1] != classes:
        raise ValueError(f"labels are {classes} bools a post, got shape {found.shape} of {found.dtype}")
    return found


def alike_N(a: ArrayLike, b: ArrayLike) -> BoolArray:
    """Whether each post has the same answer in both: the same label, or exactly the same labels."""
    same = np.asarray(a) == np.asarray(b)
    return np.asarray(same.all(axis=1) if same.ndim == 2 else same)


def distinct_members(classes: int, *answers: ArrayLike) -> tuple[list[BoolArray], IntArray]:
    """The K distinct tuples of answers, column by column in the form of `members`, and the number
    of posts of each.

    Their order does not depend on the order of the posts. Raises `ValueError` where `members` does,
    for columns of different lengths and for no post.
    """
    codes = [_codes_N(column, classes) for column in answers]
    if not codes[0][0].size or len({code_N.size for code_N, _ in codes}) > 1:
        raise ValueError(
            "resampling needs as many predictions as posts and at least one, got"
            f" {[code_N.size for code_N, _ in codes]}"
        )
    code_N, below = np.zeros_like(codes[0][0]), 1
    for column_N, classes_of_column in codes:
        if below > 2**62 // classes_of_column:  # many columns: number the tuples so far anew
            code_N = np.unique(code_N, return_inverse=True)[1].astype(np.int64)
            below = int(code_N.max()) + 1
        code_N, below = code_N * classes_of_column + column_N, below * classes_of_column
    _, first_K, rows_K = np.unique(code_N, return_index=True, return_counts=True)
    return [members(np.asarray(column)[first_K], classes) for column in answers], rows_K


def _codes_N(answers: ArrayLike, classes: int) -> tuple[IntArray, int]:
    """A number for each post's answer, equal for equal answers, and how many numbers there are."""
    found = np.asarray(answers)
    if found.ndim != 2:
        return _labels(found, classes), classes
    packed_NB = np.packbits(members(found, classes), axis=1)
    as_bytes_N = np.ascontiguousarray(packed_NB).view(f"S{packed_NB.shape[1]}").reshape(-1)
    sets, code_N = np.unique(as_bytes_N, return_inverse=True)
    return code_N.reshape(-1).astype(np.int64), max(1, len(sets))


def resamples(rows_K: IntArray, samples: int, seed: int) -> Iterator[IntArray]:
    """`samples` multinomial draws, each of all posts' number, in chunks of bounded memory."""
    generator = np.random.default_rng(seed)
    rows = int(rows_K.sum())
    chunk = max(1, _DRAWS_AT_A_TIME // len(rows_K))
    for start in range(0, samples, chunk):
        yield generator.multinomial(rows, rows_K / rows, size=min(chunk, samples - start))


def f1_of_resample_SC(draws_SK: IntArray, truth_KC: BoolArray, predicted_KC: BoolArray) -> FloatArray:
    """F1 of every label in each resample, from how often each distinct (truth, prediction) was
    drawn. Sparse matrices count only the few labels that a post has.
    """
    from scipy.sparse import csr_array

    draws_KS = np.ascontiguousarray(draws_SK.T, np.float64)  # counts below 2^53 stay exact

    def drawn_SC(is_in_KC: BoolArray) -> FloatArray:
        return np.asarray((csr_array(is_in_KC, dtype=np.float64).T @ draws_KS).T)

    both_SC = drawn_SC(truth_KC & predicted_KC)
    return ratio(2 * both_SC, drawn_SC(truth_KC) + drawn_SC(predicted_KC))


def _interval(scores_S: FloatArray) -> Interval:
    low, high = np.percentile(scores_S, [2.5, 97.5])
    return Interval(float(low), float(high))
