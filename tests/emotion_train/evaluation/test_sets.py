"""Figures of several labels a post against scikit-learn's, intervals against resampling post by
post.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from emotion_train.evaluation.metrics import BoolArray, ClassCounts, expected_calibration_error
from emotion_train.evaluation.predictions import SetPredictions
from emotion_train.evaluation.sets import (
    SetCounts,
    bootstrap_macro_f1_of_sets,
    calibration_of_labels,
    mistaken,
    paired_bootstrap_of_sets,
    set_scores,
    together,
)


@st.composite
def answered(draw: st.DrawFn) -> SetPredictions:
    """Posts with any labels, none among them; some labels and answers may not occur, and many
    probabilities are equal.
    """
    rows, classes, seed = draw(st.integers(1, 40)), draw(st.integers(2, 7)), draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    share_C = generator.choice([0.0, 0.1, 0.5, 1.0], classes)
    truth_NC = generator.random((rows, classes)) < share_C
    prob_NC = generator.random((rows, classes)).round(draw(st.sampled_from([1, 3])))
    return SetPredictions.of(map(str, range(rows)), truth_NC, prob_NC, draw(st.sampled_from([0.2, 0.5, 1.0])))


def several(rows: int, classes: int, seed: int, error: float = 0.1) -> tuple[BoolArray, BoolArray]:
    """Labels with shares 1/2, 1/3, …, and answers of which some are wrong."""
    generator = np.random.default_rng(seed)
    truth_NC = generator.random((rows, classes)) < 1 / np.arange(2, classes + 2)
    return truth_NC, truth_NC ^ (generator.random((rows, classes)) < error)


def macro_f1(truth_NC: BoolArray, predicted_NC: BoolArray) -> float:
    return float(sk.f1_score(truth_NC, predicted_NC, average="macro", zero_division=0))


@given(answered())
def test_every_figure_by_label_is_that_of_scikit_learn(predictions: SetPredictions) -> None:
    truth_NC, predicted_NC = predictions.truth_NC, predictions.predicted_NC
    counts = SetCounts(predictions.counts())
    precision_C, recall_C, f1_C, support_C = sk.precision_recall_fscore_support(
        truth_NC, predicted_NC, average=None, zero_division=0
    )
    np.testing.assert_allclose(counts.precision_C, precision_C)
    np.testing.assert_allclose(counts.recall_C, recall_C)
    np.testing.assert_allclose(counts.f1_C, f1_C)
    np.testing.assert_array_equal(counts.support_C, support_C)
    np.testing.assert_array_equal(counts.predicted_C, predicted_NC.sum(0))
    assert counts.macro_f1 == pytest.approx(macro_f1(truth_NC, predicted_NC))
    assert counts.micro_f1 == pytest.approx(
        sk.f1_score(truth_NC, predicted_NC, average="micro", zero_division=0)
    )
    assert counts.labels_without_support == (support_C == 0).sum()


@given(answered())
def test_every_figure_by_post_is_that_of_scikit_learn(predictions: SetPredictions) -> None:
    """A post without labels that is answered with none is right, and so is scikit-learn's 0 / 0."""
    truth_NC, predicted_NC = predictions.truth_NC, predictions.predicted_NC
    scores = set_scores(predictions)
    by_post = {"average": "samples", "zero_division": 1}
    assert scores.samples_f1 == pytest.approx(sk.f1_score(truth_NC, predicted_NC, **by_post))
    assert scores.jaccard == pytest.approx(sk.jaccard_score(truth_NC, predicted_NC, **by_post))
    assert scores.exact_match == pytest.approx(sk.accuracy_score(truth_NC, predicted_NC))


@given(answered())
def test_average_precision_is_that_of_scikit_learn(predictions: SetPredictions) -> None:
    truth_NC, prob_NC = predictions.truth_NC, predictions.prob_NC
    expected = [
        sk.average_precision_score(truth_NC[:, label], prob_NC[:, label]) if truth_NC[:, label].any() else 0.0
        for label in range(truth_NC.shape[1])
    ]
    scores = set_scores(predictions)
    np.testing.assert_allclose(scores.average_precision_C, expected, atol=1e-12)
    assert scores.mean_average_precision == pytest.approx(np.mean(expected))


@given(answered())
def test_tables_of_labels_are_counted_post_by_post(predictions: SetPredictions) -> None:
    truth_NC, predicted_NC = predictions.truth_NC, predictions.predicted_NC
    classes = truth_NC.shape[1]
    both, wrong = (np.zeros((classes, classes), int) for _ in range(2))
    for truth_C, predicted_C in zip(truth_NC, predicted_NC, strict=True):
        both += np.outer(truth_C, truth_C)
        wrong += np.outer(truth_C & ~predicted_C, predicted_C & ~truth_C)
    np.testing.assert_array_equal(together(truth_NC, truth_NC), both)
    np.testing.assert_array_equal(mistaken(truth_NC, predicted_NC), wrong)


def test_tables_of_labels_do_not_depend_on_how_many_posts_are_counted_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth_NC, predicted_NC = several(100, 5, seed=1)
    whole = mistaken(truth_NC, predicted_NC)
    monkeypatch.setattr("emotion_train.evaluation.sets._CELLS_AT_A_TIME", 35)
    np.testing.assert_array_equal(mistaken(truth_NC, predicted_NC), whole)


