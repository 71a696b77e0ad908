"""The floors that a model must beat to be worth its GPU hours: always guessing the most frequent
label, and counting words.

The TF-IDF floor is fitted on the CPU while the GPUs wait: half a minute for 25,000 posts and 15
labels, hence `report.floor_max_rows` (benchmarks/floors.py). On GoEmotions' development posts it
beats logistic regression on words alone, 0.571 to 0.483 with 15 labels.

Where posts have several labels, there is one support vector machine for each label, and its
thresholds are chosen like the model's, on the validation posts. Where posts have shares, it learns
the label of the largest share.

Letters: N posts to predict, C labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emotion_train.data.index import Index, Split
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import Target, dense, largest
from emotion_train.evaluation.predictions import AnyPredictions, Predictions, SetPredictions
from emotion_train.evaluation.thresholds import cross_fit, fit_thresholds, macro_f1_of_sets
from emotion_train.model.loss import class_weights
from emotion_train.storage.store import Store

MAJORITY = "majority class"
PRIOR = "always the prior"
TFIDF = "TF-IDF + linear SVM"
VALIDATION = "validation"

_WORD_OR_SYMBOL = r"(?u)\w+|[^\w\s]"  # scikit-learn's default drops emoji, "!" and "I", which carry emotion


def majority_floor(train_counts_C: ArrayLike, rows: int) -> NDArray[np.int32]:
    """Answers with the most frequent label of the training split, `rows` times."""
    return np.full(rows, int(np.asarray(train_counts_C).argmax()), dtype=np.int32)


def prior_floor(train_counts_C: ArrayLike, rows: int) -> NDArray[np.bool_]:
    """`is_in_NC`, the answers of a classifier that gives each of several labels its share of the
    training posts as probability. The thresholds with the best F1 are below the shares, so it
    answers with every label of the training posts.
    """
    return np.tile(np.asarray(train_counts_C) > 0, (rows, 1))


def tfidf_floor(
    train: Iterable[tuple[str, int]], texts: Sequence[str], classes: int, seed: int
) -> NDArray[np.float32]:
    """Scores prob_NC for `texts`, which add up to 1, by a linear support vector machine on TF-IDF
    of words, word pairs and groups of two to five characters; cross-validation on training posts
    chooses penalty and class weights by macro-F1.

    The scores are a softmax of margins: they rank, and are no calibrated chances. Each call fits
    once: give the texts of several splits in one list. Labels that no training post has get 0.
    """
    from scipy.special import softmax

    train_texts, train_labels = zip(*train, strict=True)
    labels_N = np.asarray(train_labels)
    prob_NC = np.zeros((len(texts), classes), dtype=np.float32)
    present = np.unique(labels_N)
    if len(present) == 1:
        prob_NC[:, present[0]] = 1
        return prob_NC
    vectorizer = _vectorizer(len(train_texts))
    features = vectorizer.fit_transform(train_texts)
    model = _fit(features, labels_N, _best_setting(features, labels_N, seed), seed)
    margins_NC = model.decision_function(vectorizer.transform(texts))
    if margins_NC.ndim == 1:  # of two labels there is one margin, for the second
        margins_NC = np.stack([-margins_NC, margins_NC], 1)
    prob_NC[:, model.classes_] = softmax(margins_NC, axis=1)
    return prob_NC


def tfidf_set_floor(
    train: Iterable[tuple[str, Target]], texts: Sequence[str], classes: int, seed: int
) -> NDArray[np.float32]:
    """Scores prob_NC between 0 and 1 for `texts`, whose posts may have several labels, by one
    machine of `tfidf_floor` for each label; they rank, and are no calibrated chances. Labels that
    no training post has get 0, and labels that all have get 1.

    One setting serves all labels: cross-validation on training posts chooses it by macro-F1, with
    thresholds that did not see the post.
    """
    train_texts, targets = zip(*train, strict=True)
    truth_NC = dense(targets, classes) > 0
    vectorizer = _vectorizer(len(train_texts))
    features = vectorizer.fit_transform(train_texts)
    setting = _best_set_setting(features, truth_NC, seed)
    return _set_scores(features, truth_NC, vectorizer.transform(texts), setting, seed)


def _vectorizer(posts: int) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    seldom = 1 if posts < 2000 else 2
    return make_union(
        TfidfVectorizer(
            ngram_range=(1, 2),
            sublinear_tf=True,
            min_df=seldom,
            token_pattern=_WORD_OR_SYMBOL,
            dtype=np.float32,
        ),
        TfidfVectorizer(
            analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=seldom + 1, dtype=np.float32
        ),
    )


class _Setting(NamedTuple):
    """`c` is scikit-learn's inverse penalty; a label's weight is count^-power."""

    c: float
    power: float


_SETTINGS = tuple(_Setting(c, power) for c in (0.1, 0.3) for power in (0.25, 0.5, 0.75))
_SET_SETTINGS = tuple(_Setting(c, power) for c in (0.1, 0.3) for power in (0.25, 0.5))
_STEEPNESS = 4.0  # of scores over margins, so that thresholds have a fine grid where margins lie
_FOLDS = 2
_CHOOSING_POSTS = 6000


def _best_setting(features: Any, labels_N: NDArray[np.intp], seed: int) -> _Setting:
    """The setting with the best macro-F1 over the held-out posts of all folds; the first among
    equals.
    """
    from sklearn.metrics import f1_score

    chosen, fold_N = _folds(labels_N, seed)
    best, best_score = _SETTINGS[0], -1.0
    for setting in _SETTINGS:
        predicted_N = np.empty(len(chosen), labels_N.dtype)
        for fold in range(_FOLDS):
            fitted, held_out = chosen[fold_N != fold], chosen[fold_N == fold]
            if len(np.unique(labels_N[fitted])) == 1:  # too few posts to choose by
                return _SETTINGS[0]
            predicted_N[fold_N == fold] = _fit(features[fitted], labels_N[fitted], setting, seed).predict(
                features[held_out]
            )
        score = f1_score(labels_N[chosen], predicted_N, average="macro", zero_division=0)
        if score > best_score:
            best, best_score = setting, score
    return best


def _best_set_setting(features: Any, truth_NC: NDArray[np.bool_], seed: int) -> _Setting:
    """`_best_setting` where posts may have several labels."""
    posts = np.random.default_rng(seed).permutation(len(truth_NC))[:_CHOOSING_POSTS]
    fold_N = np.arange(len(posts)) % _FOLDS
    best, best_score = _SET_SETTINGS[0], -1.0
    for setting in _SET_SETTINGS:
        prob_NC = np.zeros((len(posts), truth_NC.shape[1]), np.float32)
        for fold in range(_FOLDS):
            fitted, held_out = posts[fold_N != fold], posts[fold_N == fold]
            prob_NC[fold_N == fold] = _set_scores(
                features[fitted], truth_NC[fitted], features[held_out], setting, seed
            )
        answered = cross_fit(SetPredictions.of(map(str, posts), truth_NC[posts], prob_NC))
        if (score := macro_f1_of_sets(answered.counts())) > best_score:
            best, best_score = setting, score
    return best


def _set_scores(
    features: Any, truth_NC: NDArray[np.bool_], wanted: Any, setting: _Setting, seed: int
) -> NDArray[np.float32]:
    """Scores of the posts with the `wanted` features, by machines fitted on the others."""
    from scipy.special import expit

    weights_C = class_weights(truth_NC.sum(axis=0).tolist(), setting.power)

    def scores(label: int) -> NDArray[np.float32]:
        truth_N = truth_NC[:, label]
        if truth_N.all() or not truth_N.any():
            return np.full(wanted.shape[0], truth_N.any(), np.float32)
        model = _machine(setting.c, {False: 1.0, True: weights_C[label]}, features, truth_N, seed)
        return np.asarray(expit(_STEEPNESS * model.decision_function(wanted)), np.float32)

    # one after the other: the library's random numbers are shared by the threads of a process
    return np.stack([scores(label) for label in range(truth_NC.shape[1])], axis=1)


def _folds(labels_N: NDArray[np.intp], seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The posts that choose the setting, and the fold of each. Each label's posts are dealt to the
    folds by turns; with many posts, only every n-th of each label is taken.
    """
    rng = np.random.default_rng(seed)
    order_N = np.lexsort((rng.random(len(labels_N)), labels_N))  # by label, in random order within
    chosen = order_N[:: max(1, round(len(labels_N) / _CHOOSING_POSTS))]
    return chosen, np.arange(len(chosen)) % _FOLDS


