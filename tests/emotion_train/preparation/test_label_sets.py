"""Every label within one post of its quotas in every split, wherever a division is like that.

Letters: K sets, C labels and at the end "no label", D splits (train, validation, test), W ways.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emotion_train.data.target_columns import PostTargets
from emotion_train.preparation import label_sets
from emotion_train.preparation.label_sets import LabelSet, LabelSets, shared_out
from emotion_train.preparation.stratify import quotas

DATA = Path(os.environ.get("EMOTION_DATA_DIR", "nowhere"))
FRACTIONS = [(0.1, 0.1), (0.1, 0.2), (0.2, 0.0), (0.05, 0.05), (0.3, 0.3)]


def having(sets: list[LabelSet], labels: int) -> Any:
    """Whether each set has each label, and at the end none."""
    have_KC = np.zeros((len(sets), labels + 1), np.int64)
    for number, one in enumerate(sets):
        have_KC[number, list(one) or [labels]] = 1
    return have_KC


def quotas_of(have_KC: Any, counts_K: Any, fractions: tuple[float, float]) -> Any:
    """By label and split."""
    totals_C = counts_K @ have_KC
    held_out = np.array([quotas(int(total), *fractions) for total in totals_C])
    return np.column_stack([totals_C - held_out.sum(axis=1), held_out])


def furthest(posts: dict[LabelSet, int], labels: int, fractions: tuple[float, float]) -> int:
    """How far off its quota in a split a label is at most."""
    sets = sorted(posts)
    counts_K = np.array([posts[one] for one in sets])
    held_out = np.array(shared_out(sets, counts_K, labels, *fractions))
    taken_KD = np.column_stack([counts_K - held_out.sum(axis=1), held_out])
    assert (taken_KD >= 0).all()
    have_KC = having(sets, labels)
    return int(np.abs(have_KC.T @ taken_KD - quotas_of(have_KC, counts_K, fractions)).max())


def some_posts(seed: int) -> tuple[dict[LabelSet, int], int, tuple[float, float]]:
    """Posts of up to 200 labels, of which many are rare and some always go together."""
    draw = np.random.default_rng(seed)
    labels, count = int(draw.choice([6, 12, 28, 60, 200])), int(draw.choice([20, 60, 150, 400, 1000]))
    chance_C = draw.dirichlet(np.full(labels, draw.choice([0.3, 1.0, 5.0])))
    most = min(int(draw.choice([2, 3, 5, 10])), int((chance_C > 0).sum()))
    leader_C = np.arange(labels)
    leader_C[1::4] = leader_C[0::4][: len(leader_C[1::4])] if seed % 2 else leader_C[1::4]
    posts: Counter[LabelSet] = Counter()
    for _ in range(count):
        chosen = draw.choice(labels, int(draw.integers(0, most + 1)), replace=False, p=chance_C)
        posts[tuple(np.flatnonzero(np.isin(leader_C, leader_C[chosen])).tolist())] += 1
    return posts, labels, FRACTIONS[seed % len(FRACTIONS)]


def no_division_is_within_one(
    posts: dict[LabelSet, int], labels: int, fractions: tuple[float, float]
) -> bool:
    """Whether a solver of integer programs proves that; x_KD are the posts of each set held out."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    sets = sorted(posts)
    counts_K, have_KC = np.array([posts[one] for one in sets]), having(sets, labels)
    _, *held_out = quotas_of(have_KC, counts_K, fractions).T
    none_CK = np.zeros_like(have_KC.T)
    rows = [[have_KC.T, none_CK], [none_CK, have_KC.T], [have_KC.T, have_KC.T]]
    wanted = np.concatenate([*held_out, sum(held_out)])
    within_one = LinearConstraint(np.block(rows), wanted - 1, wanted + 1)
    all_posts = LinearConstraint(np.hstack([np.eye(len(sets))] * 2), 0, counts_K)
    bounds = Bounds(0, np.concatenate([counts_K * (fraction > 0) for fraction in fractions]))
    unknowns = 2 * len(sets)
    found = milp(
        np.zeros(unknowns),
        constraints=[within_one, all_posts],
        bounds=bounds,
        integrality=np.ones(unknowns),
        options={"time_limit": 60},
    )
    return bool(found.status == 2)


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 200), marks=pytest.mark.slow)])
def test_labels_are_within_one_post_of_their_quotas(seeds: range) -> None:
    """Of the first forty sources one has no such division."""
    off = [seed for seed in seeds if furthest(*some_posts(seed)) > 1]
    assert [seed for seed in off if not no_division_is_within_one(*some_posts(seed))] == []
    assert len(off) <= len(seeds) / 40


