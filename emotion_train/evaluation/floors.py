"""What a model must beat to be worth its GPU hours: always guessing the most frequent label, and
counting words.

The TF-IDF floor is fitted on the CPU while the GPUs wait: half a minute for 25,000 posts and 15
labels, hence `report.floor_max_rows` (benchmarks/floors.py). On GoEmotions' development posts it
beats logistic regression on words alone, 0.571 to 0.483 with 15 labels.

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
from emotion_train.data.targets import Target, largest
from emotion_train.evaluation.predictions import Predictions
from emotion_train.model.loss import class_weights
from emotion_train.storage.store import Store

MAJORITY = "majority class"
TFIDF = "TF-IDF + linear SVM"

_WORD_OR_SYMBOL = r"(?u)\w+|[^\w\s]"  # scikit-learn's default drops emoji, "!" and "I", which carry emotion


def majority_floor(train_counts_C: ArrayLike, rows: int) -> NDArray[np.int32]:
    """The most frequent label of the training split, `rows` times."""
    return np.full(rows, int(np.asarray(train_counts_C).argmax()), dtype=np.int32)


def tfidf_floor(
    train: Iterable[tuple[str, int]], texts: Sequence[str], classes: int, seed: int
) -> NDArray[np.float32]:
    """Scores prob_NC for `texts`, which add up to 1, by a linear support vector machine on TF-IDF
    of the training posts' words, word pairs and groups of two to five characters; its penalty and
    class weights are those of the best macro-F1 in cross-validation on training posts.

    The scores are a softmax of margins: they rank, and are no calibrated chances. Fits once a call:
    give the texts of several splits in one list. Labels that no training post has get score 0.
    """
    from scipy.special import softmax
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    train_texts, train_labels = zip(*train, strict=True)
    labels_N = np.asarray(train_labels)
    prob_NC = np.zeros((len(texts), classes), dtype=np.float32)
    present = np.unique(labels_N)
    if len(present) == 1:
        prob_NC[:, present[0]] = 1
        return prob_NC
    seldom = 1 if len(train_texts) < 2000 else 2
    vectorizer = make_union(
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
    features = vectorizer.fit_transform(train_texts)
    model = _fit(features, labels_N, _best_setting(features, labels_N, seed), seed)
    margins_NC = model.decision_function(vectorizer.transform(texts))
    if margins_NC.ndim == 1:  # of two labels there is one margin, for the second
        margins_NC = np.stack([-margins_NC, margins_NC], 1)
    prob_NC[:, model.classes_] = softmax(margins_NC, axis=1)
    return prob_NC


class _Setting(NamedTuple):
    """`c` is scikit-learn's inverse penalty; a label's weight is count^-power."""

    c: float
    power: float


_SETTINGS = tuple(_Setting(c, power) for c in (0.1, 0.3) for power in (0.25, 0.5, 0.75))
_FOLDS = 2
_CHOOSING_POSTS = 6000


def _best_setting(features: Any, labels_N: NDArray[np.intp], seed: int) -> _Setting:
    """The setting with the best macro-F1 over the held-out posts of all folds; the first of several
    that are equal.
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


def _folds(labels_N: NDArray[np.intp], seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Posts to choose by, and the fold of each: each label's posts are dealt to the folds by turns,
    and of many posts every so many of each label are taken.
    """
    rng = np.random.default_rng(seed)
    order_N = np.lexsort((rng.random(len(labels_N)), labels_N))  # by label, in random order within
    chosen = order_N[:: max(1, round(len(labels_N) / _CHOOSING_POSTS))]
    return chosen, np.arange(len(chosen)) % _FOLDS


def _fit(features: Any, labels_N: NDArray[np.intp], setting: _Setting, seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    labels, counts = np.unique(labels_N, return_counts=True)
    weights = class_weights(counts.tolist(), setting.power)  # a mean of 1, so that `c` means the same
    model = LinearSVC(
        C=setting.c,
        class_weight=dict(zip(labels.tolist(), weights.tolist(), strict=True)),
        tol=1e-2,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # a floor short of its optimum is still a floor
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels_N)


def tfidf_predictions(
    store: Store, index: Index, names: Sequence[str], max_train_rows: int, seed: int, patience_s: float = 0.0
) -> dict[str, Predictions]:
    """The TF-IDF floor's predictions of these splits; empty when the training split is larger than
    `max_train_rows`.

    A store that does not answer is asked again for `patience_s` seconds.
    """
    train = index.split("train")
    if train.rows > max_train_rows:
        return {}
    # ids, texts, targets
    columns = {name: list(zip(*posts(store, index.split(name), patience_s), strict=True)) for name in names}
    every_text = [text for _, texts, _ in columns.values() for text in texts]
    prob_NC = tfidf_floor(
        ((text, largest(target)) for _, text, target in posts(store, train, patience_s)),
        every_text,
        len(index.labels),
        seed,
    )
    found, at = {}, 0
    for name, (ids, _, targets) in columns.items():
        found[name] = Predictions.of(ids, [*map(largest, targets)], prob_NC[at : at + len(ids)])
        at += len(ids)
    return found


def tfidf_of_texts(
    store: Store, index: Index, ids: Sequence[str], texts: Sequence[str], truth: Sequence[Target], seed: int
) -> Predictions:
    """The TF-IDF floor's predictions of texts that are no part of the data set, whose training
    split it is fitted on.
    """
    train = ((text, largest(target)) for _, text, target in posts(store, index.split("train")))
    return Predictions.of(ids, [*map(largest, truth)], tfidf_floor(train, texts, len(index.labels), seed))


def posts(store: Store, split: Split, patience_s: float = 0.0) -> Iterator[tuple[str, str, Target]]:
    """(id, text, target) of a split, in the order in which it is stored."""
    with RowGroupReader(store, split, capacity=16, patience_s=patience_s) as reader:
        for group in range(len(split.row_groups)):
            reader.ask(range(group, min(group + 8, len(split.row_groups))))
            rows = reader.rows(group)
            yield from zip(rows.ids, rows.texts, rows.targets, strict=True)
