"""Scores against scikit-learn's, intervals against resampling row by row."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from emotion_train.evaluation.metrics import (
    ClassCounts,
    FloatArray,
    IntArray,
    bootstrap_macro_f1,
    confusion,
    distinct_members,
    expected_calibration_error,
    f1_of_resample_SC,
    log_loss,
    paired_bootstrap_macro_f1,
    resamples,
    wilson_f1,
)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[IntArray, IntArray, int]:
    """Truth and prediction over 2 to 8 labels, of which some may be absent from either."""
    classes = draw(st.integers(2, 8))
    pairs = draw(
        st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=60)
    )
    truth_N, predicted_N = np.array(pairs).T
    return truth_N, predicted_N, classes


@st.composite
def probabilities(draw: st.DrawFn) -> tuple[FloatArray, IntArray]:
    classes, rows, seed = draw(st.integers(2, 6)), draw(st.integers(1, 50)), draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    concentration = draw(st.sampled_from([0.01, 0.3, 1.0, 10.0]))
    return generator.dirichlet(np.full(classes, concentration), rows), generator.integers(0, classes, rows)


def skewed(rows: int, classes: int, accuracy: float, seed: int) -> tuple[IntArray, IntArray]:
    """Labels with frequencies 1, 1/2, 1/3 …, and predictions right with the given probability."""
    generator = np.random.default_rng(seed)
    share_C = 1 / np.arange(1, classes + 1)
    truth_N = generator.choice(classes, rows, p=share_C / share_C.sum())
    guess_N = generator.choice(classes, rows, p=share_C / share_C.sum())
    return truth_N, np.where(generator.random(rows) < accuracy, truth_N, guess_N)


@given(labelled())
def test_every_score_is_that_of_scikit_learn(example: tuple[IntArray, IntArray, int]) -> None:
    truth_N, predicted_N, classes = example
    counts = ClassCounts.of(truth_N, predicted_N, classes)
    labels = range(classes)
    np.testing.assert_array_equal(counts.counts_CC, sk.confusion_matrix(truth_N, predicted_N, labels=labels))
    precision_C, recall_C, f1_C, support_C = sk.precision_recall_fscore_support(
        truth_N, predicted_N, labels=labels, zero_division=0
    )
    np.testing.assert_allclose(counts.precision_C, precision_C)
    np.testing.assert_allclose(counts.recall_C, recall_C)
    np.testing.assert_allclose(counts.f1_C, f1_C)
    np.testing.assert_array_equal(counts.support_C, support_C)
    assert counts.macro_f1 == pytest.approx(
        sk.f1_score(truth_N, predicted_N, labels=labels, average="macro", zero_division=0)
    )
    assert counts.weighted_f1 == pytest.approx(
        sk.f1_score(truth_N, predicted_N, labels=labels, average="weighted", zero_division=0)
    )
    assert counts.accuracy == pytest.approx(sk.accuracy_score(truth_N, predicted_N))
    assert counts.labels_without_support == classes - len(set(truth_N.tolist()))


@given(labelled(), st.integers(0, 60))
def test_counts_of_two_ranks_add_up_to_the_counts_of_all_posts(
    example: tuple[IntArray, IntArray, int], cut: int
) -> None:
    truth_N, predicted_N, classes = example
    both = confusion(truth_N[:cut], predicted_N[:cut], classes) + confusion(
        truth_N[cut:], predicted_N[cut:], classes
    )
    np.testing.assert_array_equal(both, confusion(truth_N, predicted_N, classes))


def test_no_post_at_all_scores_zero() -> None:
    counts = ClassCounts.of([], [], 3)
    assert (
        counts.rows,
        counts.macro_f1,
        counts.weighted_f1,
        counts.accuracy,
        counts.labels_without_support,
    ) == (0, 0.0, 0.0, 0.0, 3)


@pytest.mark.parametrize(
    ("truth", "predicted"),
    [([0, 3], [0, 1]), ([0, 1], [0, -1]), ([0.0, 1.0], [0, 1]), ([0, 1], [0]), ([[0]], [[0]])],
)
def test_labels_that_cannot_be_counted_are_refused(truth: Any, predicted: Any) -> None:
    with pytest.raises(ValueError, match=r"labels"):
        confusion(truth, predicted, 3)


@given(probabilities())
def test_log_loss_is_that_of_scikit_learn(example: tuple[FloatArray, IntArray]) -> None:
    prob_NC, truth_N = example
    assert log_loss(prob_NC, truth_N) == pytest.approx(
        sk.log_loss(truth_N, prob_NC, labels=range(prob_NC.shape[1]))
    )


@given(probabilities(), st.integers(1, 20))
def test_calibration_error_is_the_definition_bin_by_bin(
    example: tuple[FloatArray, IntArray], bins: int
) -> None:
    prob_NC, truth_N = example
    calibration = expected_calibration_error(prob_NC, truth_N, bins)
    confidence_N, correct_N = prob_NC.max(axis=1), prob_NC.argmax(axis=1) == truth_N
    error = 0.0
    for one in calibration.bins:
        inside_N = (confidence_N * bins > one.low * bins) & (
            np.ceil(confidence_N * bins) == round(one.high * bins)
        )
        assert one.rows == inside_N.sum()
        if one.confidence is None or one.accuracy is None:
            assert (one.rows, one.confidence, one.accuracy) == (0, None, None)
            continue
        assert one.confidence == pytest.approx(confidence_N[inside_N].mean())
        assert one.accuracy == pytest.approx(correct_N[inside_N].mean())
        error += inside_N.mean() * abs(one.confidence - one.accuracy)
    assert sum(one.rows for one in calibration.bins) == len(truth_N)
    assert calibration.error == pytest.approx(error)


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not() -> None:
    sure_NC = np.eye(4)
    assert expected_calibration_error(sure_NC, np.arange(4)).error == 0
    assert expected_calibration_error(sure_NC, (np.arange(4) + 1) % 4).error == 1
    assert log_loss(sure_NC, np.arange(4)) == pytest.approx(0, abs=1e-12)


def slow_macro_f1(truth_N: IntArray, predicted_N: IntArray, classes: int) -> float:
    return ClassCounts.of(truth_N, predicted_N, classes).macro_f1


def test_interval_is_that_of_resampling_row_by_row() -> None:
    truth_N, predicted_N = skewed(400, 5, 0.6, seed=1)
    generator = np.random.default_rng(2)
    picks = [generator.integers(0, 400, 400) for _ in range(1500)]
    expected = np.percentile(
        [slow_macro_f1(truth_N[pick], predicted_N[pick], 5) for pick in picks], [2.5, 97.5]
    )
    # the ends scatter by about 0.002 between two sets of 1500 resamples; the interval is 0.11 wide
    np.testing.assert_allclose(
        bootstrap_macro_f1(truth_N, predicted_N, 5, samples=4000, seed=3), expected, atol=0.006
    )


def test_paired_interval_is_that_of_resampling_row_by_row() -> None:
    truth_N, a_N = skewed(400, 5, 0.6, seed=1)
    b_N = np.where(np.random.default_rng(5).random(400) < 0.9, a_N, 0)
    generator = np.random.default_rng(2)
    picks = [generator.integers(0, 400, 400) for _ in range(1000)]
    slow = [
        slow_macro_f1(truth_N[pick], a_N[pick], 5) - slow_macro_f1(truth_N[pick], b_N[pick], 5)
        for pick in picks
    ]
    found = paired_bootstrap_macro_f1(truth_N, a_N, b_N, 5, samples=4000, seed=3)
    assert found.difference == pytest.approx(slow_macro_f1(truth_N, a_N, 5) - slow_macro_f1(truth_N, b_N, 5))
    np.testing.assert_allclose((found.low, found.high), np.percentile(slow, [2.5, 97.5]), atol=0.004)


def test_interval_covers_the_true_score_about_nineteen_times_out_of_twenty() -> None:
    def classify(rows: int, seed: int) -> tuple[IntArray, IntArray]:
        return skewed(rows, 4, 0.5, seed)

    truth_N, predicted_N = classify(1_000_000, 0)
    true_score = ClassCounts.of(truth_N, predicted_N, 4).macro_f1
    hits = 0
    for seed in range(1, 201):
        truth_N, predicted_N = classify(600, seed)
        interval = bootstrap_macro_f1(truth_N, predicted_N, 4, samples=500, seed=seed)
        hits += interval.low <= true_score <= interval.high
    assert 180 <= hits <= 199


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    truth_N, a_N = skewed(1000, 6, 0.6, seed=1)
    b_N = np.where(np.random.default_rng(5).random(1000) < 0.95, a_N, 0)
    paired = paired_bootstrap_macro_f1(truth_N, a_N, b_N, 6)
    a, b = bootstrap_macro_f1(truth_N, a_N, 6), bootstrap_macro_f1(truth_N, b_N, 6)
    assert paired.high - paired.low < 0.7 * max(a.high - a.low, b.high - b.low)


def test_a_classifier_does_not_differ_from_itself() -> None:
    truth_N, a_N = skewed(300, 4, 0.6, seed=1)
    assert paired_bootstrap_macro_f1(truth_N, a_N, a_N, 4) == (0, 0, 0)


def test_same_seed_same_interval_for_any_order_of_posts() -> None:
    truth_N, predicted_N = skewed(500, 4, 0.6, seed=1)
    shuffled = np.random.default_rng(0).permutation(500)
    first = bootstrap_macro_f1(truth_N, predicted_N, 4, seed=7)
    assert first == bootstrap_macro_f1(truth_N[shuffled], predicted_N[shuffled], 4, seed=7)
    assert first != bootstrap_macro_f1(truth_N, predicted_N, 4, seed=8)


def test_chunks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    truth_N, predicted_N = skewed(500, 4, 0.6, seed=1)
    whole = bootstrap_macro_f1(truth_N, predicted_N, 4, samples=300)
    monkeypatch.setattr("emotion_train.evaluation.metrics._DRAWS_AT_A_TIME", 50)
    assert bootstrap_macro_f1(truth_N, predicted_N, 4, samples=300) == whole


def test_intervals_are_narrow_for_many_posts_and_labels() -> None:
    truth_N, predicted_N = skewed(1_000_000, 40, 0.6, seed=1)
    interval = bootstrap_macro_f1(truth_N, predicted_N, 40, samples=2000)
    assert interval.high - interval.low < 0.01


def test_a_thousand_labels_take_the_memory_of_those_that_posts_have() -> None:
    """A table of numbers of all posts by all labels would take 160 MB, and three are needed."""
    truth_N, predicted_N = skewed(20_000, 1000, 0.6, seed=1)
    (truth_KC, predicted_KC), rows_K = distinct_members(1000, truth_N, predicted_N)
    (draws_SK,) = resamples(rows_K, 20, 1)
    tracemalloc.start()
    found_SC = f1_of_resample_SC(draws_SK, truth_KC, predicted_KC)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * truth_KC.nbytes
    drawn_N = np.repeat(np.arange(len(rows_K)), draws_SK[7])
    truth, predicted = (x_KC.argmax(axis=1)[drawn_N] for x_KC in (truth_KC, predicted_KC))
    expected = sk.f1_score(truth, predicted, labels=range(1000), average=None, zero_division=0)
    np.testing.assert_allclose(found_SC[7], expected)


def test_resampling_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_macro_f1([], [], 3)


def test_a_label_s_interval_is_wilson_s_of_the_posts_that_have_it_or_were_given_it() -> None:
    from scipy.stats import binomtest

    both_C, support_C, predicted_C = np.array([30, 0, 5, 1]), np.array([50, 4, 5, 1]), np.array([45, 0, 5, 9])
    low_C, high_C = wilson_f1(both_C, support_C, predicted_C)
    for label, both in enumerate(both_C.tolist()):
        either = int(support_C[label] + predicted_C[label] - both)
        found = binomtest(both, either).proportion_ci(method="wilson")
        expected = [2 * share / (1 + share) for share in (found.low, found.high)]
        assert [low_C[label], high_C[label]] == pytest.approx(expected, abs=1e-9)
    f1_C = 2 * both_C / (support_C + predicted_C)
    assert ((low_C <= f1_C + 1e-9) & (f1_C <= high_C + 1e-9)).all()


def test_a_label_that_nobody_has_and_nobody_got_may_have_any_f1() -> None:
    low_C, high_C = wilson_f1([0], [0], [0])
    assert (low_C.tolist(), high_C.tolist()) == ([0.0], [1.0])


def test_a_label_s_interval_covers_its_true_f1_about_nineteen_times_out_of_twenty() -> None:
    """Of few posts, where a bootstrap of four posts with none found would have no width."""
    draw, share, posts = np.random.default_rng(0), 0.35, 12
    both_S = draw.binomial(posts, share, 4000)
    low_S, high_S = wilson_f1(both_S, np.full(4000, posts), both_S)  # nothing is predicted wrongly
    true = 2 * share / (1 + share)
    assert 0.93 <= ((low_S <= true) & (true <= high_S)).mean() <= 0.985
    assert wilson_f1([0], [4], [0])[1][0] == pytest.approx(0.658, abs=0.01)