@given(answered())
def test_a_label_s_calibration_is_that_of_two_classes(predictions: SetPredictions) -> None:
    """Where all probabilities are at least a half, that of having the label is the highest."""
    prob_NC = np.maximum(predictions.prob_NC, np.float32(0.5)) * np.float32(0.999) + np.float32(0.001)
    found = calibration_of_labels(prob_NC, predictions.truth_NC)
    for label, error in enumerate(found.error_C):
        of_two_N2 = np.stack([prob_NC[:, label], 1 - prob_NC[:, label].astype(np.float64)], axis=1)
        expected = expected_calibration_error(of_two_N2, (~predictions.truth_NC[:, label]).astype(int))
        assert error == pytest.approx(expected.error)
    assert sum(one.rows for one in found.overall.bins) == prob_NC.size
    assert found.overall.error <= found.error_C.mean() + 1e-12  # bins of all may cancel out, not add up


def test_interval_is_that_of_resampling_post_by_post() -> None:
    truth_NC, predicted_NC = several(300, 5, seed=1)
    generator = np.random.default_rng(2)
    picks = [generator.integers(0, 300, 300) for _ in range(1000)]
    slow = [
        SetCounts(SetPredictions.of(map(str, pick), truth_NC[pick], predicted_NC[pick]).counts()).macro_f1
        for pick in picks
    ]
    np.testing.assert_allclose(
        bootstrap_macro_f1_of_sets(truth_NC, predicted_NC, samples=3000, seed=3),
        np.percentile(slow, [2.5, 97.5]),
        atol=0.005,
    )


def test_paired_interval_is_that_of_resampling_post_by_post() -> None:
    truth_NC, a_NC = several(300, 5, seed=1)
    b_NC = a_NC ^ (np.random.default_rng(5).random(a_NC.shape) < 0.03)
    generator = np.random.default_rng(2)
    slow = []
    for _ in range(1000):
        pick = generator.integers(0, 300, 300)
        scores = [
            SetCounts(SetPredictions.of(map(str, pick), truth_NC[pick], x_NC[pick]).counts()).macro_f1
            for x_NC in (a_NC, b_NC)
        ]
        slow.append(scores[0] - scores[1])
    found = paired_bootstrap_of_sets(truth_NC, a_NC, b_NC, samples=3000, seed=3)
    assert found.difference == pytest.approx(macro_f1(truth_NC, a_NC) - macro_f1(truth_NC, b_NC))
    np.testing.assert_allclose((found.low, found.high), np.percentile(slow, [2.5, 97.5]), atol=0.004)


def test_intervals_do_not_depend_on_the_order_of_posts_nor_on_the_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth_NC, predicted_NC = several(200, 4, seed=1)
    whole = bootstrap_macro_f1_of_sets(truth_NC, predicted_NC, 300, seed=7)
    shuffled = np.random.default_rng(0).permutation(200)
    assert bootstrap_macro_f1_of_sets(truth_NC[shuffled], predicted_NC[shuffled], 300, seed=7) == whole
    monkeypatch.setattr("emotion_train.evaluation.metrics._DRAWS_AT_A_TIME", 50)
    assert bootstrap_macro_f1_of_sets(truth_NC, predicted_NC, 300, seed=7) == whole


def test_posts_of_one_label_each_have_the_interval_of_one_label() -> None:
    """The same posts said in both ways are the same classifier."""
    generator = np.random.default_rng(0)
    truth_N, predicted_N = generator.integers(0, 4, (2, 300))
    truth_NC, predicted_NC = (np.eye(4, dtype=bool)[x_N] for x_N in (truth_N, predicted_N))
    counts = SetCounts(SetPredictions.of(map(str, range(300)), truth_NC, predicted_NC).counts())
    assert counts.macro_f1 == pytest.approx(ClassCounts.of(truth_N, predicted_N, 4).macro_f1)
    found = bootstrap_macro_f1_of_sets(truth_NC, predicted_NC, 4000)
    from emotion_train.evaluation.metrics import bootstrap_macro_f1

    np.testing.assert_allclose(found, bootstrap_macro_f1(truth_N, predicted_N, 4, 4000), atol=0.004)


@pytest.mark.parametrize("different", [5, 6])
def test_a_handful_of_posts_with_other_answers_tells_nothing(different: int) -> None:
    truth_NC = np.eye(2, dtype=bool)[np.repeat([0, 1], 20)]
    worse_NC = truth_NC.copy()
    worse_NC[:different] = ~worse_NC[:different]  # both labels of a post are one post
    assert (paired_bootstrap_of_sets(truth_NC, truth_NC, worse_NC).low > 0) == (different > 5)


def test_no_post_is_refused() -> None:
    nothing = SetPredictions.of([], np.zeros((0, 3)), np.zeros((0, 3)))
    for figure in (
        lambda: set_scores(nothing),
        lambda: bootstrap_macro_f1_of_sets(nothing.truth_NC, nothing.predicted_NC),
        lambda: calibration_of_labels(nothing.prob_NC, nothing.truth_NC),
    ):
        with pytest.raises(ValueError, match="at least one"):
            figure()
