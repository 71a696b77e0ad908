"""What a model must beat to be worth its GPU hours: always guessing the most frequent label, and
counting words.

The TF-IDF floor is fitted on the CPU while the GPUs wait: 15 s for 25,000 posts and 15 labels on
two cores, hence `report.floor_max_rows`. C=4 and words seen twice were the best of 20 settings on
GoEmotions' development posts.

Letters: N posts to predict, C labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emotion_train.data.index import Index, Split
from emotion_train.data.reader import RowGroupReader
from emotion_train.evaluation.predictions import Predictions
from emotion_train.storage.store import Store

MAJORITY = "majority class"
TFIDF = "TF-IDF + logistic regression"

_WORD_OR_SYMBOL = r"(?u)\w+|[^\w\s]"  # scikit-learn's default drops emoji, "!" and "I", which carry emotion


def majority_floor(train_counts_C: ArrayLike, rows: int) -> NDArray[np.int32]:
    """The most frequent label of the training split, `rows` times."""
    return np.full(rows, int(np.asarray(train_counts_C).argmax()), dtype=np.int32)


def tfidf_floor(
    train: Iterable[tuple[str, int]], texts: Sequence[str], classes: int, seed: int
) -> NDArray[np.float32]:
    """Probabilities prob_NC for `texts` by class-balanced logistic regression on word and word-pair
    TF-IDF of the training posts.

    Fits once a call: give the texts of several splits in one list. Labels that no training post has
    get probability 0.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train_texts, train_labels = zip(*train, strict=True)
    prob_NC = np.zeros((len(texts), classes), dtype=np.float32)
    present = sorted(set(train_labels))
    if len(present) == 1:
        prob_NC[:, present[0]] = 1
        return prob_NC
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        min_df=1 if len(train_texts) < 2000 else 2,
        token_pattern=_WORD_OR_SYMBOL,
        dtype=np.float32,
    )
    features = vectorizer.fit_transform(train_texts)
    model = LogisticRegression(C=4.0, class_weight="balanced", max_iter=1000, random_state=seed)
    with warnings.catch_warnings():
        # 25,000 posts need 140 steps; a floor short of its optimum is still a floor
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, np.asarray(train_labels))
    prob_NC[:, model.classes_] = model.predict_proba(vectorizer.transform(texts))
    return prob_NC


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
    # ids, texts, labels
    columns = {name: list(zip(*posts(store, index.split(name), patience_s), strict=True)) for name in names}
    every_text = [text for _, texts, _ in columns.values() for text in texts]
    prob_NC = tfidf_floor(
        ((text, label) for _, text, label in posts(store, train, patience_s)),
        every_text,
        len(index.labels),
        seed,
    )
    found, at = {}, 0
    for name, (ids, _, labels) in columns.items():
        found[name] = Predictions.of(ids, labels, prob_NC[at : at + len(ids)])
        at += len(ids)
    return found


def tfidf_of_texts(
    store: Store, index: Index, ids: Sequence[str], texts: Sequence[str], truth: Sequence[int], seed: int
) -> Predictions:
    """The TF-IDF floor's predictions of texts that are no part of the data set, whose training
    split it is fitted on.
    """
    train = ((text, label) for _, text, label in posts(store, index.split("train")))
    return Predictions.of(ids, truth, tfidf_floor(train, texts, len(index.labels), seed))


def posts(store: Store, split: Split, patience_s: float = 0.0) -> Iterator[tuple[str, str, int]]:
    """(id, text, label) of a split, in the order in which it is stored."""
    with RowGroupReader(store, split, capacity=16, patience_s=patience_s) as reader:
        for group in range(len(split.row_groups)):
            reader.ask(range(group, min(group + 8, len(split.row_groups))))
            rows = reader.rows(group)
            yield from zip(rows.ids, rows.texts, rows.labels, strict=True)
