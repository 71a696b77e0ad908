"""Differences between runs: their intervals cover what they promise, for posts and for seeds; the
tests against scipy.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from emotion_train.evaluation.comparison import (
    LEVEL,
    POWER,
    Outcome,
    Paired,
    Spread,
    holm,
    judged,
    mcnemar,
    paired_difference,
    resampled_f1,
    seeds_to_show,
    smallest_shown,
    student_quantile,
)
from emotion_train.evaluation.metrics import ClassCounts, paired_bootstrap_macro_f1

IntArray = NDArray[np.int64]
SHARES = np.array([0.4, 0.3, 0.2, 0.1])
CLASSES = len(SHARES)


def answers(
    rows: int, skill_R: list[float] | NDArray[np.float64], generator: np.random.Generator
) -> tuple[IntArray, list[IntArray]]:
    """Posts, of which some are hard for every run, and what runs of these skills say."""
    truth_N, hard_N = generator.choice(CLASSES, rows, p=SHARES), generator.normal(size=rows) / 2
    guesses = [generator.choice(CLASSES, rows, p=SHARES) for _ in skill_R]
    right = [skill + hard_N + generator.normal(size=rows) > 0 for skill in skill_R]
    return truth_N, [np.where(known, truth_N, guess) for known, guess in zip(right, guesses, strict=True)]


def expected_score(skill: float, of_seeds: float) -> float:
    generator = np.random.default_rng(9)
    skill_R = skill + of_seeds * generator.normal(size=60)
    truth_N, predicted_RN = answers(20_000, skill_R, generator)
    return float(np.mean([ClassCounts.of(truth_N, one_N, CLASSES).macro_f1 for one_N in predicted_RN]))


@pytest.mark.parametrize(
    ("low", "high", "p", "outcome"),
    [
        (0.01, 0.03, 0.04, "better"),
        (-0.03, -0.01, 0.04, "worse"),
        (0.01, 0.03, LEVEL, "open"),  # corrected for other comparisons
        (0.0, 0.03, 0.04, "open"),
        (-0.03, 0.0, 0.04, "open"),
    ],
)
def test_an_interval_that_holds_0_shows_no_difference(
    low: float, high: float, p: float, outcome: Outcome
) -> None:
    assert judged(Paired((low + high) / 2, low, high, 0.01), p) == outcome


def test_two_runs_have_the_interval_of_the_paired_bootstrap() -> None:
    truth_N, (a_N, b_N) = answers(500, [0.5, 0.7], np.random.default_rng(1))
    found = resampled_f1(truth_N, [b_N, a_N], CLASSES, 500, seed=3)
    paired, spread = paired_difference(found.f1_RC.mean(1), found.f1_SRC.mean(2), [1], [0], 100)
    expected = paired_bootstrap_macro_f1(truth_N, b_N, a_N, CLASSES, 500, seed=3)
    assert paired[:3] == pytest.approx(tuple(expected))
    assert spread.run is None
    assert spread.freedom == 0


def test_many_columns_are_resampled_as_few_are() -> None:
    truth_N, predicted_RN = answers(60, [0.5] * 40, np.random.default_rng(1))  # 4^41 codes
    whole = resampled_f1(truth_N, predicted_RN, CLASSES, 3000, seed=3)
    alone = resampled_f1(truth_N, predicted_RN[:1], CLASSES, 3000, seed=4)
    assert whole.f1_RC[0].tolist() == alone.f1_RC[0].tolist()
    np.testing.assert_allclose(whole.f1_SRC[:, 0].mean(0), alone.f1_SRC[:, 0].mean(0), atol=0.02)


def test_a_run_does_not_differ_from_itself() -> None:
    truth_N, (a_N,) = answers(300, [0.5], np.random.default_rng(1))
    found = resampled_f1(truth_N, [a_N, a_N], CLASSES, 300)
    paired, _ = paired_difference(found.f1_RC.mean(1), found.f1_SRC.mean(2), [0], [1], 0)
    assert tuple(paired) == (0, 0, 0, 1)
    assert tuple(mcnemar(truth_N, a_N, a_N)) == (0, 0, 1)


@pytest.mark.parametrize(("runs", "of_seeds"), [((1, 1), 0.0), ((3, 3), 0.0), ((3, 3), 0.2), ((1, 3), 0.1)])
def test_intervals_hold_a_planted_difference_nineteen_times_out_of_twenty(
    runs: tuple[int, int], of_seeds: float
) -> None:
    """Where seeds differ in nothing but chance, where they differ more than posts do, and where one
    config has a single run.
    """
    first, second = runs
    planted = expected_score(0.7, of_seeds) - expected_score(0.5, of_seeds)
    generator = np.random.default_rng(0)
    held = found = 0
    for _ in range(120):
        skill_R = np.repeat([0.5, 0.7], runs) + of_seeds * generator.normal(size=first + second)
        truth_N, predicted_RN = answers(150, skill_R, generator)
        resampled = resampled_f1(truth_N, predicted_RN, CLASSES, 200)
        paired, _ = paired_difference(
            resampled.f1_RC.mean(1),
            resampled.f1_SRC.mean(2),
            range(first),
            range(first, first + second),
            99,
        )
        held += paired.low <= planted <= paired.high
        found += paired.low > 0
        assert (paired.p < 0.05) == (not paired.low <= 0 <= paired.high) or abs(paired.p - 0.05) < 0.02
    assert 108 <= held <= 119
    assert found >= 5


def test_a_large_planted_difference_is_found() -> None:
    truth_N, predicted_RN = answers(400, [0.2, 0.25, 0.3, 1.2, 1.25, 1.3], np.random.default_rng(5))
    found = resampled_f1(truth_N, predicted_RN, CLASSES, 500)
    paired, spread = paired_difference(
        found.f1_RC.mean(1), found.f1_SRC.mean(2), range(3), range(3, 6), different=300
    )
    assert 0 < paired.low < paired.difference < paired.high
    assert paired.p < 0.01
    assert spread.freedom == 4
    assert spread.run == pytest.approx(
        (found.f1_RC[:3].mean(1).var(ddof=1) + found.f1_RC[3:].mean(1).var(ddof=1)) / 2
    )


@pytest.mark.parametrize("different", [1, 5, 6])
def test_a_handful_of_posts_tells_nothing(different: int) -> None:
    """A sign test of five posts cannot reach p = 0.05, however they fall."""
    truth_N = np.repeat(np.arange(2), 20)
    worse_N = truth_N.copy()
    worse_N[:different] = 1
    found = resampled_f1(truth_N, [worse_N, truth_N], 2, 500)
    paired, _ = paired_difference(found.f1_RC.mean(1), found.f1_SRC.mean(2), [0], [1], different)
    judged = stats.binomtest(different, different, 0.5).pvalue
    assert (paired.low > 0) == (judged < 0.05)
    assert (paired_bootstrap_macro_f1(truth_N, truth_N, worse_N, 2).low > 0) == (judged < 0.05)
    assert paired.p >= judged or different > 5


# --- against scipy ---


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 6), (3, 3), (5, 12), (40, 61), (700, 640)])
def test_mcnemar_is_scipy_s_binomial_test(first: int, second: int) -> None:
    truth_N = np.zeros(first + second + 10, dtype=np.int64)
    a_N, b_N = truth_N.copy(), truth_N.copy()
    b_N[:first] = 1
    a_N[first : first + second] = 1
    found = mcnemar(truth_N, a_N, b_N)
    assert (found.only_first, found.only_second) == (first, second)
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert found.p == pytest.approx(expected)


def test_mcnemar_of_very_many_posts_is_still_near_scipy_s() -> None:
    truth_N = np.zeros(20_500, dtype=np.int64)
    a_N, b_N = truth_N.copy(), truth_N.copy()
    b_N[:10_100] = 1
    a_N[10_100:20_500] = 1
    assert mcnemar(truth_N, a_N, b_N).p == pytest.approx(
        stats.binomtest(10_100, 20_500, 0.5).pvalue, rel=1e-3
    )


@pytest.mark.parametrize("freedom", [2, 4, 10, 100])
@pytest.mark.parametrize("share", [0.8, 0.975])
def test_quantiles_of_student_are_scipy_s(freedom: int, share: float) -> None:
    assert student_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=0.04)


def test_holm_is_the_step_down_of_its_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    draw = np.random.default_rng(0)
    false = sum(min(holm(draw.uniform(size=8))) < 0.05 for _ in range(2000))
    assert 70 <= false <= 130  # 5 % of 2000, where each alone would give 34 %


# --- how many seeds ---


def test_the_seeds_that_are_named_show_the_difference_in_eight_of_ten_repeats() -> None:
    """Nine runs of one recipe spread from 0.570 to 0.617: how many of each show 0.02?"""
    spread = Spread(posts=0.004**2, run=0.015**2, freedom=16)
    seeds = seeds_to_show(0.02, spread)
    assert seeds is not None
    draw, repeats = np.random.default_rng(0), 4000
    for count, enough in ((seeds, True), (seeds // 2, False)):
        a, b = draw.normal(0, 0.015, (2, repeats, count))
        difference = 0.02 + draw.normal(0, 0.004, repeats) + b.mean(1) - a.mean(1)
        variance = (a.var(1, ddof=1) + b.var(1, ddof=1)) / count + 0.004**2
        shown = np.abs(difference) > stats.t.ppf(0.975, 2 * count - 2) * np.sqrt(variance)
        assert (shown.mean() > POWER - 0.02) == enough


def test_no_seeds_help_where_the_posts_are_too_few_or_nothing_is_known_of_seeds() -> None:
    assert seeds_to_show(0.01, Spread(posts=0.01**2, run=0.001**2, freedom=4)) is None
    assert seeds_to_show(0.5, Spread(posts=0.01**2, run=None, freedom=0)) is None
    assert seeds_to_show(0.0, Spread(posts=0.0, run=0.01, freedom=4)) is None


def test_the_smallest_difference_that_seeds_show_is_the_one_that_needs_them() -> None:
    for seeds in (2, 3, 9):
        least = smallest_shown(0.015**2, seeds)
        assert seeds_to_show(1.001 * least, Spread(0.0, 0.015**2, 4)) == seeds
