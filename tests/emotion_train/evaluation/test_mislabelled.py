"""Which posts look mislabelled: against cleanlab, against its rule written out post by post, and on
real posts of which some labels were flipped.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from emotion_train.evaluation.mislabelled import Doubts, doubts
from emotion_train.evaluation.predictions import Predictions, SetPredictions

DATA = Path(os.environ.get("EMOTION_DATA_DIR", "nowhere")) / "goemotions-15"


def of_one(rows: int = 600, classes: int = 5, seed: int = 0) -> Predictions:
    """A model of some skill on labels of which a tenth is wrong; the last label has no post."""
    draw = np.random.default_rng(seed)
    truth_N = draw.integers(0, classes - 1, rows)
    logits_NC = draw.normal(size=(rows, classes))
    logits_NC[np.arange(rows), truth_N] += 2.5
    prob_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
    wrong_N = draw.random(rows) < 0.1
    given_N = np.where(wrong_N, draw.integers(0, classes - 1, rows), truth_N)
    return Predictions.of([f"post-{row:04}" for row in range(rows)], given_N, prob_NC)


def of_sets(rows: int = 600, classes: int = 6, seed: int = 0) -> SetPredictions:
    draw = np.random.default_rng(seed)
    truth_NC = draw.random((rows, classes)) < 0.25
    prob_NC = np.clip(np.where(truth_NC, 0.6, 0.2) + draw.normal(0, 0.25, truth_NC.shape), 0.001, 0.999)
    return SetPredictions.of([f"post-{row:04}" for row in range(rows)], truth_NC, prob_NC)


def written_out(model: Predictions) -> list[int]:
    """The rule of confident learning post by post, as its paper has it."""
    prob_NC, labels = model.prob_NC.astype(float), range(model.prob_NC.shape[1])
    usual = {}
    for label in labels:
        own = [prob_NC[row, label] for row, truth in enumerate(model.truth_N) if truth == label]
        if own:
            usual[label] = sum(own) / len(own)
    found = []
    for row, truth in enumerate(model.truth_N.tolist()):
        sure = [label for label in usual if prob_NC[row, label] >= usual[label] - 1e-6]
        best = int(prob_NC[row].argmax())
        guess = best if len(sure) > 1 else sure[0] if sure else truth
        if guess != truth and best != truth:
            found.append(row)
    return sorted(found, key=lambda row: prob_NC[row, model.truth_N[row]])


def test_one_label_is_doubted_by_the_rule_of_confident_learning() -> None:
    for seed in range(3):
        model = of_one(seed=seed)
        found = doubts(model)
        assert found.rows_D.tolist() == written_out(model)
        assert 0 < len(found.rows_D) < 200
        # what is suggested is the model's answer, and the score that of the label that is there
        assert found.suggested_DC.argmax(axis=1).tolist() == model.predicted_N[found.rows_D].tolist()
        assert (found.suggested_DC.sum(axis=1) == 1).all()
        own_D = model.prob_NC[found.rows_D, model.truth_N[found.rows_D]]
        np.testing.assert_allclose(found.score_D, own_D)


def test_cleanlab_ranks_the_same_posts_in_the_same_order() -> None:
    filters = pytest.importorskip("cleanlab.filter", reason="cleanlab is not installed")
    model = of_one()
    expected = filters.find_label_issues(
        model.truth_N.astype(int),
        model.prob_NC.astype(float),
        filter_by="confident_learning",
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    assert doubts(model).rows_D.tolist() == expected.tolist()


def test_cleanlab_ranks_posts_with_several_labels_alike() -> None:
    filters = pytest.importorskip(
        "cleanlab.multilabel_classification.filter", reason="cleanlab is not installed"
    )
    from cleanlab.multilabel_classification.rank import get_label_quality_scores

    model = of_sets()
    lists = [np.flatnonzero(row).tolist() for row in model.truth_NC]
    prob_NC = model.prob_NC.astype(float)
    expected = filters.find_label_issues(
        lists,
        prob_NC,
        filter_by="confident_learning",
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    found = doubts(model)
    assert found.rows_D.tolist() == list(expected)
    scores_N = get_label_quality_scores(lists, prob_NC, method="self_confidence")
    np.testing.assert_allclose(found.score_D, scores_N[found.rows_D])


def test_each_of_several_labels_is_doubted_as_one_of_two() -> None:
    """Against the rule for one label, asked as has it or has it not; the pooled score by hand."""
    model = of_sets()
    doubted_NC = np.zeros(model.truth_NC.shape, bool)
    for label in range(model.truth_NC.shape[1]):
        prob_N = model.prob_NC[:, label].astype(float)
        asked = Predictions.of(model.ids, model.truth_NC[:, label], np.stack([1 - prob_N, prob_N], axis=1))
        doubted_NC[written_out(asked), label] = True
    found = doubts(model)
    assert sorted(found.rows_D.tolist()) == np.flatnonzero(doubted_NC.any(axis=1)).tolist()
    np.testing.assert_array_equal(found.suggested_DC, (model.truth_NC ^ doubted_NC)[found.rows_D])
    for row, score in list(zip(found.rows_D, found.score_D, strict=True))[:20]:
        fits = sorted(np.where(model.truth_NC[row], model.prob_NC[row], 1 - model.prob_NC[row]), reverse=True)
        pooled = fits[0]
        for one in fits[1:]:
            pooled = 0.8 * one + 0.2 * pooled
        assert score == pytest.approx(pooled, abs=1e-6)
    assert (np.diff(found.score_D) >= 0).all()


def test_shares_are_not_doubted() -> None:
    model = of_one(50)
    shares = Predictions.of(model.ids, model.prob_NC.argmax(axis=1), model.prob_NC, shares_NC=model.prob_NC)
    assert len(doubts(shares).rows_D) == 0


def test_a_model_that_is_right_doubts_nothing() -> None:
    truth_N = np.array([0, 1, 2] * 20)
    assert len(doubts(Predictions.of(map(str, range(60)), truth_N, np.eye(3)[truth_N])).rows_D) == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="EMOTION_DATA_DIR names no folder with goemotions-15")
def test_planted_flips_are_found_five_times_as_often_as_by_chance() -> None:
    """3,003 real posts of which 150 get another label, by a classifier that counts words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier

    def posts(name: str) -> list[tuple[str, str]]:
        with (DATA / name).open(encoding="utf-8", newline="") as file:
            return [(row["text"], row["label"]) for row in csv.DictReader(file)]

    learned, held_out = posts("train.csv")[::4], posts("dev.csv")
    names = sorted({label for _, label in learned + held_out})
    words = TfidfVectorizer(sublinear_tf=True, min_df=2)
    features = words.fit_transform([text for text, _ in learned])
    machine = SGDClassifier(loss="log_loss", alpha=3e-5, random_state=0, max_iter=20, tol=None)
    machine.fit(features, [label for _, label in learned])
    prob_NC = np.zeros((len(held_out), len(names)))
    prob_NC[:, [names.index(label) for label in machine.classes_]] = machine.predict_proba(
        words.transform([text for text, _ in held_out])
    )
    draw = np.random.default_rng(0)
    truth_N = np.array([names.index(label) for _, label in held_out])
    planted = len(truth_N) // 20
    flipped = draw.choice(len(truth_N), planted, replace=False)
    truth_N[flipped] = (truth_N[flipped] + draw.integers(1, len(names), planted)) % len(names)
    found: Doubts = doubts(Predictions.of(map(str, range(len(truth_N))), truth_N, prob_NC))
    precision = np.isin(found.rows_D[:planted], flipped).mean()
    assert precision >= 5 * planted / len(truth_N)  # measured: 0.43 to 0.47, chance is 0.05