def _fit(features: Any, labels_N: NDArray[np.intp], setting: _Setting, seed: int) -> Any:
    labels, counts = np.unique(labels_N, return_counts=True)
    weights = class_weights(counts.tolist(), setting.power)  # a mean of 1, so that `c` means the same
    of_label = dict(zip(labels.tolist(), weights.tolist(), strict=True))
    return _machine(setting.c, of_label, features, labels_N, seed)


def _machine(c: float, weights: dict[Any, float], features: Any, labels_N: NDArray[Any], seed: int) -> Any:
    """A fitted linear support vector machine."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    model = LinearSVC(C=c, class_weight=weights, tol=1e-2, random_state=seed)
    with warnings.catch_warnings():
        # a floor short of its optimum is still a floor
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels_N)


def tfidf_predictions(
    store: Store, index: Index, names: Sequence[str], max_train_rows: int, seed: int, patience_s: float = 0.0
) -> dict[str, AnyPredictions]:
    """The TF-IDF floor's predictions for these splits; empty when the training split is larger than
    `max_train_rows`.

    A store that does not answer is asked again for `patience_s` seconds.
    """
    if index.split("train").rows > max_train_rows:
        return {}
    wanted = {name: _Posts.of(posts(store, index.split(name), patience_s)) for name in names}
    return _predicted(store, index, wanted, seed, patience_s)


def tfidf_of_texts(
    store: Store, index: Index, ids: Sequence[str], texts: Sequence[str], truth: Sequence[Target], seed: int
) -> AnyPredictions:
    """The TF-IDF floor's predictions for texts from outside the data set; it is fitted on the data
    set's training split.
    """
    return _predicted(store, index, {"": _Posts(ids, texts, truth)}, seed, 0.0)[""]


class _Posts(NamedTuple):
    ids: Sequence[str]
    texts: Sequence[str]
    targets: Sequence[Target]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str, Target]]) -> _Posts:
        return cls(*zip(*rows, strict=True))


def _predicted(
    store: Store, index: Index, wanted: dict[str, _Posts], seed: int, patience_s: float
) -> dict[str, AnyPredictions]:
    """The floor's predictions for the `wanted` posts, by name. It is fitted once."""
    train, classes = posts(store, index.split("train"), patience_s), len(index.labels)
    asked = dict(wanted)
    if index.targets == "several" and VALIDATION not in asked:  # its thresholds are chosen there
        asked[VALIDATION] = _Posts.of(posts(store, index.split(VALIDATION), patience_s))
    texts = [text for part in asked.values() for text in part.texts]
    if index.targets == "several":
        prob_NC = tfidf_set_floor(((text, target) for _, text, target in train), texts, classes, seed)
    else:
        prob_NC = tfidf_floor(((text, largest(target)) for _, text, target in train), texts, classes, seed)
    found: dict[str, AnyPredictions] = {}
    at = 0
    for name, part in asked.items():
        scores_NC, at = prob_NC[at : at + len(part.ids)], at + len(part.ids)
        if index.targets == "several":
            found[name] = SetPredictions.of(part.ids, dense(part.targets, classes), scores_NC)
        else:
            found[name] = Predictions.of(part.ids, [*map(largest, part.targets)], scores_NC)
    return {name: _answered(name, found) for name in wanted}


def _answered(name: str, scored: dict[str, AnyPredictions]) -> AnyPredictions:
    """The predictions; with several labels, answered by thresholds that the validation posts chose,
    and each validation post by the thresholds of the other folds.
    """
    own, judged = scored[name], scored.get(VALIDATION)
    if not isinstance(own, SetPredictions):
        return own
    assert isinstance(judged, SetPredictions)
    if name == VALIDATION:
        return cross_fit(own)
    return own.answered(own.prob_NC >= fit_thresholds(judged.truth_NC, judged.prob_NC).astype(np.float32))


def posts(store: Store, split: Split, patience_s: float = 0.0) -> Iterator[tuple[str, str, Target]]:
    """(id, text, target) of each post of a split, in stored order."""
    with RowGroupReader(store, split, capacity=16, patience_s=patience_s) as reader:
        for group in range(len(split.row_groups)):
            reader.ask(range(group, min(group + 8, len(split.row_groups))))
            rows = reader.rows(group)
            yield from zip(rows.ids, rows.texts, rows.targets, strict=True)
