"""Thresholds of several labels: planted ones come back, and what they gain is not flattered."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_recall_curve

from emotion_train.evaluation import thresholds
from emotion_train.evaluation.metrics import BoolArray, FloatArray
from emotion_train.evaluation.predictions import SetPredictions, join_predictions
from emotion_train.evaluation.thresholds import cross_fit, fit_thresholds, macro_f1_of_sets
from tests.helpers.scored_sets import SHARE_C, ids, scored


def f1(predictions: SetPredictions) -> float:
    return macro_f1_of_sets(predictions.counts())


def answered(predictions: SetPredictions, thresholds_C: FloatArray) -> SetPredictions:
    return SetPredictions.of(predictions.ids, predictions.truth_NC, predictions.prob_NC, thresholds_C)


def test_planted_thresholds_come_back() -> None:
    """Every label is there exactly where its probability reaches a threshold of its own."""
    planted_C = np.array([0.5, 0.12, 0.88, 0.31])
    prob_NC = np.random.default_rng(0).random((4000, 4))
    found_C = fit_thresholds(prob_NC >= planted_C, prob_NC)
    np.testing.assert_allclose(found_C, planted_C, atol=0.015)  # a step of the grid
    clean = cross_fit(SetPredictions.of(ids(4000), prob_NC >= planted_C, prob_NC))
    assert f1(clean) > 0.98


def test_with_many_posts_no_other_threshold_is_better() -> None:
    """Against the best point of scikit-learn's curve over all probabilities that occur."""
    many = scored(60_000, seed=1)
    found_C = fit_thresholds(many.truth_NC, many.prob_NC)
    for label in range(3):
        truth_N, prob_N = many.truth_NC[:, label], many.prob_NC[:, label]
        precision, recall, _ = precision_recall_curve(truth_N, prob_N)
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-9)).max()
        assert f1_score(truth_N, prob_N >= np.float32(found_C[label])) > best - 0.005


def test_thresholds_gain_out_of_fold_where_probabilities_are_off() -> None:
    posts, fresh = scored(4000, seed=1), scored(40_000, seed=2)
    out_of_fold = f1(cross_fit(posts))
    assert out_of_fold > f1(posts) + 0.1
    promised = f1(answered(fresh, fit_thresholds(posts.truth_NC, posts.prob_NC)))
    assert out_of_fold == pytest.approx(promised, abs=0.03)


def test_of_probabilities_that_know_nothing_no_gain_is_told() -> None:
    """Of such, nothing beats answering every post with every label. The thresholds that judge
    themselves seem to.
    """
    best = float(np.mean(2 * SHARE_C / (1 + SHARE_C)))
    own, others = [], []
    for seed in range(30):
        noise = scored(300, seed, knows=0.0)
        own.append(f1(answered(noise, fit_thresholds(noise.truth_NC, noise.prob_NC))))
        others.append(f1(cross_fit(noise)))
    assert np.mean(others) < best + 0.005
    assert np.mean(own) > np.mean(others) + 0.002


def test_a_post_is_answered_by_thresholds_that_it_did_not_choose() -> None:
    """Whatever its own labels are, it is answered alike."""
    posts = scored(60, seed=3)
    before_NC = cross_fit(posts).predicted_NC
    for row in range(0, 60, 7):
        truth_NC = posts.truth_NC.copy()
        truth_NC[row] = ~truth_NC[row]
        after_NC = cross_fit(SetPredictions.of(posts.ids, truth_NC, posts.prob_NC)).predicted_NC
        np.testing.assert_array_equal(after_NC[row], before_NC[row])


def test_folds_depend_on_ids_alone() -> None:
    """Neither on the order of the posts, nor on how ranks shared them."""
    posts = scored(500, seed=4)
    expected = cross_fit(posts)
    order = np.random.default_rng(0).permutation(500).tolist()
    for mixed in (posts.take(order), join_predictions([posts.take(order[i::3]) for i in range(3)], 500)):
        again = join_predictions([cross_fit(mixed)], posts.ids)
        np.testing.assert_array_equal(again.predicted_NC, expected.predicted_NC)
        found_C = fit_thresholds(mixed.truth_NC, mixed.prob_NC)
        np.testing.assert_array_equal(found_C, fit_thresholds(posts.truth_NC, posts.prob_NC))


def test_how_many_posts_are_counted_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    posts = scored(300, seed=4)
    expected = cross_fit(posts)
    monkeypatch.setattr(thresholds, "_CELLS_AT_A_TIME", 50)
    np.testing.assert_array_equal(cross_fit(posts).predicted_NC, expected.predicted_NC)


def _label_with(positives: int) -> tuple[BoolArray, FloatArray]:
    """Twenty labels that 0.3 divides, and a last one of few posts that 0.9 divides: twenty posts
    between have it not.
    """
    prob_NC = np.random.default_rng(6).random((3000, 21))
    truth_NC = prob_NC >= 0.3
    prob_NC[:, 20] = np.concatenate(
        [
            np.linspace(0, 0.29, 2980 - positives),
            np.linspace(0.31, 0.89, 20),
            np.linspace(0.91, 0.99, positives),
        ]
    )
    truth_NC[:, 20] = prob_NC[:, 20] > 0.9
    return truth_NC, prob_NC


def test_few_posts_of_a_label_are_pulled_to_the_threshold_of_all() -> None:
    found = [fit_thresholds(*_label_with(positives))[20] for positives in (0, 1, 10, 40, 200)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.3, abs=0.02)
    assert found[1] < 0.4
    assert 0.85 < found[-1] < 0.92


def test_without_any_label_all_thresholds_are_a_half() -> None:
    truth_NC, prob_NC = _label_with(0)
    nothing_NC = np.zeros_like(truth_NC)
    np.testing.assert_array_equal(fit_thresholds(nothing_NC, prob_NC), 0.5)
    np.testing.assert_array_equal(fit_thresholds(nothing_NC[:0], prob_NC[:0]), 0.5)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_posts_that_leave_a_fold_empty_are_answered(rows: int) -> None:
    posts = scored(rows, seed=5)
    assert cross_fit(posts).predicted_NC.shape == (rows, len(SHARE_C))
