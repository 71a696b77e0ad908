"""What a model must beat to be worth its GPU hours: always guessing the most frequent label, and
counting words.

The TF-IDF floor is fitted on the CPU while the GPUs wait: 15 s for 25,000 posts and 15 labels on
two cores, hence `report.floor_max_rows`. C=4 and words seen twice were the best of 20 settings on
GoEmotions' development posts.

Letters: N posts to predict, C labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
