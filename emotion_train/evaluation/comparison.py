"""Whether one classifier is better than another on the same posts: the interval of the difference
counts the posts, and the seeds where several runs were trained of one config.

Each resample draws the posts anew, for all runs at once, so that posts which are hard for every
run cancel out. Seeds are few, and drawing three of three with replacement makes them look more
alike than they are. So their mean is drawn from Student's t of their spread, which is assumed to be
the same in both groups. The differences of single runs on these posts are part of that spread; they
are taken out of the posts' share and so count once.

The price: one multinomial draw a resample over the distinct rows of (truth, predictions), which are
few for two runs and as many as the posts for many runs: 2000 resamples of 100,000 posts take about
half a minute, and hold 8 bytes a resample, run and label.

Answers are of either form that `evaluation/metrics.py` knows: one label a post, or several.

Letters: N posts, C labels, R runs, S resamples, K distinct rows of answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, sqrt
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emotion_train.evaluation.metrics import (
    FEWEST_DIFFERENT,
    alike_N,
    distinct_members,
    f1_of_resample_SC,
    resamples,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LEVEL = 0.05
POWER = 0.8
MOST_SEEDS = 100  # more are not proposed
MOST_TIMES = 20  # times the present posts; more are not proposed
_EXACT = 10_000
_MANY = 10**6  # degrees of freedom of a known variance
_DRAWS_OF_SEEDS = 5  # for each resample: the tails of Student's t need more draws than the posts do


class Paired(NamedTuple):
    """`difference` with its 95 % interval, and `p`, twice the share of draws on the other side of
    0.
    """

    difference: float
    low: float
    high: float
    p: float


Outcome = Literal["better", "open", "worse"]


def judged(paired: Paired, p: float) -> Outcome:
    """Whether the second classifier is better; open where its interval holds 0, or where `p`,
    corrected for all comparisons, is not below `LEVEL`.
    """
    if p >= LEVEL or paired.low <= 0 <= paired.high:
        return "open"
    return "better" if paired.difference > 0 else "worse"


class Spread(NamedTuple):
    """The variances of a difference between two groups' means.

    `posts` is the variance from these posts, once single runs are averaged out; `run` the variance
    of one run around its config's mean, None where no config has two runs; `freedom` the degrees of
    freedom of `run`.
    """

    posts: float
    run: float | None
    freedom: int


class McNemar(NamedTuple):
    """Posts that only one of the two got right, and the probability of so uneven a division by
    chance.
    """

    only_first: int
    only_second: int
    p: float


class Resampled(NamedTuple):
    """F1 by run and label: of all posts, and of each resample."""

    f1_RC: FloatArray
    f1_SRC: FloatArray


def resampled_f1(
    truth: ArrayLike, predicted_R: Sequence[ArrayLike], classes: int, samples: int = 2000, seed: int = 0
) -> Resampled:
    """F1 of every run and label on `samples` resamples of the posts, the same for all runs.

    Raises `ValueError` for different numbers of posts and for none.
    """
    (truth_KC, *predicted_RKC), rows_K = distinct_members(classes, truth, *predicted_R)

    def scores(draws_SK: IntArray) -> FloatArray:
        return np.stack([f1_of_resample_SC(draws_SK, truth_KC, one_KC) for one_KC in predicted_RKC], axis=1)

    drawn_SRC = np.concatenate([*map(scores, resamples(rows_K, samples, seed))])
    return Resampled(scores(rows_K[None])[0], drawn_SRC)


def paired_difference(
    score_R: ArrayLike,
    score_SR: ArrayLike,
    first: Sequence[int],
    second: Sequence[int],
    different: int,
    seed: int = 0,
) -> tuple[Paired, Spread]:
    """The mean score of the runs `second` minus the mean score of `first`, with its interval over
    posts and, where a group has several runs, seeds.

    `different` is the number of posts that the two groups answer differently: with fewer than
    `FEWEST_DIFFERENT` no test can show a difference, and the interval holds 0.
    """
    score_R, score_SR = np.asarray(score_R, np.float64), np.asarray(score_SR, np.float64)
    difference = float(score_R[list(second)].mean() - score_R[list(first)].mean())
    drawn_S = score_SR[:, list(second)].mean(axis=1) - score_SR[:, list(first)].mean(axis=1)
    spread = _spread(score_R, score_SR, drawn_S, first, second)
    if spread.run is not None:
        drawn_S = _with_seeds(drawn_S, spread, 1 / len(first) + 1 / len(second), seed)
    low, high = np.percentile(drawn_S, [2.5, 97.5]).tolist()
    p = _two_sided(drawn_S)
    if different < FEWEST_DIFFERENT:
        low, high, p = min(low, 0.0), max(high, 0.0), max(p, min(1.0, 2 * 0.5**different))
    return Paired(difference, low, high, p), spread


def _spread(
    score_R: FloatArray,
    score_SR: FloatArray,
    drawn_S: FloatArray,
    first: Sequence[int],
    second: Sequence[int],
) -> Spread:
    freedom = len(first) + len(second) - 2
    if not freedom:
        return Spread(float(drawn_S.var()), None, 0)
    squares = own = 0.0
    for group in (list(first), list(second)):
        squares += float(((score_R[group] - score_R[group].mean()) ** 2).sum())
        around_SR = score_SR[:, group] - score_SR[:, group].mean(axis=1, keepdims=True)
        own += float(around_SR.var(axis=0).sum())
    twice = own / freedom * (1 / len(first) + 1 / len(second))  # counted in `run` too
    return Spread(max(0.0, float(drawn_S.var()) - twice), squares / freedom, freedom)


def _with_seeds(drawn_S: FloatArray, spread: Spread, share: float, seed: int) -> FloatArray:
    """The draws, scaled to the posts' variance of `spread`, with the seeds' variance added."""
    assert spread.run is not None
    centre, variance = drawn_S.mean(), drawn_S.var()
    posts_S = (drawn_S - centre) * (sqrt(spread.posts / variance) if variance else 0.0)
    student = np.random.default_rng([seed, 1]).standard_t(
        spread.freedom, size=(_DRAWS_OF_SEEDS, len(drawn_S))
    )
    return np.asarray(centre + posts_S + sqrt(spread.run * share) * student).reshape(-1)


def _two_sided(drawn_S: FloatArray) -> float:
    below, above = int((drawn_S <= 0).sum()), int((drawn_S >= 0).sum())
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(drawn_S))))


def holm(p: Iterable[float]) -> list[float]:
    """Each p corrected for all comparisons (Holm 1979): where all corrected p below `LEVEL` count
    as findings, the chance of any false one is below `LEVEL`.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    given = list(p)
    corrected, highest = [0.0] * len(given), 0.0
    for rank, place in enumerate(sorted(range(len(given)), key=given.__getitem__)):
        highest = max(highest, min(1.0, (len(given) - rank) * given[place]))
        corrected[place] = highest
    return corrected


