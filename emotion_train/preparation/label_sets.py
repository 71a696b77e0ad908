"""The number of posts of each set of labels for validation and test, so that every label has its
share there: iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011), on counts of sets.

It does not tell posts of one set apart, so it needs only the counts of up to `MAX_SETS` sets,
whatever the number of posts. Where there are more sets, a post counts only by its rarest labels, by
as many of them as keep within `MAX_SETS`; the other labels get their shares by chance. The posts'
draws then decide which posts of a set are taken.

Letters: K sets, S some of the sets, P and Q pairs of a set and one of its labels, D splits (train,
validation, test), C labels; after the labels come "any post" and "no label", which are divided
among the splits as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emotion_train.data.target_columns import PostTargets
from emotion_train.preparation.stratify import quotas

MAX_SETS = 1 << 14
_MOST_KEPT = 8  # rarest labels, when all labels of a post are too many
_MOST_WORK = 1 << 25  # pairs looked at when posts change the split
_MOST_REPAIRS = 4000  # moves to repair labels that are off by more than one post
_RESTS = 6  # number of moves before a set may return to a split that it left

LabelSet = tuple[int, ...]


class LabelSets:
    """The sets of labels of posts, with their counts; `counts_C` are the posts of each label."""

    def __init__(self, counts_C: Any) -> None:
        labels = np.arange(len(counts_C))
        self._rarity_C = np.empty(len(counts_C), np.int64)
        self._rarity_C[np.lexsort((labels, counts_C))] = labels
        # by the number of labels that count; entries with too many sets are dropped meanwhile
        self._met: dict[int, dict[LabelSet, int]] = {kept: {} for kept in (*range(1, _MOST_KEPT + 1), 0)}
        self._labels = len(counts_C)
        self._kept = 0  # number of a post's labels that count, 0 for all
        self._counts: dict[LabelSet, int] = {}
        self._number: dict[LabelSet, int] = {}

    def add(self, targets: PostTargets) -> None:
        """Count posts in any order."""
        for labels, posts in _counted(targets).items():
            for kept in list(self._met):
                met = self._met[kept]
                key = self._rarest(labels, kept)
                met[key] = met.get(key, 0) + posts
                if len(met) > MAX_SETS and kept != 1:
                    del self._met[kept]

    def freeze(self) -> None:
        """End the counting, and number the sets."""
        self._kept = 0 if 0 in self._met else max(self._met)
        self._counts = dict(sorted(self._met[self._kept].items())) or {(): 0}
        self._number = {one: number for number, one in enumerate(self._counts)}

    def numbers(self, validation_fraction: float, test_fraction: float) -> list[tuple[int, int]]:
        """The number of posts of each set for validation and test."""
        counts_K = np.array(list(self._counts.values()), np.int64)
        return shared_out(list(self._counts), counts_K, self._labels, validation_fraction, test_fraction)

    def of(self, targets: PostTargets) -> Any:
        """The number of each post's set; 0 for a set that was not counted."""
        number_N = targets.numbered(self._labels)
        _, first, inverse = np.unique(number_N, return_index=True, return_inverse=True)
        sets = [
            self._number.get(self._rarest(tuple(label for label, _ in targets.target(post)), self._kept), 0)
            for post in first.tolist()
        ]
        return np.array(sets, np.int32)[inverse]

    def _rarest(self, labels: LabelSet, kept: int) -> LabelSet:
        if not kept or len(labels) <= kept:
            return labels
        return tuple(sorted(sorted(labels, key=lambda label: self._rarity_C[label])[:kept]))


def _counted(targets: PostTargets) -> dict[LabelSet, int]:
    number_N = targets.numbered(1 << 30)
    _, first, count = np.unique(number_N, return_index=True, return_counts=True)
    return {
        tuple(label for label, _ in targets.target(post)): posts
        for post, posts in zip(first.tolist(), count.tolist(), strict=True)
    }


