"""Macro-F1 of the report's TF-IDF floor and of logistic regression on words alone, and the seconds
that each costs.

    python benchmarks/floors.py

The data sets are goemotions-15, goemotions-15-tds and goemotions, whose posts have several of 28
labels, below EMOTION_DATA_DIR: fitted on the training posts, scored on the development posts, of
several labels with thresholds that did not see the post.
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

from emotion_train.data.targets import Target, dense
from emotion_train.evaluation.floors import _WORD_OR_SYMBOL, TFIDF, tfidf_floor, tfidf_set_floor
from emotion_train.evaluation.predictions import SetPredictions
from emotion_train.evaluation.thresholds import cross_fit, macro_f1_of_sets
from emotion_train.processes.machine import device_name

Posts = tuple[list[str], list[int]]
LabelSets = tuple[list[str], list[Target]]


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
    began, used = time.perf_counter(), time.process_time()
    train_sets, held_out_sets, classes = label_sets()
    prob_NC = tfidf_set_floor(zip(*train_sets, strict=True), held_out_sets[0], classes, seed=42)
    truth_NC = dense(held_out_sets[1], classes)
    found = cross_fit(SetPredictions.of(map(str, range(len(truth_NC))), truth_NC, prob_NC))
    cost = f"{time.perf_counter() - began:.1f} | {time.process_time() - used:.1f}"
    score = macro_f1_of_sets(found.counts())
    print(f"| goemotions, several labels | {len(train_sets[0]):,} | {TFIDF} | {score:.3f} | {cost} |")
    print(f"\n{device_name('cpu')}")


def posts(name: str, split: str) -> Posts:
    """Texts and label ids."""
    folder = Path(os.environ["EMOTION_DATA_DIR"], name)
    known = sorted(set(pq.read_table(folder / "train.parquet")["label"].to_pylist()))
    table = pq.read_table(folder / f"{split}.parquet")
    return table["text"].to_pylist(), [known.index(label) for label in table["label"].to_pylist()]


def label_sets() -> tuple[LabelSets, LabelSets, int]:
    """Texts and targets of GoEmotions' training and development posts, and the number of labels."""
    folder = Path(os.environ["EMOTION_DATA_DIR"], "goemotions")
    names = (folder / "emotions.txt").read_text().split()
    found = []
    for split in ("train", "dev"):
        table = pq.read_table(folder / f"{split}.parquet")
        ids = [sorted(map(names.index, cell.split(","))) for cell in table["labels"].to_pylist()]
        targets = [tuple((label, 1.0) for label in labels) for labels in ids]
        found.append((table["text"].to_pylist(), targets))
    return found[0], found[1], len(names)


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