def mcnemar(truth: ArrayLike, first: ArrayLike, second: ArrayLike) -> McNemar:
    """McNemar's exact test (1947) of whether the posts that only one classifier got right divide
    evenly between the two. A post with several labels is right when it is answered with all of them
    and no other.
    """
    first_right_N, second_right_N = alike_N(first, truth), alike_N(second, truth)
    only_first = int((first_right_N & ~second_right_N).sum())
    only_second = int((~first_right_N & second_right_N).sum())
    return McNemar(only_first, only_second, _even_chance(only_first, only_second))


def _even_chance(one: int, other: int) -> float:
    """The two-sided p of these results of a fair coin: exact up to `_EXACT` tosses, else by the
    normal curve with a continuity correction.
    """
    total, few = one + other, min(one, other)
    if total > _EXACT:
        return min(1.0, 2 * NormalDist().cdf((few + 0.5 - total / 2) / sqrt(total / 4)))
    ways, term = 0, 1
    for heads in range(few + 1):
        ways += term
        term = term * (total - heads) // (heads + 1)
    return min(1.0, float(2 * ways / 2**total))


def seeds_to_show(difference: float, spread: Spread) -> int | None:
    """The number of seeds of each config that shows a difference of this size in `POWER` of all
    repeats; None where more than `MOST_SEEDS` would be needed, or the spread of seeds is not known.
    """
    if spread.run is None:
        return None
    for seeds in range(2, MOST_SEEDS + 1):
        if _shown(difference, spread.posts + 2 * spread.run / seeds, 2 * seeds - 2):
            return seeds
    return None


def posts_to_show(difference: float, spread: Spread, first: int, second: int, posts: int) -> int | None:
    """The number of posts on which `first` and `second` runs show a difference of this size in
    `POWER` of all repeats, where `posts` gave this spread; None where more than `MOST_TIMES` as
    many would be needed.
    """
    of_seeds = (spread.run or 0.0) * (1 / first + 1 / second)
    needed = _needed(spread.freedom or _MANY) ** 2
    room = difference**2 - needed * of_seeds
    if room <= 0 or needed * spread.posts > MOST_TIMES * room:
        return None
    return ceil(posts * needed * spread.posts / room)


def smallest_shown(run_variance: float, seeds: int) -> float:
    """The difference between two configs that `seeds` of each show in `POWER` of all repeats, on an
    unlimited number of posts.
    """
    return sqrt(2 * run_variance / seeds) * _needed(2 * seeds - 2)


def _shown(difference: float, variance: float, freedom: int) -> bool:
    return abs(difference) > _needed(freedom) * sqrt(variance)


def _needed(freedom: int) -> float:
    """The number of standard errors that a true difference needs to be shown in `POWER` of all
    repeats.
    """
    return student_quantile(1 - LEVEL / 2, freedom) + student_quantile(POWER, freedom)


def student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t, within 4 % from two degrees of freedom on (Fisher and Cornish
    1960).
    """
    z = NormalDist().inv_cdf(share)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