@pytest.mark.parametrize("seed", [18, 19])
def test_a_label_that_the_first_passes_leave_two_posts_off_is_mended(seed: int) -> None:
    assert furthest(*some_posts(seed)) <= 1


def test_the_solver_finds_a_division_where_there_is_one() -> None:
    assert not any(no_division_is_within_one(*some_posts(seed)) for seed in range(4))


def least_possible(posts: dict[LabelSet, int], labels: int, fractions: tuple[float, float]) -> int:
    """By a look at all divisions."""
    sets = sorted(posts)
    counts_K, have_KC = np.array([posts[one] for one in sets]), having(sets, labels)
    ways = [
        np.array([(count - a - b, a, b) for a in range(count + 1) for b in range(count + 1 - a)])
        for count in counts_K.tolist()
    ]
    numbers_KW = np.array(list(product(*(range(len(one)) for one in ways)))).T
    posts_WCD = np.zeros((numbers_KW.shape[1], labels + 1, 3), np.int64)
    for number, one in enumerate(ways):
        posts_WCD += have_KC[number][None, :, None] * one[numbers_KW[number]][:, None, :]
    if not fractions[1]:
        posts_WCD = posts_WCD[posts_WCD[:, :, 2].sum(axis=1) == 0]
    return int(np.abs(posts_WCD - quotas_of(have_KC, counts_K, fractions)).max(axis=(1, 2)).min())


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 250), marks=pytest.mark.slow)])
def test_of_few_posts_no_division_is_better(seeds: range) -> None:
    worse = []
    for seed in seeds:
        draw = np.random.default_rng(seed)
        labels, fractions = int(draw.integers(2, 7)), FRACTIONS[seed % len(FRACTIONS)]
        posts: Counter[LabelSet] = Counter()
        for _ in range(int(draw.integers(2, 5))):
            posts[tuple(np.flatnonzero(draw.random(labels) < 0.6).tolist())] += int(draw.integers(1, 5))
        if furthest(posts, labels, fractions) > max(1, least_possible(posts, labels, fractions)):
            worse.append(seed)
    assert worse == []


@pytest.mark.skipif(not (DATA / "goemotions").is_dir(), reason="EMOTION_DATA_DIR has no goemotions")
@pytest.mark.parametrize("fractions", FRACTIONS)
def test_goemotions_labels_are_within_one_post_of_their_quotas(fractions: tuple[float, float]) -> None:
    import pyarrow.parquet as pq

    names = (DATA / "goemotions" / "emotions.txt").read_text().split()
    cells = pq.read_table(DATA / "goemotions" / "train.parquet").column("labels").to_pylist()
    posts = Counter(tuple(sorted(names.index(name) for name in cell.split(","))) for cell in cells)
    assert furthest(posts, len(names), fractions) <= 1


def test_of_too_many_sets_the_rarest_labels_count_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_sets, "MAX_SETS", 40)
    draw = np.random.default_rng(0)
    rows = [np.sort(draw.choice(12, draw.integers(1, 5), replace=False)) for _ in range(300)]
    counts_C = np.bincount(np.concatenate(rows), minlength=12)
    found = []
    for order in (np.arange(300), draw.permutation(300)):
        sets = LabelSets(counts_C)
        for piece in np.array_split(order, 7):
            posts = np.concatenate([np.full(len(rows[one]), at) for at, one in enumerate(piece)])
            labels = np.concatenate([rows[one] for one in piece])
            sets.add(PostTargets.of_pairs(posts, labels, np.ones(len(labels)), len(piece)))
        sets.freeze()
        found.append(sets.numbers(0.1, 0.1))
    assert found[0] == found[1]
    assert 1 < len(found[0]) <= 40
