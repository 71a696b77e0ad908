"""The TF-IDF floor of posts that may have several labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

from emotion_train.data.index import read_index
from emotion_train.data.targets import Target, dense
from emotion_train.evaluation import floors
from emotion_train.evaluation.floors import posts, tfidf_of_texts, tfidf_predictions, tfidf_set_floor
from emotion_train.evaluation.predictions import SetPredictions
from emotion_train.evaluation.thresholds import cross_fit, fit_thresholds
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from tests.helpers.other_targets import relabel, tiny_folder

WORDS = ("calm tea", "glee party", "rage shout")


def made(posts: int, seed: int) -> tuple[list[str], list[Target]]:
    """Texts with the words of their labels, of which some have none and some all three."""
    rng = np.random.default_rng(seed)
    texts, targets = [], []
    for _ in range(posts):
        own = [label for label in range(3) if rng.random() < 0.4]
        said = [word for label in own for word in WORDS[label].split()]
        texts.append(" ".join([*rng.permutation(said), *rng.choice(["the", "and", "so", "it"], 3)]))
        targets.append(tuple((label, 1.0) for label in own))
    return texts, targets


def test_words_are_learnt_label_by_label_and_absent_labels_get_0() -> None:
    train, (texts, targets) = made(200, 0), made(60, 1)
    prob_NC = tfidf_set_floor(zip(*train, strict=True), texts, 4, seed=0)
    assert (prob_NC[:, 3] == 0).all()
    found = SetPredictions.of(map(str, range(60)), dense(targets, 4), prob_NC)
    assert (cross_fit(found).predicted_NC == found.truth_NC)[:, :3].mean() > 0.95


def test_its_machines_are_scikit_learns_one_against_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_SET_SETTINGS", (floors._Setting(0.3, 0.0),))  # all weigh 1
    (train_texts, train_targets), (texts, _) = made(120, 2), made(40, 3)
    prob_NC = tfidf_set_floor(zip(train_texts, train_targets, strict=True), texts, 3, seed=5)
    vectorizer = floors._vectorizer(120)
    features = vectorizer.fit_transform(train_texts)
    theirs = OneVsRestClassifier(LinearSVC(C=0.3, tol=1e-2, random_state=5))
    theirs.fit(features, (dense(train_targets, 3) > 0).astype(int))
    margins_NC = theirs.decision_function(vectorizer.transform(texts))
    np.testing.assert_allclose(prob_NC, expit(4 * margins_NC), atol=2e-3)  # they end at a tolerance


def test_thresholds_are_those_of_the_validation_posts_which_are_answered_out_of_fold(tmp_path: Path) -> None:
    store = open_store(str(tiny_folder(tmp_path, "several") / "data"))
    index = read_index(store)
    found = tfidf_predictions(store, index, ["test"], 1000, seed=0)
    both = tfidf_predictions(store, index, ["validation", "test"], 1000, seed=0)
    assert list(found) == ["test"]
    test, chose = both["test"], both["validation"]
    assert isinstance(test, SetPredictions)
    assert isinstance(chose, SetPredictions)
    assert isinstance(found["test"], SetPredictions)
    np.testing.assert_array_equal(found["test"].predicted_NC, test.predicted_NC)
    thresholds_C = fit_thresholds(chose.truth_NC, chose.prob_NC).astype(np.float32)
    np.testing.assert_array_equal(test.predicted_NC, test.prob_NC >= thresholds_C)
    np.testing.assert_array_equal(chose.predicted_NC, cross_fit(chose).predicted_NC)

    ids, texts, targets = zip(*posts(store, index.split("test")), strict=True)
    typed = tfidf_of_texts(store, index, ids, texts, targets, seed=0)
    assert isinstance(typed, SetPredictions)
    np.testing.assert_array_equal(typed.predicted_NC, test.predicted_NC)
    np.testing.assert_array_equal(typed.truth_NC, test.truth_NC)


def test_of_shares_it_learns_the_largest_one(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "one")
    store = FolderStore(folder / "data")
    relabel(store, FolderStore(folder / "shares"), "shares", weighted=False)
    found = {}
    for name in ("data", "shares"):
        one = FolderStore(folder / name)
        found[name] = tfidf_predictions(one, read_index(one), ["test"], 1000, seed=0)["test"]
    # the largest share of these posts is their one label
    np.testing.assert_array_equal(found["data"].prob_NC, found["shares"].prob_NC)
