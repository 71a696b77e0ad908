"""The demonstration corpus: real imbalance, and no near-copy across splits."""

from __future__ import annotations

import csv
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from sklearn.preprocessing import MultiLabelBinarizer

from emotion_train.bases.packaged import small_model
from emotion_train.demo import POSTS, _make_anew, held_out_posts
from emotion_train.errors import WrongRequest

SPLITS = ("train", "validation", "test")


def read(split: str) -> list[tuple[str, str]]:
    with (POSTS / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def test_it_has_fifteen_emotions_with_real_imbalance_in_every_split() -> None:
    counts = {split: Counter(label for _, label in read(split)) for split in SPLITS}
    whole = sum(counts.values(), Counter())
    assert whole.total() == 1502
    assert max(whole.values()) >= 20 * min(whole.values())
    assert all(len(count) == 15 and min(count.values()) >= 3 for count in counts.values())


def five_grams(text: str) -> frozenset[str]:
    folded = re.sub(r"\W+", " ", text.casefold())
    return frozenset(folded[i : i + 5] for i in range(max(1, len(folded) - 4)))


def closest(posts: list[frozenset[str]], others: list[frozenset[str]]) -> np.ndarray:
    """Of each post's n-grams and another's together, the share that both have, for the closest of
    the others: all pairs as one product of sparse 0/1 matrices.
    """
    binarizer = MultiLabelBinarizer(sparse_output=True).fit([*posts, *others])
    has_NG, has_MG = binarizer.transform(posts).astype(np.int64), binarizer.transform(others).astype(np.int64)
    both_NM = (has_NG @ has_MG.T).toarray()
    either_NM = np.array([len(one) for one in posts])[:, None] + [len(one) for one in others] - both_NM
    shared_N: np.ndarray = (both_NM / either_NM).max(axis=1)
    return shared_N


def test_no_near_copy_crosses_a_split() -> None:
    grams = {split: [five_grams(text) for text, _ in read(split)] for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        overlap_N = closest(grams[one], grams[other])
        assert overlap_N.max() <= 0.3, (one, other, read(one)[int(overlap_N.argmax())])


def test_a_near_copy_would_be_found() -> None:
    posts, others = (
        [five_grams(text) for text in texts]
        for texts in (["so glad it rained", "nothing alike"], ["no", "so glad that it rained"])
    )
    found = [max(len(a & b) / len(a | b) for b in others) for a in posts]
    np.testing.assert_allclose(closest(posts, others), found)
    assert found[0] > 0.3 > found[1]


def test_posts_vary_in_length_and_voice() -> None:
    texts = [text for split in SPLITS for text, _ in read(split)]
    words = [len(text.split()) for text in texts]
    assert min(words) <= 4
    assert max(words) >= 45
    assert (
        0.1 < sum(bool(re.search(r"[\U0001F300-\U0001FAFF☀-➿]", text)) for text in texts) / len(texts) < 0.3
    )
    assert len({" ".join(text.split()[:3]).casefold() for text in texts}) > 0.95 * len(texts)


def test_the_demo_does_not_remove_a_folder_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(WrongRequest, match="not made by the demo"):
        _make_anew(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_three_held_out_posts_of_different_labels_keep_their_truth(tmp_path: Path) -> None:
    with held_out_posts(tmp_path / "held_out.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["truth"]) for row in csv.DictReader(file)]
    assert len({truth for _, truth in rows}) == len(rows) == 3
    assert set(rows) <= set(read("test"))


def test_the_small_model_is_installed_by_the_lock() -> None:
    assert small_model().stat().st_size > 50 << 20