def shared_out(
    sets: Sequence[LabelSet], counts_K: Any, labels: int, validation_fraction: float, test_fraction: float
) -> list[tuple[int, int]]:
    """The number of posts of each set for validation and test, by the quotas of each label.

    First come the whole posts of each set's own share. Then the rest, one by one: a post of the
    label with the fewest posts left goes to the split that wants that label most. Then posts change
    splits as long as labels come nearer to their quotas, and at last to repair labels that are
    still off by more than one post.
    """
    if not validation_fraction and not test_fraction:
        return [(0, 0)] * len(sets)
    plan = _Plan(sets, counts_K, labels, (validation_fraction, test_fraction))
    plan.share_whole_posts()
    plan.share_the_rest()
    plan.improve()
    plan.repair()
    return [(int(validation), int(test)) for _, validation, test in plan.taken_KD]


class _Plan:
    def __init__(
        self, sets: Sequence[LabelSet], counts_K: Any, labels: int, fractions: tuple[float, float]
    ) -> None:
        every, none = labels, labels + 1
        members = [(*own, every) if own else (none, every) for own in sets]
        self.label_P = np.concatenate([np.array(own) for own in members])
        self.size_K = np.array([len(own) for own in members])
        self.begin_K = np.cumsum(self.size_K) - self.size_K
        self.set_P = np.repeat(np.arange(len(sets)), self.size_K)
        self.left_K = counts_K.copy()
        self.fraction_D = np.array([1 - sum(fractions), *fractions])
        self.splits: list[int] = np.flatnonzero(self.fraction_D).tolist()
        totals_C = np.bincount(self.label_P, counts_K[self.set_P], labels + 2).astype(np.int64)
        held_out = np.array([quotas(int(total), *fractions) for total in totals_C])
        wanted = [totals_C - held_out.sum(axis=1), held_out[:, 0], held_out[:, 1]]
        self.wanting_CD = np.stack(wanted, axis=1).astype(np.float64)  # posts still to come
        self.taken_KD = np.zeros((len(sets), 3), np.int64)

    def share_whole_posts(self) -> None:
        self.taken_KD += np.floor(self.left_K[:, None] * self.fraction_D).astype(np.int64)
        self.left_K -= self.taken_KD.sum(axis=1)
        for split in range(3):
            posts_C = np.bincount(self.label_P, self.taken_KD[self.set_P, split], len(self.wanting_CD))
            self.wanting_CD[:, split] -= posts_C

    def share_the_rest(self) -> None:
        every, sets_of = len(self.wanting_CD) - 2, self._sets_of_labels()
        left_C = np.bincount(self.label_P, self.left_K[self.set_P], len(self.wanting_CD))
        while (left_C > 0).any():
            label = int(np.argmin(np.where(left_C > 0, left_C, np.inf)))
            for one in sets_of[label].tolist():
                labels = self.label_P[self.begin_K[one] : self.begin_K[one] + self.size_K[one]]
                while self.left_K[one]:
                    want_D = self.wanting_CD[label]
                    best = max(self.splits, key=lambda d: (want_D[d], self.wanting_CD[every, d], -d))
                    self._move(one, labels, None, best)
                    self.left_K[one] -= 1
                    left_C[labels] -= 1

    def improve(self) -> None:
        """Move posts between splits while that brings labels nearer to their quotas. Each move
        makes the sum of squared distances smaller, so it ends; with very many sets, after a number
        of moves that keeps it from taking minutes.
        """
        for _ in range(_MOST_WORK // len(self.label_P)):
            best: tuple[float, int, int, int] = (-1e-9, 0, 0, 0)
            for old in range(3):
                for new in range(3):
                    if old == new or not self.fraction_D[new]:
                        continue
                    pull_C = self.wanting_CD[:, old] - self.wanting_CD[:, new] + 1
                    gain_K = np.add.reduceat(pull_C[self.label_P], self.begin_K)
                    gain_K[self.taken_KD[:, old] == 0] = 0
                    one = int(np.argmin(gain_K))
                    best = min(best, (float(gain_K[one]), one, old, new))
            if best[0] >= -1e-9:
                return
            _, one, old, new = best
            labels = self.label_P[self.begin_K[one] : self.begin_K[one] + self.size_K[one]]
            self._move(one, labels, old, new)

    def repair(self) -> None:
        """Bring every label within one post of its quotas, where single moves can. It keeps the
        division with the least excess beyond one post; on a tie, the one nearest to the quotas.

        Each move takes a label that is off, and brings a post of it into the split that lacks it,
        or takes one out, whichever leaves the least excess. A label's excess weighs more the longer
        it lasts (Morris 1993, the breakout method), so that the search leaves local minima.
        """
        sets_of, weight_CD = self._sets_of_labels(), np.ones_like(self.wanting_CD)
        weight_CD[-2] = 0  # the number of all posts belongs to no label
        back_KD = np.zeros_like(self.taken_KD)  # the first move by which a set may come back
        least, kept_KD = self._standing(), self.taken_KD.copy()
        for number in range(_MOST_REPAIRS):
            off_CD = (_excess(self.wanting_CD) > 0) & (weight_CD > 0)
            if not off_CD.any():
                break
            weight_CD[off_CD] += 1
            label, split = divmod(int(np.argmax(np.where(off_CD, weight_CD, 0))), 3)
            move = self._best_move(sets_of[label], label, split, weight_CD, back_KD <= number)
            if move is None:
                weight_CD[label, split] = 1
                continue
            one, old, new = move
            labels = self.label_P[self.begin_K[one] : self.begin_K[one] + self.size_K[one]]
            self._move(one, labels, old, new)
            back_KD[one, old] = number + _RESTS
            if (standing := self._standing()) < least:
                least, kept_KD = standing, self.taken_KD.copy()
        self.taken_KD = kept_KD

    def _best_move(
        self, sets: Any, label: int, split: int, weight_CD: Any, free_KD: Any
    ) -> tuple[int, int, int] | None:
        """The best move for a label: the set of `sets` that gives a post, its old split and its new
        split, one of which is `split`; None where no post can move.
        """
        now_CD = self.wanting_CD
        # the squares of distances decide between moves of the same excess
        leave_CD = weight_CD * (_excess(now_CD + 1) - _excess(now_CD)) + 1e-3 * (2 * now_CD + 1)
        enter_CD = weight_CD * (_excess(now_CD - 1) - _excess(now_CD)) + 1e-3 * (1 - 2 * now_CD)
        size_S = self.size_K[sets]
        begin_S = np.cumsum(size_S) - size_S
        label_Q = self.label_P[np.repeat(self.begin_K[sets] - begin_S, size_S) + np.arange(size_S.sum())]
        leave_SD = np.add.reduceat(leave_CD[label_Q], begin_S)
        enter_SD = np.add.reduceat(enter_CD[label_Q], begin_S)
        moves: list[tuple[float, int, int, int]] = []
        for other in self.splits:
            if other == split:
                continue
            old, new = (split, other) if now_CD[label, split] < 0 else (other, split)
            can_S = (self.taken_KD[sets, old] > 0) & free_KD[sets, new]
            cost_S = np.where(can_S, leave_SD[:, old] + enter_SD[:, new], np.inf)
            at = int(np.argmin(cost_S))
            if can_S[at]:
                moves.append((float(cost_S[at]), int(sets[at]), old, new))
        return min(moves)[1:] if moves else None

    def _standing(self) -> tuple[float, float]:
        """The labels' excess beyond one post, and the sum of all squared distances."""
        excess_CD = _excess(self.wanting_CD)
        return float(excess_CD.sum() - excess_CD[-2].sum()), float((self.wanting_CD**2).sum())

    def _sets_of_labels(self) -> list[Any]:
        """The numbers of the sets with each label."""
        ends_C = np.cumsum(np.bincount(self.label_P, minlength=len(self.wanting_CD)))
        return np.split(self.set_P[np.argsort(self.label_P, kind="stable")], ends_C[:-1])

    def _move(self, one: int, labels: Any, old: int | None, new: int) -> None:
        self.taken_KD[one, new] += 1
        self.wanting_CD[labels, new] -= 1
        if old is not None:
            self.taken_KD[one, old] -= 1
            self.wanting_CD[labels, old] += 1


def _excess(wanting_CD: Any) -> Any:
    """The distance of labels from their quotas beyond one post."""
    return np.maximum(np.abs(wanting_CD) - 1, 0)
