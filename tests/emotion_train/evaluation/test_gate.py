"""The gate: its bound is that of Clopper and Pearson, its walk stops at the first failure, and what
it promises of validation posts holds on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from emotion_train.evaluation.gate import (
    Answers,
    Gate,
    answers_of,
    fewest,
    fit_gates,
    lower_bound,
    lowest_threshold,
)
from emotion_train.evaluation.metrics import FloatArray
from emotion_train.evaluation.predictions import Predictions, SetPredictions
from tests.helpers.scored_sets import ids, scored

PRECISIONS = (0.8, 0.9, 0.95, 0.99)


def drawn(rows: int, chance: Callable[[FloatArray], FloatArray], seed: int = 0) -> Answers:
    """Answers whose chance to be right is a function of their confidence."""
    generator = np.random.default_rng(seed)
    confidence_N = generator.random(rows)
    return Answers(confidence_N.astype(np.float32), generator.random(rows) < chance(confidence_N))


def test_the_bound_is_that_of_the_beta_distribution_and_of_the_binomial_test() -> None:
    right_X, of_X = np.array([0, 1, 7, 58, 59, 300, 4990]), np.array([5, 1, 9, 59, 59, 400, 5000])
    bound_X = lower_bound(right_X, of_X)
    np.testing.assert_allclose(
        bound_X, np.nan_to_num(beta.ppf(0.05, right_X, of_X - right_X + 1)), rtol=1e-10
    )
    for right, of, bound in zip(right_X.tolist(), of_X.tolist(), bound_X.tolist(), strict=True):
        interval = binomtest(right, of, alternative="greater").proportion_ci(0.95, method="exact")
        assert bound == pytest.approx(interval.low, abs=1e-9)


def test_so_many_answers_are_needed() -> None:
    # all right: precision^n <= 0.05
    for precision in PRECISIONS:
        assert fewest(precision, 0) == math.ceil(math.log(0.05) / math.log(precision))
        for wrong in (0, 1, 2, 5):
            posts = fewest(precision, wrong)
            assert lower_bound(posts - wrong, posts) >= precision > lower_bound(posts - 1 - wrong, posts - 1)


def test_the_walk_ends_at_the_first_stop_that_fails() -> None:
    """600 right, then 400 of which half are: the share of all is 0.8 and the walk does not see that
    later ones are right again.
    """
    right_N = np.r_[np.ones(600, bool), np.tile([True, False], 200), np.ones(9000, bool)]
    answers = Answers(np.linspace(1, 0, len(right_N), dtype=np.float32), right_N)
    assert lower_bound(right_N.sum(), len(right_N)) > 0.97
    threshold = lowest_threshold(answers, 0.97)
    assert threshold is not None
    accepted, right = answers.above(threshold)
    assert 550 < accepted < 680
    assert lower_bound(right, accepted) >= 0.97


def test_one_early_wrong_answer_does_not_end_the_walk_and_all_wrong_ones_do() -> None:
    right_N = np.ones(1000, bool)
    confidence_N = np.linspace(1, 0.2, 1000, dtype=np.float32)
    right_N[0] = False
    threshold = lowest_threshold(Answers(confidence_N, right_N), 0.95)
    assert threshold is not None
    assert threshold == pytest.approx(0.2, abs=0.01)
    assert lowest_threshold(Answers(confidence_N, right_N[::-1].copy()), 0.95) is not None
    assert lowest_threshold(Answers(confidence_N, ~right_N), 0.8) is None


def test_too_few_answers_have_no_gate_and_just_enough_have_one() -> None:
    def of(rows: int) -> float | None:
        return lowest_threshold(
            Answers(np.linspace(1, 0.5, rows, dtype=np.float32), np.ones(rows, bool)), 0.95
        )

    assert (of(0), of(1), of(58)) == (None, None, None)
    assert of(59) == 0.5


def test_answers_of_equal_confidence_are_accepted_together() -> None:
    confidence_N = np.repeat(np.array([0.9, 0.6, 0.3], np.float32), 200)
    right_N = np.r_[np.ones(200, bool), np.arange(200) % 20 > 0, np.zeros(200, bool)]
    threshold = lowest_threshold(Answers(confidence_N, right_N), 0.9)
    assert threshold == 0.6
    assert Answers(confidence_N, right_N).above(threshold) == (400, 390)


def test_a_threshold_is_the_shortest_decimal_that_accepts_the_same_answers() -> None:
    answers = drawn(3000, lambda confidence_N: 0.3 + 0.7 * confidence_N, seed=4)
    threshold = lowest_threshold(answers, 0.9)
    assert threshold is not None
    lowest = answers.confidence_N[answers.confidence_N >= np.float32(threshold)].min()
    below = answers.confidence_N[answers.confidence_N < np.float32(threshold)].max()
    assert below < np.float32(threshold) <= lowest
    shorter = round(threshold, len(str(threshold)) - 3)
    assert not below < np.float32(shorter) <= lowest


def test_an_answer_of_several_labels_is_right_when_none_of_them_is_wrong() -> None:
    truth_NC = [[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    prob_NC = [[0.9, 0.4, 0.1], [0.9, 0.7, 0.1], [0.2, 0.1, 0.3], [0.1, 0.6, 0.1]]
    posts = SetPredictions.of(ids(4), truth_NC, prob_NC)
    # the first lacks a label and names no wrong one; the third has no answer
    over_all = answers_of(posts)
    np.testing.assert_allclose(over_all.confidence_N, [0.9, 0.7, 0.6])
    assert over_all.right_N.tolist() == [True, False, False]
    of_label = answers_of(posts, 1)
    np.testing.assert_allclose(of_label.confidence_N, [0.7, 0.6])
    assert of_label.right_N.tolist() == [False, False]


def test_gates_say_which_share_they_accept() -> None:
    generator = np.random.default_rng(3)
    truth_N = generator.integers(0, 3, 4000)
    logit_NC = generator.normal(size=(4000, 3)) + 3 * np.eye(3)[truth_N]
    prob_NC = np.exp(logit_NC) / np.exp(logit_NC).sum(axis=1, keepdims=True)
    posts = Predictions.of(ids(4000), truth_N, prob_NC)
    gates = fit_gates(posts, ("a", "b", "c"), (0.9, 0.97))
    assert [(gate.label, gate.precision) for gate in gates] == [
        (label, precision) for label in (None, "a", "b", "c") for precision in (0.9, 0.97)
    ]
    highest_N, predicted_N = posts.prob_NC.max(axis=1), posts.predicted_N
    for gate in gates:
        asked_N = predicted_N == "abc".index(gate.label) if gate.label else np.ones(4000, bool)
        accepted_N = asked_N & (highest_N >= np.float32(gate.threshold))
        assert gate.share == accepted_N.sum() / asked_N.sum()
        right = (predicted_N == truth_N)[accepted_N].sum()
        assert beta.ppf(0.05, right, accepted_N.sum() - right + 1) >= gate.precision
    assert gates[0].share is not None
    assert gates[1].share is not None
    assert gates[0].share > gates[1].share > 0.3
    nothing = fit_gates(scored(300, 1), ("a", "b", "c", "d"), (0.99,))
    assert nothing == tuple(
        Gate(label=label, precision=0.99, threshold=None, share=None) for label in (None, "a", "b", "c", "d")
    )
