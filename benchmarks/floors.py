"""Macro-F1 of the report's TF-IDF floor and of logistic regression on words alone, and the seconds
that each costs.

    python benchmarks/floors.py

The data sets are goemotions-15 and goemotions-15-tds below EMOTION_DATA_DIR: fitted on the training
posts, scored on the development posts.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from emotion_train.evaluation.floors import _WORD_OR_SYMBOL, TFIDF, tfidf_floor
from emotion_train.processes.machine import device_name

Posts = tuple[list[str], list[int]]


def main() -> None:
    print("| data | training posts | floor | macro-F1 | seconds | processor seconds |")
    print("|---|--:|---|--:|--:|--:|")
    for name, most in (("goemotions-15", 1000), ("goemotions-15-tds", 10**6), ("goemotions-15", 10**6)):
        train, held_out = (posts(name, split) for split in ("train", "dev"))
        train = train[0][:most], train[1][:most]
        for floor, predict in ((TFIDF, ours), ("words, logistic regression", words_alone)):
            began, used = time.perf_counter(), time.process_time()
            score = f1_score(held_out[1], predict(train, held_out[0]), average="macro", zero_division=0)
            cost = f"{time.perf_counter() - began:.1f} | {time.process_time() - used:.1f}"
            print(f"| {name} | {len(train[0]):,} | {floor} | {score:.3f} | {cost} |", flush=True)
    print(f"\n{device_name('cpu')}")


def posts(name: str, split: str) -> Posts:
    """Texts and label ids."""
    folder = Path(os.environ["EMOTION_DATA_DIR"], name)
    known = sorted(set(pq.read_table(folder / "train.parquet")["label"].to_pylist()))
    table = pq.read_table(folder / f"{split}.parquet")
    return table["text"].to_pylist(), [known.index(label) for label in table["label"].to_pylist()]


def ours(train: Posts, texts: list[str]) -> np.ndarray:
    scores_NC = tfidf_floor(zip(*train, strict=True), texts, max(train[1]) + 1, seed=42)
    return np.asarray(scores_NC.argmax(1))


def words_alone(train: Posts, texts: list[str]) -> np.ndarray:
    """C and words seen twice as chosen on development posts, class-balanced."""
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        min_df=1 if len(train[0]) < 2000 else 2,
        token_pattern=_WORD_OR_SYMBOL,
        dtype=np.float32,
    )
    features = vectorizer.fit_transform(train[0])
    model = LogisticRegression(C=4.0, class_weight="balanced", max_iter=1000, random_state=42)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged
        model.fit(features, train[1])
    return np.asarray(model.predict(vectorizer.transform(texts)))


if __name__ == "__main__":
    main()
